"""Terms of the loss that a rank's layers have missed, until ranks ask each other whether any of them used the layer.

    rank 0   uses expert 0 alone      n₀ terms
    rank 1   uses expert 1 alone      n₁ terms         the weight of either expert's G is n₀ + n₁

A step in which no rank uses a layer adds nothing to its weight: its average stays. Which it was is no sum that a rank
could keep, so steps are kept apart until the averages are reduced: ranks then send, by step and unit, how many of them
used the layer and the terms that the others missed. Where every rank used every layer, nothing of it is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.curvature.device_ops import scalar, to_device
from kfac_dist.curvature.statistics import Missed, Span


@dataclass
class _Step:
    """One step's contribution to the averages of some units.

    Attributes:
        open: By unit, whether its average it entered and hasn't been reduced since.
        rate: (1 − β)·[taken], by which the averages moved.
        used: By unit, whether this rank used its layer.
        terms: `[1 + C, units]` the terms that it missed of layers that it didn't use; None if it used all.
    """

    open: list[bool]
    rate: Tensor | float
    used: list[bool]
    terms: Tensor | None = None


class MissedTerms:
    """Terms that one rank has missed in the steps since each unit was reduced.

    Args:
        weights: `[1 + C, units]` weights of the averages, for their shape, device and precision.
    """

    def __init__(self, weights: Tensor) -> None:
        self._rows, self._units = weights.shape
        self._dtype, self._device = weights.dtype, weights.device
        self._steps: list[_Step] = []

    def note(self, spans: list[tuple[Span, Missed | None]], decay: float, taken: Tensor) -> None:
        """Take note of a step that moves the averages of some spans on this rank alone.

        Args:
            spans: Each span with the terms that its layers missed.
            decay: β.
            taken: 0-dim: whether the averages moved.
        """
        if spans:
            self._steps.append(self._step(spans, scalar((1 - decay) * taken.to(self._dtype))))

    def _step(self, spans: list[tuple[Span, Missed | None]], rate: Tensor | float) -> _Step:
        inside, used = [False] * self._units, [True] * self._units
        terms = None
        for span, missed in spans:
            inside[span.units] = [True] * (span.last - span.first)
            if missed is None or all(missed.used):
                continue
            if terms is None:
                terms = self._zeros(self._units)
            used[span.units] = missed.used
            terms[:, span.units] = missed.terms * self._mask([not own for own in missed.used])
        return _Step(inside, rate, used, terms)

    def irregular(self, spans: list[Span]) -> bool:
        """Whether this rank has left a layer of some spans unused in a step since they were reduced."""
        return any(not all(step.used[span.units]) for step in self._steps for span in spans)

    def message(self, spans: list[Span]) -> Tensor:
        """Return numbers to sum over ranks, `[2 + C, steps, units]`: uses of a layer, and the others' missed terms.

        Terms have the weights by which the averages have them now.
        """
        columns = [index for span in spans for index in range(span.first, span.last)]
        parts = []
        weight = self._ones(len(columns))
        for step in reversed(self._steps):
            inside = self._mask([step.open[index] for index in columns])
            used = self._mask([step.open[index] and step.used[index] for index in columns]).to(self._dtype)
            own = self._zeros(len(columns))
            if step.terms is not None:
                own = torch.cat([step.terms[:, span.units] for span in spans], dim=1) * (weight * step.rate) * inside
            parts.append(torch.cat([used[None], own]))
            weight = weight * torch.where(inside, 1 - step.rate, 1.0)
        return torch.stack(parts, dim=1)

    def reduced(self, spans: list[Span]) -> None:
        """Forget the spans whose averages are global now."""
        for step in self._steps:
            for span in spans:
                step.open[span.units] = [False] * (span.last - span.first)
                step.used[span.units] = [True] * (span.last - span.first)
        self._steps = [step for step in self._steps if any(step.open)]

    def drop_last(self) -> None:
        """Forget the last step, which moved nothing."""
        self._steps.pop()

    def clear(self) -> None:
        """Forget everything."""
        self._steps.clear()

    # ---- checkpoints

    def state(self) -> Tensor:
        """Return everything as one tensor `[1 + steps, 4 + C, units]`, whose first row is empty."""
        rows = [torch.zeros(3 + self._rows, self._units, dtype=self._dtype, device=self._device)]
        for step in self._steps:
            rate = self._ones(self._units) * step.rate
            terms = self._zeros(self._units) if step.terms is None else step.terms
            flags = torch.tensor([step.open, step.used], dtype=self._dtype, device=self._device)
            rows.append(torch.cat([rate[None], flags, terms]))
        return torch.stack(rows)

    def load_state(self, values: Tensor) -> None:
        """Load the result of `state`."""
        self._steps = []
        for row in values.to(self._device)[1:]:
            inside, used = row[1:3].bool().tolist()
            self._steps.append(_Step(inside, scalar(row[0, 0]), used, row[3:]))

    def _mask(self, flags: list[bool]) -> Tensor:
        return to_device(torch.tensor(flags), self._device)

    def _zeros(self, units: int) -> Tensor:
        return torch.zeros(self._rows, units, dtype=self._dtype, device=self._device)

    def _ones(self, units: int) -> Tensor:
        return torch.ones(units, dtype=self._dtype, device=self._device)


def shared_terms(total: Tensor) -> Tensor:
    """Return `[1 + C, units]`: the missed terms of steps in which some rank used the layer, from the ranks' sum."""
    return ((total[0] > 0) * total[1:]).sum(dim=1)
