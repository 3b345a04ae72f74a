"""Running averages of the factors: a weighted sum and its weight, for every unit, in flat persistent buffers.

    window   what the current optimizer step has measured so far       (sum, weight) of this step
    average  S ← βS + (1−β)·window,  w ← βw + (1−β)·count                     (sum, weight) since the start

A factor is S/w: zero-initialised and bias-corrected by its own weight, and linear in everything measured. So ranks can
keep their own (S, w), and sum them when a refresh needs the factor.

The window is kept apart from the average so that a step is a transaction: a batch that isn't finite, or a step that the
optimizer skips, never touches the average.

A unit that keeps its statistics apart by class has one sum and one weight for each, of the same step and in the same
transaction.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfac_dist.curvature.device_ops import scalar, to_device, zero_unless
from kfac_dist.curvature.factors import FactorKind, Side, Unit
from kfac_dist.curvature.gram import accumulate_gram, asymmetry

if TYPE_CHECKING:
    from kfac_dist.curvature.class_conditional import Members


@dataclass(frozen=True)
class Missed:
    """The loss's terms of one step that a span's units have not been measured in: other layers saw them.

    A layer that sees nothing of a micro-batch (an expert to which no sample went) has a gradient of zero for its terms,
    and they count, as long as any micro-batch of any rank used the layer in this step.

    Attributes:
        used: Whether any micro-batch of this rank used each unit's layer; always so where terms don't matter.
        terms: `[1 + C, units]`: their number, and their numbers by class.
    """

    used: tuple[bool, ...]
    terms: Tensor


@dataclass(frozen=True)
class Span:
    """Consecutive units `[first, last)` and the values `[start, stop)` of the flat buffers that they occupy."""

    first: int
    last: int
    start: int
    stop: int

    @property
    def units(self) -> slice:
        """Slice of per-unit tensors."""
        return slice(self.first, self.last)

    @property
    def values(self) -> slice:
        """Slice of flat buffers."""
        return slice(self.start, self.stop)


class FlatUnits:
    """Places of units in a flat buffer that holds them one after the other."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = tuple(unit.statistics for unit in units)
        self._edges = [0, *itertools.accumulate(unit.numel for unit in self.units)]
        self._index = {unit.name: index for index, unit in enumerate(units)}

    @property
    def numel(self) -> int:
        """Values in the whole buffer."""
        return self._edges[-1]

    def __contains__(self, unit: Unit) -> bool:
        """Whether the buffer holds this unit."""
        return unit.name in self._index

    def index(self, unit: Unit) -> int:
        """Position of the unit in per-unit tensors."""
        return self._index[unit.name]

    def index_of(self, name: str) -> int:
        """Position of a unit by its name."""
        return self._index[name]

    def span(self, first: int, last: int) -> Span:
        """Return the span of the units `[first, last)`."""
        return Span(first, last, self._edges[first], self._edges[last])

    def view(self, buffer: Tensor, unit: Unit) -> Tensor:
        """Return the unit's statistics in a flat buffer, in the shape of its sums: `[classes·batch, n, n]`."""
        index = self._index[unit.name]
        return buffer[self._edges[index] : self._edges[index + 1]].view(self.units[index].shape)


class RunningAverages:
    """The window and the averages of all units; implements `blocks.base.StatisticsSink`.

    Args:
        units: All units, in the order in which backward completes them.
        held: The units whose averages live on this rank; the others are only measured here.
        decay: β.
        device: The layers' device.
        dtype: Precision of the averages.
        working: Precision of the window and of weights and traces.
        transient_window: Free the window between measurements (saves memory, costs an allocation each time).

    Attributes:
        layout: Place of every unit in the window.
        held: Place of every held unit in the averages.
        working: Precision of the window.
        average: Flat sums of the held units.
        scalars: `[2 + C, units]` weights and traces that belong to the averages, then weights by class.
        window_scalars: `[2 + C, units]` weights and traces of the window; valid once a span is closed.
        dropped: 0-dim: taken steps of which this rank has dropped statistics, because they weren't finite.
        not_finite: `[units]` in how many of them a unit's were not.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        held: Sequence[Unit],
        *,
        decay: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        working: torch.dtype = torch.float32,
        transient_window: bool = False,
    ) -> None:
        self.layout = FlatUnits(units)
        self.held = FlatUnits(held)
        self.decay = decay
        self.device = device
        self.working = working
        self.average = torch.zeros(self.held.numel, device=device, dtype=dtype)
        classes = max((unit.classes for unit in units), default=0)
        self.scalars = torch.zeros(2 + classes, len(units), device=device, dtype=working)
        self.window_scalars = torch.zeros_like(self.scalars)
        self.dropped = torch.zeros((), dtype=torch.int64, device=device)
        self.not_finite = torch.zeros(len(units), dtype=torch.int64, device=device)
        self._bad = torch.zeros(len(units), dtype=torch.bool, device=device)
        self._transient = transient_window
        self._window: Tensor | None = None
        self._written = [False] * len(units)
        self._counts: list[float | Tensor] = [0.0] * len(units)
        self._by_class: dict[int, Tensor] = {}
        # Terms of the step's micro-batches, also by class, and which of these each unit has been measured in.
        self._terms: dict[object, tuple[float | Tensor, Tensor | None]] = {}
        self._current: object = None
        self._seen: defaultdict[int, set[object]] = defaultdict(set)
        # Columns of the rows that made a dense unit; None if it was added as a whole.
        self._widths: dict[str, int | None] = {}
        self._pieces: dict[tuple[str, Side], list[Unit]] = {}
        for unit in units:
            self._pieces.setdefault((unit.block, unit.side), []).append(unit)
        self._diagonal_edges, self._diagonal = _diagonal_index(self.layout, device)

    # ---- measuring: the sink of the blocks

    def enter(self, micro_batch: object, terms: float | Tensor, by_class: Tensor | None = None) -> None:
        """Begin the measurements of a micro-batch, whose terms count for every layer.

        Args:
            micro_batch: Identifies it.
            terms: n, of the terms kept by sampling.
            by_class: The same by class, `[C]`.
        """
        self._terms.setdefault(micro_batch, (terms, by_class))
        self._current = micro_batch

    @property
    def window(self) -> Tensor:
        """Flat sums of the current step."""
        if self._window is None:
            # Zeros, not empty: entries below the diagonal blocks are never written, but are summed and sent.
            self._window = torch.zeros(self.layout.numel, device=self.device, dtype=self.working)
        return self._window

    def add_rows(
        self, block: str, side: Side, rows: Tensor, *, scale: float, ones: bool, members: Members | None = None
    ) -> None:
        """Add `scale · [rows, 1]ᵀ[rows, 1]` for rows `[batch, M, d]` to the diagonal blocks that are kept."""
        width = rows.shape[-1]
        for unit in self._pieces[block, side]:
            out = self.layout.view(self.window, unit)
            own = rows[unit.first : unit.first + unit.batch, :, unit.start : min(unit.stop, width)]
            border = ones and unit.stop > width
            self._widths[unit.name] = own.shape[-1]
            beta = self._beta(unit)
            if members is None:
                accumulate_gram(out, own, alpha=scale, beta=beta, ones=border)
                continue
            if not beta:  # a class without rows is not written to
                out.zero_()
            members.accumulate(out.unflatten(0, (members.number, -1)), own, alpha=scale, ones=border)

    def add_values(self, block: str, side: Side, values: Tensor) -> None:
        """Add `[batch, n]` to a diagonal factor, or `[batch, n, n]` to a dense one."""
        for unit in self._pieces[block, side]:
            own = values if unit.classes else values[unit.first : unit.first + unit.batch]
            part = own[:, unit.start : unit.stop]
            if unit.kind is FactorKind.DENSE:
                part = part[..., unit.start : unit.stop]
                self._widths.setdefault(unit.name, None)
            view = self.layout.view(self.window, unit)
            view.add_(part) if self._beta(unit) else view.copy_(part)

    def add_count(self, block: str, side: Side, count: float | Tensor, by_class: Tensor | None = None) -> None:
        """Add to the weight of a factor, and to its weights by class `[C]`."""
        for unit in self._pieces[block, side]:
            index = self.layout.index(unit)
            self._counts[index] += count
            self._seen[index].add(self._current)
            if by_class is not None:
                own = to_device(by_class, self.device)
                self._by_class[index] = self._by_class[index] + own if index in self._by_class else own

    def _beta(self, unit: Unit) -> float:
        index = self.layout.index(unit)
        fresh = not self._written[index]
        self._written[index] = True
        return 0.0 if fresh else 1.0

    # ---- closing: the window becomes one rank's transaction

    def close(self, span: Span) -> None:
        """Finish the window of a span: unmeasured units are zero, and units that aren't finite are dropped whole.

        A dropped span leaves both its sums and its weights at zero, so that the average over the other ranks stays
        right without a collective.
        """
        for index in range(span.first, span.last):
            if not self._written[index]:
                self.layout.view(self.window, self.layout.units[index]).zero_()
        scalars = self.window_scalars[:, span.units]
        scalars[0].copy_(self._weights(span))
        scalars[1].copy_(self._traces(span))
        scalars[2:].zero_()
        for index in range(span.first, span.last):
            if (by_class := self._by_class.pop(index, None)) is not None:
                self.window_scalars[2 : 2 + len(by_class), index] = by_class
        bad = self._bad[span.units].copy_(~torch.isfinite(scalars.sum(0)))
        finite = ~bad.any()
        zero_unless(finite, self.window[span.values])
        zero_unless(finite, scalars)
        self._written[span.units] = [False] * (span.last - span.first)
        self._counts[span.units] = [0.0] * (span.last - span.first)

    def missed(self, span: Span) -> Missed | None:
        """Return the terms of this step that the units of a closed span have missed; None if there are none.

        Nothing that a dropped span has missed counts either.
        """
        columns = range(span.first, span.last)
        absent = [
            [key for key in self._terms if key not in self._seen[index]] if self.layout.units[index].per_term else []
            for index in columns
        ]
        if not any(absent):
            return None
        found = self.scalars.new_zeros(len(self.scalars) - 1, len(columns))
        for column, keys in enumerate(absent):
            for terms, by_class in (self._terms[key] for key in keys):
                found[0, column] += terms
                if by_class is not None:
                    found[1 : 1 + len(by_class), column] += to_device(by_class, self.device)
        zero_unless(~self._bad[span.units].any(), found)
        return Missed(
            tuple(not keys or bool(self._seen[index]) for index, keys in zip(columns, absent, strict=True)), found
        )

    def add_missed(self, span: Span, terms: Tensor) -> None:
        """Add terms `[1 + C, units]` to the weights of a span's window."""
        self.window_scalars[0, span.units] += terms[0]
        self.window_scalars[2:, span.units] += terms[1:]

    def end_step(self) -> None:
        """Forget the step's micro-batches."""
        self._terms.clear()
        self._current = None
        self._seen.clear()

    def count_dropped(self, taken: Tensor) -> None:
        """Count the units dropped in the closed spans of a step, unless the whole step is skipped; no host sync.

        Args:
            taken: 0-dim bool.
        """
        self._bad &= taken
        self.dropped += self._bad.any()
        self.not_finite += self._bad
        self._bad.zero_()

    def take_over(self, previous: RunningAverages) -> None:
        """Take over the counters of the averages that these replace, unit by unit."""
        self.dropped += previous.dropped
        for index, unit in enumerate(self.layout.units):
            if unit in previous.layout:
                self.not_finite[index] += previous.not_finite[previous.layout.index(unit)]

    def _weights(self, span: Span) -> Tensor:
        counts = self._counts[span.units]
        host = torch.tensor([0.0 if isinstance(c, Tensor) else c for c in counts], dtype=self.working)
        weights = to_device(host, self.device)
        for index, count in enumerate(counts):
            if isinstance(count, Tensor):
                weights[index] = count
        return weights

    def _traces(self, span: Span) -> Tensor:
        first, last = self._diagonal_edges[span.first], self._diagonal_edges[span.last]
        lengths = [b - a for a, b in itertools.pairwise(self._diagonal_edges[span.first : span.last + 1])]
        values = self.window.index_select(0, self._diagonal[first:last])
        # Not cumsum or index_add: one unit's NaN must stay its own, and the order of additions must be fixed.
        return torch.segment_reduce(values, "sum", lengths=to_device(torch.tensor(lengths), self.device), unsafe=True)

    # ---- committing: the average moves, or stays as it was

    def blend(self, span: Span, scale: float) -> None:
        """Turn a closed window into the average's next value, times `scale`, leaving the average as it is."""
        self.window[span.values].mul_((1 - self.decay) * scale).add_(
            self.average[self._held_values(span)], alpha=self.decay * scale
        )
        self.window_scalars[:, span.units].mul_((1 - self.decay) * scale).add_(
            self.scalars[:, span.units], alpha=self.decay * scale
        )

    def adopt(self, span: Span) -> None:
        """Take a blended window as the average."""
        self.average[self._held_values(span)].copy_(self.window[span.values])
        self.scalars[:, span.units] = self.window_scalars[:, span.units]

    def advance(self, span: Span, taken: Tensor, new: Tensor | None = None) -> None:
        """Decay the average and add a closed window, if the optimizer takes this step; on the device, no host sync.

        Args:
            span: The units to advance.
            taken: 0-dim bool.
            new: The sums of the span's *held* units; by default the window's.
        """
        weight = scalar((1 - self.decay) * taken.to(self.working))
        values = self.window[span.values] if new is None else new
        average = self.average[self._held_values(span)]
        if average.dtype is values.dtype:
            average.lerp_(values, weight)
        else:
            average.copy_(average.to(self.working).lerp_(values.to(self.working), weight))
        self.scalars[:, span.units].lerp_(self.window_scalars[:, span.units], weight)

    def release(self) -> None:
        """Give the window's memory back if it was asked to be transient."""
        if self._transient:
            self._window = None

    def discard(self) -> None:
        """Forget the measurements of the current window."""
        self._written = [False] * len(self._written)
        self._counts = [0.0] * len(self._counts)
        self._by_class.clear()
        self.end_step()
        self.release()

    # ---- reading

    def sums(self, unit: Unit) -> Tensor:
        """Return the unit's sum S, a view in the averages' precision; upper block-triangle, `[classes·batch, n, n]`."""
        return self.held.view(self.average, unit)

    def asymmetry(self, unit: Unit, sums: Tensor | None = None) -> Tensor | None:
        """Return how far a dense unit's sum is from symmetric, a 0-dim tensor; None if nothing tells its halves apart.

        Its inversion reads one half, or mirrors it. A unit that this rank hasn't measured since it was built is
        not known well enough.

        Args:
            unit: The unit.
            sums: A copy of its sum, to look at in its place.
        """
        if unit.name not in self._widths:
            return None
        return asymmetry(self.sums(unit) if sums is None else sums, self._widths[unit.name])

    def _held_values(self, span: Span) -> slice:
        held = [self.held.index(unit) for unit in self.layout.units[span.units] if unit in self.held]
        return self.held.span(held[0], held[-1] + 1).values if held else slice(0, 0)


def _diagonal_index(layout: FlatUnits, device: torch.device) -> tuple[list[int], Tensor]:
    """Return where each unit's diagonal starts in the index, and the index of all diagonals in the flat buffer."""
    edges, parts = [0], []
    for position, unit in enumerate(layout.units):
        start = layout.span(position, position + 1).start
        if unit.kind is not FactorKind.DENSE:  # a crossed one's diagonal doesn't tell whether the rest is finite
            own = torch.arange(unit.numel)
        else:
            matrices = torch.arange(unit.batch)[:, None] * unit.dim**2
            own = (matrices + torch.arange(unit.dim) * (unit.dim + 1)).flatten()
        parts.append(own + start)
        edges.append(edges[-1] + own.numel())
    return edges, (torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)).to(device)
