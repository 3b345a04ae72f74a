"""The parts of one K-FAC, and their course from step to step.

    begin             which layers the coming step measures, and which inverses it refreshes
    update_curvature  close the statistics that backward measured ── refresh due units ── use received inverses
    advance           the next step begins

If the model has changed, or a block was judged wrong, blocks, plan and parts are made again, and take over the state.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfac_dist.config.schema import KFACConfig, OnMismatch, Structure
from kfac_dist.curvature.block_tridiagonal_units import find_all
from kfac_dist.curvature.blocks import Coverage
from kfac_dist.curvature.capture.arbiter import Arbiter, Mismatch
from kfac_dist.curvature.capture.shared_outputs import Samples
from kfac_dist.curvature.statistics import RunningAverages
from kfac_dist.distributed.communicators.agreement import agree_on_plan, caught, fail_together
from kfac_dist.engines import Engine
from kfac_dist.errors import ConfigError, ModelError
from kfac_dist.precision import settled
from kfac_dist.preconditioner import state
from kfac_dist.preconditioner.invert.refresh_queue import RefreshQueue
from kfac_dist.preconditioner.invert.refresh_schedule import RefreshSchedule
from kfac_dist.preconditioner.measure.loss_terms import TermCounter
from kfac_dist.preconditioner.parts import Loop, Parts, assemble, device_of, make_plan
from kfac_dist.preconditioner.phases import Phase, PhaseTimer
from kfac_dist.preconditioner.plan import Plan
from kfac_dist.preconditioner.renewal import (
    FOLLOWS,
    ParameterWatch,
    carry,
    idle_message,
    listed,
    message_of,
    same_blocks,
    without,
)


class Core:
    """Blocks, plan and parts of one K-FAC on this rank; collective to construct.

    Args:
        engine: The model.
        asked: The configuration, in which precisions may be `auto`.
        loop: Objects of the training loop besides the model.

    Attributes:
        engine: The model.
        config: The configuration, with every precision settled.
        coverage: The blocks, and why other parameters have none.
        parts: The parts made for them.
        communicator: The ranks.
        steps: Steps taken.
        discarded: Steps forgotten by `discard`.
        measured: Steps that were measured.
        ended: Whether a step has ended since this was last unset.
        names_dropped: Whether a refresh is to warn, once, of layers whose statistics were dropped.
        phases: Times of the parts of steps.
    """

    def __init__(self, engine: Engine, asked: KFACConfig, loop: Loop) -> None:
        self.engine = engine
        self.config = self._asked = asked
        self._loop = loop
        self.steps = 0
        self.discarded = 0
        self.measured = 0
        self.ended = False
        # Step whose own statistics every inverse was solved from, all in one; None if its refreshes were of some.
        self._solved_whole: int | None = None
        self._counter = TermCounter(asked.curvature.loss_terms)
        self._check_whole()

        self._mismatched: dict[str, Mismatch] = {}
        self._named_idle: set[str] = set()
        self._newly_covered: set[str] = set()  # perhaps no pass has reached them since
        self.names_dropped = True
        self.coverage = self._find()
        self._settle()
        distribution = self.config.distribution
        self.communicator = engine.communicator(distribution.timeout_seconds, distribution.backend)
        self._agree_on_blocks()
        self._device = device_of(self.coverage)
        self.phases = PhaseTimer(self._device)
        plan = self._plan()
        self._parameters = ParameterWatch(engine, self.communicator)
        self.parts = self._build(plan, RefreshSchedule.of(self.config), Arbiter(self.coverage.blocks))
        self.begin()

    @property
    def damping(self) -> float:
        """λ of the current step, with the weight decay that is part of the loss."""
        return self.parts.damping.at(self.steps) + self.config.update.l2

    # ---- a step

    def begin(self) -> None:
        """Prepare the hooks for the step that comes next."""
        parts, curvature = self.parts, self.config.curvature
        queue, schedule = parts.queue, parts.queue.schedule
        queue.begin(self.steps)
        parts.measurement.begin(self.steps, factors=bool(queue.measured), moments=schedule.rescales(self.steps))
        if curvature.decay_ramp and parts.moments is not None:
            parts.moments.averages.decay = schedule.moments_decay(self.steps, curvature.decay)
        if queue.measured:
            if curvature.decay_ramp:
                parts.averages.decay = schedule.decay(self.steps, curvature.decay)
            parts.reduction.begin(queue.slots, queue.measured)

    def update_curvature(self) -> None:
        """Close the statistics that backward measured, and refresh due units."""
        if self.parts.measurement.active:
            self._measure_and_refresh()
        with self.phases(Phase.SHARING):
            self.parts.refresh.activate(self.steps)

    def advance(self) -> None:
        """End the step."""
        self.steps += 1
        self.ended = True
        self.begin()

    def discard(self) -> None:
        """Forget the measurements of this step."""
        self.discarded += 1
        if self.parts.measurement.active:
            self.parts.measurement.discard()
            self.parts.queue.skip()
            self.begin()

    @property
    def can_refresh_again(self) -> bool:
        """Whether this step has refreshed every inverse from its own statistics; a step that is skipped hasn't."""
        return self._solved_whole == self.steps

    def refresh_again(self) -> None:
        """Solve all inverses anew from the same statistics with the present damping, for use at once; collective."""
        parts = self.parts
        with self.phases(Phase.INVERSION):
            parts.refresh.start(parts.queue.every_slot, parts.reduction.totals, self.damping, self.steps)
        with self.phases(Phase.SHARING):
            parts.refresh.activate(self.steps)

    def remove(self) -> None:
        """Take hooks and process groups off."""
        self.parts.measurement.remove()
        self.parts.refresh.close()
        self.communicator.close()

    # ---- state

    def state(self) -> dict[str, Any]:
        """Return the whole state, the same on every rank; collective."""
        return state.gather(self.parts, self.steps)

    def load(self, values: Mapping[str, Any]) -> None:
        """Take a whole state, also one that left out some blocks; collective.

        Raises:
            CheckpointError: It doesn't fit on some rank.
        """
        reasons = state.mismatched(values)
        state.agree_to_load(self.parts, values, self._lost_with(reasons))
        self.leave_out(reasons)
        self._take(values)
        self.begin()

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Leave some blocks out, as if they had been judged wrong; collective."""
        found = self._as_mismatches(reasons)
        if found:
            self._mismatched |= {mismatch.block: mismatch for mismatch in found}
            self._renew(without(self.coverage, found), judged=self.parts.measurement.judged)
            self.begin()

    def _take(self, values: Mapping[str, Any]) -> None:
        parts = self.parts
        self.steps = state.load(parts, values)
        self._solved_whole = None
        parts.queue.overdue = state.marked(parts, values, "overdue")
        parts.queue.refreshed = state.marked(parts, values, "refreshed")
        parts.measurement.load_places(state.places(parts, values))
        for averages in self.averages():
            averages.discard()

    def averages(self) -> list[RunningAverages]:
        """Return the running averages of factors, and of EKFAC's second moments."""
        return [self.parts.averages, *([] if self.parts.moments is None else [self.parts.moments.averages])]

    def dropped(self) -> Tensor:
        """Return how often this rank has dropped statistics that weren't finite, 0-dim, on the device."""
        zero = torch.zeros((), dtype=torch.int64, device=self._device)
        return sum((averages.dropped for averages in self.averages()), zero)

    def not_finite(self) -> list[str]:
        """Return the blocks whose statistics this rank has found not to be finite; waits for the device."""
        return list(
            dict.fromkeys(
                unit.block
                for averages in self.averages()
                for unit, times in zip(averages.layout.units, averages.not_finite.tolist(), strict=True)
                if times
            )
        )

    # ---- inside of a step

    def _measure_and_refresh(self) -> None:
        """Close this step's statistics and, where slots are due, refresh their inverses."""
        with self.phases(Phase.REDUCTION):
            finite = self.engine.finite_everywhere(self.communicator)
            taken = self.parts.measurement.finish(finite, refreshes=bool(self.parts.queue.slots))
        self.measured += 1
        if self.parts.queue.schedule.begins_round(self.steps):
            self.parts.uncovered.measure(self.parts.measurement.terms, taken)
        self._follow_model()
        parts, queue = self.parts, self.parts.queue
        slots, totals = queue.slots, parts.reduction.totals
        if not slots:
            return
        if not bool(taken):  # the step will be skipped
            queue.skip()
            return
        lag = queue.take(self.steps, parts.refresh.unmeasured(slots, totals) if queue.first else ())
        parts.damping.adaptation.judge()
        with self.phases(Phase.INVERSION):
            parts.refresh.start(slots, totals, self.damping, self.steps, lag)
        self._solved_whole = self.steps if slots == queue.every_slot else None
        parts.refresh.inspector.read(self.steps)
        self._name_idle()
        self._name_dropped()

    def _follow_model(self) -> None:
        """Cover the model anew where it has changed, or where the arbiter has found a block wrong; collective."""
        mismatches = self.parts.measurement.mismatches
        changed = self._parameters.changed(agree=bool(self.parts.queue.slots), device=self._device)
        if mismatches and (self.config.curvature.on_mismatch is OnMismatch.ERROR or self._is_chain):
            raise ModelError(message_of(mismatches))
        if changed:
            said = self._parameters.message()
            with caught(lambda error: ModelError(f"{said}; that failed: {error}")) as failed:
                changed = self.engine.take_parameters()
            fail_together(self.communicator, failed)
            self._parameters.take()
            warnings.warn(f"{said}: {FOLLOWS[changed]}", stacklevel=6)
        if mismatches:
            warnings.warn(message_of(mismatches), stacklevel=6)
            self._mismatched |= {mismatch.block: mismatch for mismatch in mismatches}
        if changed:
            fresh = self._find()
            same = same_blocks(fresh.blocks, self.coverage.blocks)
            self._mismatched = {name: found for name, found in self._mismatched.items() if name in same or mismatches}
            self._renew(without(fresh, self._mismatched.values()), judged=set())
        elif mismatches:
            self._renew(without(self.coverage, mismatches), judged=self.parts.measurement.judged)

    def _renew(self, coverage: Coverage, *, judged: set[str]) -> None:
        """Plan and build for other blocks; units that remain keep their state by name; collective."""
        before, parts, averages = self.state(), self.parts, self.averages()
        self._loop = replace(self._loop, check_scale=parts.measurement.checks_scale)
        parts.measurement.remove()
        parts.refresh.close()
        self._newly_covered = {b.name for b in coverage.blocks} - {b.name for b in self.coverage.blocks}
        self.coverage = coverage
        self._settle()
        self._agree_on_blocks()
        self.parts = self._build(self._plan(), parts.queue.schedule, Arbiter(coverage.blocks, judged))
        self._take(carry(before, self.state()))
        self.parts.refresh.take_over(parts.refresh)
        for new, old in zip(self.averages(), averages, strict=False):  # the last block with moments may have gone
            new.take_over(old)
        self.parts.queue.begin(self.steps)

    def _name_dropped(self) -> None:
        """Name, once, the layers whose statistics this rank has dropped; at a refresh, which waits anyway."""
        if not self.names_dropped or not bool(self.dropped()):
            return
        self.names_dropped = False
        warnings.warn(
            f"statistics of {listed(self.not_finite())} were not finite on this rank, and were dropped together with "
            "those that travel with them: squares exceed float32. Scale their inputs or the loss, or leave them out "
            "by kfac.curvature.exclude",
            stacklevel=6,
        )

    def _name_idle(self) -> None:
        """Name, once, the blocks whose refresh is due and that no backward pass has reached, on any rank."""
        parts, slots = self.parts, self.parts.queue.slots
        # Named already, or measured from the next step on.
        shared = {name for name, how in parts.measurement.samples().items() if how not in (0, Samples.OWN)}
        found = parts.refresh.never_measured(slots, parts.reduction.totals)
        idle = [name for name in found if name not in shared]
        others = [name for name in self.coverage.idle if parts.plan.blocks[name].slot not in slots]
        self.coverage = replace(self.coverage, idle=(*others, *idle))
        names = [name for name in idle if name not in self._named_idle | self._newly_covered]
        self._newly_covered = set()
        self._named_idle |= set(names)
        if names:
            warnings.warn(idle_message(names), stacklevel=6)

    def _as_mismatches(self, reasons: Mapping[str, str]) -> list[Mismatch]:
        known = {block.name for block in self.coverage.blocks}
        return [Mismatch(name, math.inf, math.nan, why) for name, why in reasons.items() if name in known]

    def _lost_with(self, reasons: Mapping[str, str]) -> set[str]:
        """Return the blocks that must be left out with others."""
        kept = without(self.coverage, self._as_mismatches(reasons)).blocks
        return {block.name for block in self.coverage.blocks} - {block.name for block in kept}

    # ---- construction

    def _find(self) -> Coverage:
        with self.engine.whole_shapes():
            return find_all(self.engine.module, self.config)

    def _settle(self) -> None:
        """Let every precision that is `auto` follow the covered layers."""
        self.config = settled(self._asked, (p for block in self.coverage.blocks for p in block.parameters.values()))

    def _agree_on_blocks(self) -> None:
        """Compare the ranks' blocks before anything can fail on one rank alone: with other layers, or with none."""
        agree_on_plan(self.communicator, [(block.name, block.describe()) for block in self.coverage.blocks])

    def _plan(self) -> Plan:
        return make_plan(self.engine, self.coverage.blocks, self.config, self.communicator, self._device)

    def _build(self, plan: Plan, schedule: RefreshSchedule, arbiter: Arbiter) -> Parts:
        return assemble(
            self.engine,
            self.coverage,
            self.config,
            self._loop,
            self.communicator,
            plan,
            self._device,
            queue=RefreshQueue(schedule, plan),
            phases=self.phases,
            counter=self._counter,
            arbiter=arbiter,
        )

    @property
    def _is_chain(self) -> bool:
        return self.config.inversion.structure is Structure.BLOCK_TRIDIAGONAL

    def _check_whole(self) -> None:
        if self.engine.sharded and self._is_chain:
            raise ConfigError(
                "kfac.inversion.structure: block_tridiagonal needs every gradient whole on every rank: train under "
                "DDP, or set it to block_diagonal"
            )
