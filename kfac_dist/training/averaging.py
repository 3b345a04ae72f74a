"""A running average of the weights that a run passes through (Polyak & Juditsky 1992; Martens & Grosse 2015, §13).

    θ̄ ← ξ_k θ̄ + (1 − ξ_k) θ,  ξ_k = min(1 − 1/k, ξ)

The average is held as the weights are, whole or in slices, in the precision that the optimizer steps: every engine has
one, and no rank ever has more of it than of the model. Buffers (the averages of BatchNorm) aren't averaged again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from kfac_dist.engines import TrainingEngine
from kfac_dist.training.checkpoints.slices import SavedRun, Wanted, run_name


class IterateAverage:
    """θ̄ of one run.

    Args:
        engine: Has the weights.
        decay: ξ.
    """

    def __init__(self, engine: TrainingEngine, decay: float) -> None:
        self._engine = engine
        self._decay = decay
        self._values = [holding.values.clone() for holding in engine.holdings()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 1."""
        if self._values:
            torch._foreach_lerp_(self._values, self._weights(), 1 - min(1 - 1 / step, self._decay))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the average, and afterwards its own weights back; collective."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, Tensor]:
        """Return the average by the names under which a checkpoint has it."""
        return {
            run_name(holding.name, holding.start, value, whole=holding.whole): value
            for holding, value in zip(self._engine.holdings(), self._values, strict=True)
        }

    def wants(self, saved: Mapping[str, list[SavedRun]]) -> list[Wanted]:
        """Return the tensors to read from a checkpoint: none from one without an average."""
        wanted = [
            Wanted(f"average.{holding.name}", holding.start, value)
            for holding, value in zip(self._engine.holdings(), self._values, strict=True)
        ]
        return [want for want in wanted if want.name in saved]

    @torch.no_grad()
    def begin(self) -> None:
        """Begin with the weights as they are."""
        if self._values:
            torch._foreach_copy_(self._values, self._weights())

    @torch.no_grad()
    def _swap(self) -> None:
        for own, value in zip(self._weights(), self._values, strict=True):
            kept = own.clone()
            own.copy_(value)
            value.copy_(kept)
        self._engine.restored()

    def _weights(self) -> list[Tensor]:
        return [holding.values for holding in self._engine.holdings()]
