"""Reduction of local statistics over ranks: its times, its collectives, and the sums that each rank keeps.

    reduce_every   sent                                                    the averages
    refresh        β·average + (1−β)·window of the slots that refresh now  local, until a refresh sums over the ranks
    step           the window of every unit, at every measurement          global

    reduction        sent with                                             keeps the sum
    all_reduce       one sum of every bucket                               every rank
    reduce_scatter   an uneven all_to_all and a local sum in fp32          the unit's owner; the others start from zero

Both columns of both tables give the same factors: the average is linear in what was measured. After an all_reduce at a
refresh every rank keeps 1/W of the total, so that the ranks' averages still add up to it.

The flat window is cut into a few buckets of whole blocks. With `overlap`, a bucket leaves as soon as backward has
completed its blocks, always in the same order on every rank; the rest is sent in `finish`. Weights, traces and each
rank's vote on the step travel together in one small sum; a rank that has left a layer unused says so there, and only
then a second one follows (`missed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfac_dist.config.schema import DistributionConfig
from kfac_dist.curvature.device_ops import to_device
from kfac_dist.curvature.factors import Unit
from kfac_dist.curvature.statistics import RunningAverages, Span
from kfac_dist.distributed.communicators.base import Communicator, Work
from kfac_dist.distributed.movement.owner_buffer import PendingReduce
from kfac_dist.preconditioner.measure.missed import MissedTerms, shared_terms
from kfac_dist.preconditioner.plan import Plan
from kfac_dist.preconditioner.reduce.buckets import BucketPlan
from kfac_dist.preconditioner.reduce.unit_buffer import UnitBuffer

LABEL = "factors"


@dataclass
class _UnitBucket:
    """Consecutive blocks that are reduced by one collective."""

    span: Span
    waiting: set[str]
    wire: UnitBuffer | None
    sent: Tensor | None = None
    work: Work | PendingReduce | None = None


@dataclass
class _StepReduction:
    """The reduction of one step: buckets in the order in which they leave, spans that stay local, and its blocks."""

    buckets: list[_UnitBucket]
    local: list[Span]
    overlap: bool
    blocks: frozenset[str]
    launched: int = 0
    late: set[str] = field(default_factory=set)


class FactorReduction:
    """Closes each step's window and moves the averages.

    Args:
        averages: This rank's statistics.
        plan: The owner of each unit.
        comm: The ranks that measure.
        config: Options of the distribution.
        label: Its label in the traffic.

    Attributes:
        totals: `[2 + C, units]` weights and traces over all ranks, and weights by class, as of the last reduction of
            each unit.
    """

    def __init__(
        self,
        averages: RunningAverages,
        plan: Plan,
        comm: Communicator,
        config: DistributionConfig,
        *,
        label: str = LABEL,
    ) -> None:
        self.totals = torch.zeros_like(averages.scalars)
        self._averages = averages
        self._plan = plan
        self._comm = comm
        self._label = label
        self._layout = BucketPlan(plan, config, averages.layout, comm.size, averages.working)
        self._overlap = config.overlap and comm.size > 1
        self._current: _StepReduction | None = None
        self._missed = MissedTerms(averages.scalars[1:])
        # On the device: whether a measuring step was taken is known there first.
        self._dirty = torch.zeros((), dtype=torch.bool, device=averages.device)
        self._own = torch.tensor(
            [plan.assignment.owners[unit.name] == comm.rank for unit in plan.units], device=averages.device
        )

    @property
    def blending(self) -> bool:
        """Whether averages are local between refreshes."""
        return self._layout.blending

    # ---- during backward

    def begin(self, slots: tuple[int, ...], measured: tuple[int, ...] | None = None) -> None:
        """Begin a step that measures.

        Args:
            slots: The slots that refresh.
            measured: Those whose blocks are measured, `slots` among them; by default all.
        """
        reduced = self._layout.at(slots, measured)
        units = self._plan.units
        buckets = [_UnitBucket(span, {u.block for u in units[span.units]}, wire) for span, wire in reduced.buckets]
        self._current = _StepReduction(buckets, reduced.local, self._overlap, reduced.blocks)

    def accepts(self, block: str) -> bool:
        """Whether this step measures a block, and still may: once its bucket has left, its statistics are closed."""
        assert self._current is not None
        if block not in self._current.blocks:
            return False
        left = self._current.buckets[: self._current.launched]
        gone = any(unit.block == block for bucket in left for unit in self._plan.units[bucket.span.units])
        if gone:
            self._current.late.add(block)
        return not gone

    @property
    def late(self) -> set[str]:
        """Blocks whose statistics came after their bucket had left."""
        return set() if self._current is None else self._current.late

    def completed(self, block: str) -> None:
        """Mark a block's statistics of this step as complete; send complete buckets, in order."""
        current = self._current
        assert current is not None
        if not current.overlap:
            return
        for bucket in current.buckets:
            bucket.waiting.discard(block)
        while current.launched < len(current.buckets) and not current.buckets[current.launched].waiting:
            self._launch(current.buckets[current.launched])
            current.launched += 1

    # ---- after backward

    def finish(self, taken: Tensor) -> Tensor:
        """Send the remaining buckets, wait, and update the averages if every rank takes the step.

        Args:
            taken: 0-dim bool: whether this rank takes the optimizer step (its gradients are finite).

        Returns:
            The ranks' common answer, 0-dim bool. If it is false, the averages are unchanged.
        """
        current, self._current = self._current, None
        assert current is not None
        for bucket in current.buckets[current.launched :]:
            self._launch(bucket)
        for span in current.local:
            self._averages.close(span)
        if current.buckets:
            taken = self._exchange_scalars([bucket.span for bucket in current.buckets], taken)
        self._note_missed(current.local, taken)
        for span in current.local:
            self._averages.advance(span, taken)
        if self._comm.size == 1:
            self.totals.copy_(self._averages.scalars)
        # A refresh looks at the answer anyway; averages that are global at every step must move without asking.
        proceed = not self.blending or not current.buckets or bool(taken)
        for bucket in current.buckets:
            values = self._collect(bucket)
            if proceed:
                self._commit(bucket.span, values, taken)
        self._averages.release()
        self._averages.end_step()
        self._averages.count_dropped(taken)
        self._dirty |= taken
        return taken

    def _launch(self, bucket: _UnitBucket) -> None:
        averages, span = self._averages, bucket.span
        averages.close(span)
        if self.blending:
            averages.blend(span, self._scale)
        window = averages.window
        bucket.sent = window[span.values]
        if bucket.wire is not None:
            bucket.sent = bucket.wire.buffer(self._layout.dtype, averages.device)
            for unit in bucket.wire.units:
                bucket.wire.put(bucket.sent, unit, averages.layout.view(window, unit))
        bucket.work = self._layout.send(self._comm, bucket.sent, bucket.wire, label=self._label)

    def _exchange_scalars(self, spans: list[Span], taken: Tensor) -> Tensor:
        """Sum the weights and traces of sent units (local ones must not be touched), and the votes."""
        scalars = [self._averages.window_scalars[:, span.units] for span in spans]
        extra = self._prepare_missed(spans)
        vote = (~taken).to(scalars[0].dtype).view(1)
        message = torch.cat([*(part.flatten() for part in scalars), extra.flatten(), vote])
        self._comm.all_reduce(message, label=self._label).wait()
        *totals, extra_total, votes = torch.split(message, [*(part.numel() for part in scalars), extra.numel(), 1])
        for part, total in zip(scalars, totals, strict=True):
            part.copy_(total.view_as(part))
        taken = votes[0] == 0
        self._share_missed(spans, extra_total.view_as(extra), taken)
        return taken

    # ---- terms that layers have missed, see `missed`

    def _note_missed(self, spans: list[Span], taken: Tensor) -> None:
        """Count the missed terms of layers that this rank used; keep those of others until a reduction."""
        found = [(span, self._averages.missed(span)) for span in spans]
        for span, missed in found:
            if missed is not None:
                self._averages.add_missed(span, missed.terms * self._mask(missed.used))
        if self._comm.size > 1:
            self._missed.note(found, self._averages.decay, taken)

    def _prepare_missed(self, spans: list[Span]) -> Tensor:
        """Return the numbers sent with the scalars: whether a layer was unused, or at every step which, and its terms.

        A refresh looks at the votes anyway; averages that are global at every step must move without asking.
        """
        averages = self._averages
        found = [(span, averages.missed(span)) for span in spans]
        rate = (1 - averages.decay) * self._scale if self.blending else 1.0
        for span, missed in found:
            if missed is not None:
                averages.add_missed(span, missed.terms * self._mask(missed.used) * rate)
        self._missed.note(found, averages.decay if self.blending else 0.0, torch.ones((), device=averages.device))
        if self.blending:
            return averages.scalars.new_full((1,), float(self._missed.irregular(spans)))
        message = self._missed.message(spans)
        self._missed.reduced(spans)
        return message

    def _share_missed(self, spans: list[Span], total: Tensor, taken: Tensor) -> None:
        if not self.blending:
            self._add_missed(spans, shared_terms(total))
        elif not bool(taken):
            self._missed.drop_last()
        else:
            if bool(total):
                self._add_missed(spans, self._exchange_missed(spans) * self._scale)
            self._missed.reduced(spans)

    def _exchange_missed(self, spans: list[Span]) -> Tensor:
        message = self._missed.message(spans)
        self._comm.all_reduce(message, label=self._label).wait()
        return shared_terms(message)

    def _add_missed(self, spans: list[Span], terms: Tensor) -> None:
        sizes = [span.last - span.first for span in spans]
        for span, own in zip(spans, torch.split(terms, sizes, dim=1), strict=True):
            self._averages.add_missed(span, own)

    def _mask(self, used: tuple[bool, ...]) -> Tensor:
        return to_device(torch.tensor(used), self._averages.device)

    @property
    def _scale(self) -> float:
        """Share of the total that each rank keeps after a reduction of blended averages."""
        return 1.0 if self._layout.scattering else 1 / self._comm.size

    def _collect(self, bucket: _UnitBucket) -> Tensor | None:
        """Wait for a bucket; the window then holds the sums, or the owned units' sums are returned."""
        assert bucket.work is not None
        received = bucket.work.wait()
        averages, wire = self._averages, bucket.wire
        if wire is None:
            return None
        assert bucket.sent is not None
        if received is None:
            for unit in wire.units:
                values = wire.get(wire.layout.view(bucket.sent, unit.name), unit)
                averages.layout.view(averages.window, unit).copy_(values.view(unit.shape))
            return None
        rank, owners = self._comm.rank, self._plan.assignment.owners
        own = [
            wire.get(wire.layout.view_in_part(received, unit.name, rank), unit)
            for unit in wire.units
            if owners[unit.name] == rank
        ]
        return torch.cat(own) if own else received

    def _commit(self, span: Span, values: Tensor | None, taken: Tensor) -> None:
        averages = self._averages
        if not self.blending:
            averages.advance(span, taken, values)
            self.totals[:, span.units] = averages.scalars[:, span.units]
        elif values is None:
            averages.adopt(span)
            self.totals[:, span.units] = averages.scalars[:, span.units]
        else:
            self._keep_owned(span, values)

    def _keep_owned(self, span: Span, values: Tensor) -> None:
        """After a scatter of blended averages: the owner has the total, the others start from zero."""
        averages = self._averages
        totals = averages.window_scalars[:, span.units]
        self.totals[:, span.units] = totals
        averages.scalars[:, span.units] = totals * self._own[span.units]
        offset = 0
        for unit in averages.layout.units[span.units]:
            sums = averages.sums(unit)
            if self._plan.assignment.owners[unit.name] == self._comm.rank:
                sums.copy_(values[offset : offset + unit.numel].view(unit.shape))
                offset += unit.numel
            else:
                sums.zero_()

    # ---- checkpoints

    @property
    def shares(self) -> int:
        """Number of ranks whose averages add up to the total, once they are consolidated."""
        return self._comm.size if self.blending and not self._layout.scattering else 1

    def keeps(self, unit: Unit) -> bool:
        """Whether this rank's consolidated sum of a unit is the global one."""
        return not self._layout.scattering or self._plan.assignment.owners[unit.name] == self._comm.rank

    def consolidate(self) -> None:
        """Add up averages that ranks have kept to themselves since the last refresh; collective."""
        if not self.blending or self._comm.size == 1 or not bool(self._dirty):
            return
        averages = self._averages
        spans = [averages.layout.span(0, len(self._plan.units))]
        irregular = averages.scalars.new_full((1,), float(self._missed.irregular(spans)))
        averages.average.div_(self.shares)
        self._comm.all_reduce(averages.average, label=self._label).wait()
        message = torch.cat([averages.scalars.flatten(), irregular])
        self._comm.all_reduce(message, label=self._label).wait()
        scalars = message[:-1].view_as(averages.scalars)
        if bool(message[-1]):
            terms = self._exchange_missed(spans)
            scalars[0] += terms[0]
            scalars[2:] += terms[1:]
        averages.scalars.copy_(scalars / self.shares)
        self._missed.clear()
        self.totals.copy_(averages.scalars)
        if self._layout.scattering:
            averages.scalars.mul_(self._own)
            for unit in self._plan.units:
                if not self.keeps(unit):
                    averages.sums(unit).zero_()
        self._dirty.zero_()

    def consolidated_scalars(self, unit: Unit) -> Tensor:
        """Return the weight and the trace that belong to the consolidated sum of a unit, on every rank."""
        source = self.totals if self.blending and self._layout.scattering else self._averages.scalars
        return source[:, self._averages.layout.index(unit)]

    def restore(self, unit: Unit, total: Tensor | None, scalars: Tensor, scale: float) -> None:
        """Take a unit's consolidated sum (None where another rank keeps it) and its weight and trace."""
        averages = self._averages
        index = averages.layout.index(unit)
        self.totals[:, index] = scalars.to(averages.device) * scale
        local = self.keeps(unit) or not self.blending
        averages.scalars[:, index] = self.totals[:, index] if local else 0.0
        if unit in averages.held:
            if self.keeps(unit) and total is not None:
                averages.sums(unit).copy_(total.to(averages.device) * scale)
            else:
                averages.sums(unit).zero_()
        self._dirty.zero_()
        self._missed.clear()

    def local(self) -> dict[str, Tensor]:
        """Return copies of this rank's own statistics, not consolidated."""
        return {name: values.clone() for name, values in self._local().items()} | {"missed": self._missed.state()}

    def restore_local(self, values: Mapping[str, Tensor]) -> None:
        """Load the result of `local` on this rank."""
        for name, own in self._local().items():
            own.copy_(values[name])
        self._missed.clear()
        if "missed" in values:  # of an older checkpoint it isn't known
            self._missed.load_state(values["missed"])

    def _local(self) -> dict[str, Tensor]:
        averages = self._averages
        return {
            "average": averages.average,
            "scalars": averages.scalars,
            "totals": self.totals,
            "dirty": self._dirty,
        }
