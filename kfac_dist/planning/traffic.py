"""The traffic of one rank in one kind of step: the step's own layouts, recorded and not sent.

Every collective is started by the code that starts it in a step (`share_segments`, `BucketPlan.send`), on tensors
without memory and a communicator that only counts; nothing here has a formula of its own. The step that is counted is
one of a run's middle, not its first, in which ranks also agree on the loss's scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.config.schema import Uncovered
from kfac_dist.curvature.class_conditional import Summary
from kfac_dist.distributed.communicators.base import Communicator, SoloCommunicator
from kfac_dist.distributed.communicators.recording import Call, RecordingCommunicator
from kfac_dist.distributed.communicators.traffic import Traffic
from kfac_dist.distributed.movement.owner_buffer import SegmentLayout, share_segments
from kfac_dist.engines.base import FINITE
from kfac_dist.planning.job import PlannedRun, StepKind
from kfac_dist.precision import working
from kfac_dist.preconditioner import renewal
from kfac_dist.preconditioner.invert import class_conditional as class_combination
from kfac_dist.preconditioner.invert import damping_rules as adaptation
from kfac_dist.preconditioner.invert import ekfac as moments
from kfac_dist.preconditioner.invert import refresh
from kfac_dist.preconditioner.invert.ekfac import moments_wire
from kfac_dist.preconditioner.invert.refresh import payload_wire
from kfac_dist.preconditioner.plan import Plan
from kfac_dist.preconditioner.precondition import diagonal_fisher as diagonal
from kfac_dist.preconditioner.precondition import preconditioner as step_length
from kfac_dist.preconditioner.precondition import transport as gradients
from kfac_dist.preconditioner.precondition.transport import update_layout
from kfac_dist.preconditioner.reduce import reduction
from kfac_dist.preconditioner.reduce.buckets import BucketPlan

META = torch.device("meta")


@dataclass(frozen=True)
class RecordedTraffic:
    """The collectives of one rank.

    Attributes:
        calls: One by one.
        traffic: By label, counted as a run counts it.
    """

    calls: tuple[Call, ...]
    traffic: Traffic

    @property
    def sent(self) -> int:
        """Bytes that the rank sent."""
        return self.traffic.total_bytes


def record_traffic(job: PlannedRun, kind: StepKind, rank: int) -> RecordedTraffic:
    """Return the messages of `rank` in a step of some kind."""
    world = RecordingCommunicator(rank, job.world_size)
    solo = job.world_size == 1
    _Step(job, SoloCommunicator(world.traffic, META) if solo else world, rank).take(kind)
    return RecordedTraffic(tuple(world.calls), world.traffic)


class _Step:
    """One rank's communicators, as `assembly` splits them."""

    def __init__(self, job: PlannedRun, comm: Communicator, rank: int) -> None:
        self._job = job
        self._config = job.config
        self._comm = comm
        grid = job.plan.grid
        self._column_index = grid.column_of(rank)
        self._row = comm if grid.group_size == 1 else comm.split(grid.rows())
        self._column = comm if grid.columns == 1 else comm.split(grid.worker_groups())

    def take(self, kind: StepKind) -> None:
        """Do the communication of `KFAC.step`, in its order."""
        inhabited = {block.slot for block in self._job.plan.blocks.values()}
        measured = tuple(slot for slot in kind.measured if slot in inhabited)
        slots = tuple(slot for slot in kind.slots if slot in inhabited)
        if self._job.sharded and (measured or kind.moments):
            self._vote(FINITE)
        if measured:
            self._reduce(self._job.reduction, slots, reduction.LABEL, self._job.plan, measured)
        if kind.moments and self._job.moments is not None:
            plan, layout = self._job.moments
            self._reduce(layout, (), moments.LABEL, plan)
            self._publish(plan)
        if kind.diagonal and (measured or kind.moments):
            self._measure_rest()
        if slots:
            self._vote(renewal.LABEL)
            self._refresh(slots)
        self._transport()
        if self._config.update.kl_clip is not None:
            self._sum(1, step_length.LABEL, self._row)

    def _reduce(
        self,
        layout: BucketPlan,
        slots: tuple[int, ...],
        label: str,
        plan: Plan,
        measured: tuple[int, ...] | None = None,
    ) -> None:
        reduced = layout.at(slots, measured)
        for span, wire in reduced.buckets:
            buffer = self._meta(span.stop - span.start) if wire is None else wire.buffer(layout.dtype, META)
            layout.send(self._comm, buffer, wire, label=label).wait()
        if reduced.buckets:
            classes = max((unit.classes for unit in plan.units), default=0)
            self._sum(layout.scalars_numel(reduced, classes), label, self._comm)

    def _publish(self, plan: Plan) -> None:
        assert self._job.moments is not None
        if self._job.moments[1].scattering and self._column.size > 1:
            self._share(moments_wire(plan, self._column_index).layout, moments.LABEL, self._column)

    def _measure_rest(self) -> None:
        elements = sum(self._job.model.uncovered.values())
        match self._config.curvature.uncovered:
            case Uncovered.DIAGONAL if elements:
                self._sum(1, diagonal.LABEL, self._comm)
            case Uncovered.DIAGONAL_MC if elements:
                self._sum(elements + 1, diagonal.LABEL_DRAWN, self._comm)

    def _refresh(self, slots: tuple[int, ...]) -> None:
        job, config = self._job, self._config
        adapt = config.inversion.adapt
        if adapt is not None and config.inversion.inverse_every // config.inversion.stagger >= adapt.every:
            self._sum(1, adaptation.LABEL, self._comm)
        sharing = self._column if job.moments is None else self._comm
        column = None if sharing.size == job.world_size else self._column_index
        pack = config.distribution.pack_triangles
        wire = payload_wire(job.plan, slots, column, config.inversion.solver, pack=pack)
        by_class = sum(Summary.numel(unit.batch, unit.classes) for unit in wire.units if unit.classes)
        if by_class and sharing.size > 1:
            self._sum(by_class, class_combination.LABEL, sharing)
        if sharing.size > 1:
            self._share(wire.layout, refresh.LABEL, sharing)
        if job.moments is not None:
            self._publish(job.moments[0])

    def _transport(self) -> None:
        job = self._job
        if not job.sharded:
            if self._row.size > 1:
                self._share(update_layout(job.plan), gradients.LABEL, self._row)
            return
        dtype = torch.bfloat16 if job.exchanges_bf16 else working(self._config)
        for plan in job.exchanges(self._row.rank):
            pieces, shards = (self._meta(sum(splits), dtype) for splits in (plan.piece_splits, plan.shard_splits))
            for there, here, into, out_of in (
                (pieces, shards, plan.piece_splits, plan.shard_splits),
                (shards, pieces, plan.shard_splits, plan.piece_splits),
            ):
                self._row.all_to_all(there, here, into, out_of, label=gradients.LABEL)

    def _share(self, layout: SegmentLayout, label: str, comm: Communicator) -> None:
        share_segments(comm, self._meta(layout.sharing_numel), layout, label=label).wait()

    def _vote(self, label: str) -> None:
        self._comm.all_reduce(self._meta(1, torch.float32), label=label).wait()

    def _sum(self, numel: int, label: str, comm: Communicator) -> None:
        comm.all_reduce(self._meta(numel), label=label).wait()

    def _meta(self, numel: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(numel, dtype=dtype or working(self._config), device=META)
