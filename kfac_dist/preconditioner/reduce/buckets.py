"""The buckets and collectives that a step reduces by: a pure function of the plan and the configuration.

`FactorReduction` sends by it, and the planner counts by it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.config.schema import DistributionConfig, ReduceEvery, Reduction
from kfac_dist.curvature.factors import FactorKind, Unit
from kfac_dist.curvature.statistics import FlatUnits, Span
from kfac_dist.distributed.communicators.base import Communicator, Work
from kfac_dist.distributed.movement.owner_buffer import PendingReduce, reduce_to_owners, split_buckets
from kfac_dist.precision import torch_dtype
from kfac_dist.preconditioner.plan import Plan
from kfac_dist.preconditioner.reduce.unit_buffer import UnitBuffer


@dataclass(frozen=True)
class StepBuckets:
    """One step's buckets of the window.

    Attributes:
        buckets: The parts to reduce, in this order, with their staging; None if the window is summed in place.
        local: The parts that stay local.
        blocks: Everything that is measured.
    """

    buckets: list[tuple[Span, UnitBuffer | None]]
    local: list[Span]
    blocks: frozenset[str]

    @property
    def columns(self) -> int:
        """Units whose weights and traces are added up."""
        return sum(span.last - span.first for span, _ in self.buckets)


class BucketPlan:
    """The reductions of one plan.

    Args:
        plan: The owner of each unit.
        config: Options of the distribution.
        window: Layout of the units' statistics.
        size: Ranks that measure.
        working: Precision of the window.

    Attributes:
        blending: Whether averages are local between refreshes.
        scattering: Whether a sum goes to its owner alone.
        dtype: The dtype sent.
    """

    def __init__(
        self,
        plan: Plan,
        config: DistributionConfig,
        window: FlatUnits,
        size: int,
        working: torch.dtype = torch.float32,
    ) -> None:
        self.blending = config.reduce_every is ReduceEvery.REFRESH
        self.scattering = config.reduction is Reduction.REDUCE_SCATTER and size > 1
        self.dtype = torch_dtype(config.communication_dtype)
        self._working = working
        self._plan = plan
        self._pack = config.pack_triangles
        self._count = config.buckets
        self._window = window
        self._size = size
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...] | None], StepBuckets] = {}

    def at(self, slots: tuple[int, ...], measured: tuple[int, ...] | None = None) -> StepBuckets:
        """Return the parts to reduce when these slots refresh, and the local ones: everything, on a single rank.

        Args:
            slots: The slots that refresh.
            measured: Those whose blocks are measured, `slots` among them; by default all.
        """
        if (slots, measured) not in self._known:
            self._known[slots, measured] = self._lay_out(slots, tuple(self._slots()) if measured is None else measured)
        return self._known[slots, measured]

    def scalars_numel(self, reduced: StepBuckets, classes: int) -> int:
        """Return the values that travel beside a step's buckets where every layer is used on every rank.

        Weights, traces, weights by class and a vote; at a refresh whether a layer was unused, or at every step which,
        and the terms that it missed.

        Args:
            reduced: The step.
            classes: C.
        """
        missed = 1 if self.blending else (2 + classes) * reduced.columns
        return (2 + classes) * reduced.columns + missed + 1

    def send(self, comm: Communicator, buffer: Tensor, wire: UnitBuffer | None, *, label: str) -> Work | PendingReduce:
        """Start the reduction of one bucket; collective.

        Args:
            comm: The ranks that measure.
            buffer: The window's own values, or the filled staging buffer.
            wire: The staging, if there is one.
            label: Name of the traffic.
        """
        if wire is not None and self.scattering:
            return reduce_to_owners(comm, buffer, wire.layout, label=label)
        return comm.all_reduce(buffer, label=label)

    def _lay_out(self, slots: tuple[int, ...], measured: tuple[int, ...]) -> StepBuckets:
        everything = not self.blending
        chosen = [] if self._size == 1 else [slot for slot in measured if everything or slot in slots]
        reduced = [span for whole in self._spans(chosen) for span in self._buckets(whole.first, whole.last)]
        return StepBuckets(
            [(span, self._wire(self._window.units[span.units])) for span in reduced],
            self._spans([slot for slot in measured if slot not in chosen]),
            frozenset(name for name, block in self._plan.blocks.items() if block.slot in measured),
        )

    def _spans(self, slots: Sequence[int]) -> list[Span]:
        """Return the units of some slots in as few spans as there are gaps: buckets don't grow with the slots."""
        ranges: list[tuple[int, int]] = []
        for slot in slots:
            first, last = self._plan.slot_units((slot,))
            if first == last:
                continue
            if ranges and ranges[-1][1] == first:
                first = ranges.pop()[0]
            ranges.append((first, last))
        return [self._window.span(first, last) for first, last in ranges]

    def _slots(self) -> Sequence[int]:
        return range(1 + max((block.slot for block in self._plan.blocks.values()), default=0))

    def _buckets(self, first: int, last: int) -> list[Span]:
        """Cut units into buckets of near-equal bytes that keep a block's units together."""
        units = self._window.units[first:last]
        blocks = [list(own) for _, own in itertools.groupby(units, key=lambda unit: unit.block)]
        edges = [first, *(first + n for n in itertools.accumulate(len(own) for own in blocks))]
        cuts = split_buckets([sum(unit.numel for unit in own) for own in blocks], self._count)
        return [self._window.span(edges[start], edges[stop]) for start, stop in cuts]

    def _wire(self, units: Sequence[Unit]) -> UnitBuffer | None:
        """Return the staging of a bucket, or None when the window itself can be summed in place."""
        if not self.scattering and self.dtype is self._working and not self._pack:
            return None
        owners = [self._plan.assignment.owners[unit.name] if self.scattering else 0 for unit in units]
        return UnitBuffer(
            units,
            owners,
            self._size if self.scattering else 1,
            numel=lambda unit: unit.numel,
            packed=lambda unit: self._pack and unit.kind is FactorKind.DENSE,
        )
