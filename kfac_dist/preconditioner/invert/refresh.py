"""Refreshing inverses: owners solve their units, every rank of the block's column receives them.

    factor S/w of every owned unit that is due ── damp ── solve in batches of equal size ──┐
    one flat buffer, a segment an owner  ◀─────────────────────────────────────────────────┘
    shared down the column ── load into the groups

With an inverse lag, training continues with the last inverses meanwhile. The steps are fixed, the same on every rank:

    step          t                                    t + lag/2                  t + lag
    side thread   solve from copies of the factors ─────┐
    collectives                                         └─ shared, in flight ── load

A unit that can't be solved is sent unchanged: the last good inverse stays in use, without further communication.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.config.schema import Solver
from kfac_dist.curvature.factors import Unit
from kfac_dist.curvature.inverses.payloads import Payloads
from kfac_dist.curvature.inverses.solvers import is_symmetric, payload_numel
from kfac_dist.curvature.statistics import RunningAverages
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.movement.owner_buffer import PendingBroadcast, share_segments
from kfac_dist.preconditioner.invert.background import BackgroundSolver, BackgroundTask
from kfac_dist.preconditioner.invert.class_conditional import Combined, combine
from kfac_dist.preconditioner.invert.ekfac import SecondMoments
from kfac_dist.preconditioner.invert.inspection import Inspector
from kfac_dist.preconditioner.invert.unit_solver import SolveInput, SolveResult, UnitSolver
from kfac_dist.preconditioner.plan import Plan
from kfac_dist.preconditioner.reduce.unit_buffer import UnitBuffer

LABEL = "inverses"
# Factors that a warning names.
_NAMED = 3


@dataclass(frozen=True)
class PendingSolve:
    """Units that are being solved beside training.

    Attributes:
        wire: Format of the sent payloads.
        given: The inputs of their solves.
        job: The work.
        begun: Step at which it began.
        send: Step at which the payloads are sent.
    """

    wire: UnitBuffer
    given: SolveInput
    job: BackgroundTask[SolveResult]
    begun: int
    send: int


@dataclass(eq=False)
class PendingRefresh:
    """Payloads on their way: in use from step `due` on.

    Attributes:
        due: The step.
        units: The units.
        payloads: The received payloads; None before.
        solving: The solves under way.
        travelling: Layout, buffer and collectives of payloads under way.
        new: Whether no step has passed since it was sent.
    """

    due: int
    units: Sequence[Unit]
    payloads: list[tuple[Unit, Tensor]] | None = None
    solving: PendingSolve | None = None
    travelling: tuple[UnitBuffer, Tensor, PendingBroadcast] | None = None
    new: bool = False


class Refresh:
    """Solves this rank's units and keeps the groups' payloads up to date.

    Args:
        averages: The statistics.
        plan: The owner of each unit.
        holders: Holder of each unit's payload here, by unit name: the groups that this rank preconditions with, and
            for EKFAC bases of other columns' blocks.
        sharing: The ranks that share inverses with this one: its column, or for EKFAC all.
        rank: This rank.
        solver: The inversion of factors.
        pack: Whether symmetric inverses travel as triangles.
        moments: EKFAC's, which follow their bases.

    Attributes:
        refreshes: Refreshes that this rank took part in.
        failures: Units that this rank could not solve, and left as they were.
        raised: Units that weren't positive definite with their damping, so that more was added.
        pending: Payloads on their way.
        inspector: Reads spectra of the units solved here, on request.
        asymmetries: `[2, units]`: how far this rank's factors, and their inverses, were from symmetric when they were
            last solved and before anything made them so; −1 where nothing was measured. Eigenbases have no such number,
            and no more have factors that a packed wire has mirrored.
        holders: Holder of each unit's payload here.
        beside: Whether units are solved beside training while there is a lag.
    """

    beside = True

    def __init__(
        self,
        averages: RunningAverages,
        plan: Plan,
        holders: Mapping[str, Payloads],
        sharing: Communicator,
        rank: int,
        solver: Solver,
        *,
        pack: bool,
        moments: SecondMoments | None,
    ) -> None:
        self.refreshes = 0
        self.failures = 0
        self.raised = 0
        self.pending: list[PendingRefresh] = []
        self.inspector = Inspector(rank)
        self.asymmetries = torch.full((2, len(plan.units)), -1.0, device=averages.device, dtype=torch.float32)
        self.holders = holders
        self._averages = averages
        self._plan = plan
        self._sharing = sharing
        self._rank = rank
        self._solver = solver
        self._pack = pack
        self._moments = moments
        self._wires: dict[tuple[int, ...], UnitBuffer] = {}
        self._side = BackgroundSolver(averages.device)
        mirrored = pack and plan.grid.world_size > 1
        self._solving = UnitSolver(averages, plan, solver, mirrored=mirrored)

    def start(self, slots: tuple[int, ...], totals: Tensor, damping: float, step: int, lag: int = 0) -> None:
        """Solve this rank's units of some slots and send them on their way.

        Args:
            slots: The slots that are due.
            totals: `[2 + C, units]` weights and traces over all ranks, and weights by class.
            damping: λ.
            step: This step.
            lag: Steps from this one to the first that uses the new inverses.
        """
        if slots not in self._wires:
            # The sharing ranks hold them: the units of the own column's blocks, or all.
            column = None if self._sharing.size == self._plan.grid.world_size else self._plan.grid.column_of(self._rank)
            self._wires[slots] = payload_wire(self._plan, slots, column, self._solver, pack=self._pack)
        wire = self._wires[slots]
        self._bring_forward({unit.name for unit in wire.units})
        own = [unit for unit in wire.units if self._plan.assignment.owners[unit.name] == self._rank]
        combined = combine(wire.units, own, self._averages, totals, self._sharing)
        self.refreshes += 1
        refreshed = PendingRefresh(step + lag, wire.units)
        if lag and self.beside:
            given = self._given(own, totals.clone(), combined, damping, copied=True)
            job = self._side.start(lambda: self._solving.solve(given), [*given.sums, *given.previous, given.totals])
            refreshed.solving = PendingSolve(wire, given, job, step, step + -(-lag // 2))
        else:
            self._send(refreshed, wire, own, self._solve_now(own, totals, combined, damping))
        self.pending.append(refreshed)

    def unmeasured(self, slots: tuple[int, ...], totals: Tensor) -> set[int]:
        """Return those of the slots that have a unit which no rank has measured yet."""
        weights = totals[0].tolist()
        empty = {unit.block for unit, weight in zip(self._plan.units, weights, strict=True) if weight <= 0}
        return {self._plan.blocks[block].slot for block in empty} & set(slots)

    def never_measured(self, slots: tuple[int, ...], totals: Tensor) -> list[str]:
        """Return the blocks of these slots that no rank has measured by the last reduction; waits for the device."""
        weights = totals[0].tolist()
        empty = {unit.block for unit, weight in zip(self._plan.units, weights, strict=True) if weight <= 0}
        return [name for name, block in self._plan.blocks.items() if name in empty and block.slot in slots]

    def activate(self, step: int) -> None:
        """Send finished solves, load due payloads, and advance pending transfers."""
        for refreshed in self.pending:
            if refreshed.solving is not None and refreshed.solving.send <= step:
                self._conclude(refreshed, refreshed.solving)
        due = [refreshed for refreshed in self.pending if refreshed.due <= step]
        self.pending = [refreshed for refreshed in self.pending if refreshed.due > step]
        self._use([pair for refreshed in due for pair in self.arrived(refreshed)])
        for refreshed in self.pending:
            if refreshed.travelling is not None and not refreshed.new:
                refreshed.travelling[2].start_second_phase()
            refreshed.new = False

    def arrived(self, refreshed: PendingRefresh) -> list[tuple[Unit, Tensor]]:
        """Wait for payloads on their way, and return them; collective if they are still being solved."""
        if refreshed.solving is not None:
            self._conclude(refreshed, refreshed.solving)
        if refreshed.travelling is not None:
            wire, buffer, work = refreshed.travelling
            work.wait()
            refreshed.payloads = [(unit, wire.get(wire.layout.view(buffer, unit.name), unit)) for unit in wire.units]
            refreshed.travelling = None
        assert refreshed.payloads is not None
        return refreshed.payloads

    def payload_numel(self, unit: Unit) -> int:
        """Return the number of values in a unit's payload."""
        return payload_numel(unit, self._solver)

    def take_over(self, previous: Refresh) -> None:
        """Take over the counters and requested readings of the one that this replaces."""
        self.refreshes, self.failures, self.raised = previous.refreshes, previous.failures, previous.raised
        self.inspector = previous.inspector

    def close(self) -> None:
        """End the background thread."""
        self._side.close()

    def _bring_forward(self, names: set[str]) -> None:
        """Load pending payloads of units that are solved again now; collective if there are any.

        So no solve is lost, each unit has at most one pending payload, and the new solve starts from the last.
        Payloads of other units in the same transfer stay due in their step.
        """
        for other in self.pending:
            if names.isdisjoint(unit.name for unit in other.units):
                continue
            arrived = self.arrived(other)
            self._use([(unit, payload) for unit, payload in arrived if unit.name in names])
            other.payloads = [(unit, payload) for unit, payload in arrived if unit.name not in names]
            other.units = [unit for unit, _ in other.payloads]
        self.pending = [other for other in self.pending if other.units]

    def _use(self, arrived: Sequence[tuple[Unit, Tensor]]) -> None:
        """Precondition with payloads from now on, as far as this rank does; collective for EKFAC if there are any."""
        own = [(unit, payload) for unit, payload in arrived if unit.name in self.holders]
        if self._moments is None:
            for unit, payload in own:
                self.holders[unit.name].load(unit, payload)
        elif arrived:
            self._moments.load(own, self.holders)
            self._moments.publish()

    def _conclude(self, refreshed: PendingRefresh, solving: PendingSolve) -> None:
        """Send the results of the background thread."""
        outcome = solving.job.result(lambda done: done.tensors)
        refreshed.solving = None
        self._take_note(outcome)
        self.inspector.read(solving.begun)
        self._send(refreshed, solving.wire, solving.given.units, outcome.payloads)

    def _send(self, refreshed: PendingRefresh, wire: UnitBuffer, own: Sequence[Unit], payloads: list[Tensor]) -> None:
        solved = list(zip(own, payloads, strict=True))
        if self._sharing.size == 1:
            refreshed.payloads = solved
            return
        buffer = wire.sharing_buffer(self._averages.working, self._averages.device)
        for unit, payload in solved:
            wire.put(buffer, unit, payload)
        refreshed.new = True
        refreshed.travelling = (wire, buffer, share_segments(self._sharing, buffer, wire.layout, label=LABEL))

    def _solve_now(
        self, units: Sequence[Unit], totals: Tensor, combined: Mapping[str, Combined], damping: float
    ) -> list[Tensor]:
        outcome = self._solving.solve(self._given(units, totals, combined, damping, copied=False))
        self._take_note(outcome)
        return outcome.payloads

    def _given(
        self,
        units: Sequence[Unit],
        totals: Tensor,
        combined: Mapping[str, Combined],
        damping: float,
        *,
        copied: bool,
    ) -> SolveInput:
        """Gather the inputs of the solves; copies of the statistics if training continues meanwhile."""
        sums = [self._averages.sums(unit) for unit in units]
        previous = [self.holders[unit.name].payload(unit) for unit in units]
        return SolveInput(units, [s.clone() for s in sums] if copied else sums, previous, totals, combined, damping)

    def _take_note(self, outcome: SolveResult) -> None:
        self.failures += outcome.failures
        self._say_raised(outcome.raised)
        self.inspector.note(outcome.seconds, outcome.tasks)
        for name, values in outcome.asymmetries.items():
            self._note_asymmetry(name, *values)

    def _say_raised(self, raised: Mapping[str, str]) -> None:
        """Count units whose damping didn't do, and warn of the first ones."""
        if raised and not self.raised:
            shown = ", ".join(f"{name} ({how})" for name, how in list(raised.items())[:_NAMED])
            more = f" and {len(raised) - _NAMED} more" if len(raised) > _NAMED else ""
            warnings.warn(
                f"K-FAC factors are not positive definite with their damping: {shown}{more}. From now on "
                "`raised_dampings` in the metrics counts them. Raise kfac.inversion.damping; keep factors in float32 "
                "or float64 (kfac.curvature.factor_dtype)",
                stacklevel=3,
            )
        self.raised += len(raised)

    def _note_asymmetry(self, name: str, *values: Tensor | None) -> None:
        """Note how far a unit's factor, and its inverse, are from symmetric."""
        for row, value in enumerate(values):
            if value is not None:
                self.asymmetries[row, self._averages.layout.index_of(name)] = value


def payload_wire(plan: Plan, slots: Sequence[int], column: int | None, solver: Solver, *, pack: bool) -> UnitBuffer:
    """Return the layout in which payloads travel among the ranks that share them.

    Args:
        plan: The owner of each unit.
        slots: The slots to refresh.
        column: The column whose ranks share; None for all ranks.
        solver: The solver of the payloads.
        pack: Whether symmetric inverses travel as triangles.
    """
    grid, owners = plan.grid, plan.assignment.owners
    units = [
        unit
        for unit in plan.units
        if plan.blocks[unit.block].slot in slots and column in (None, plan.blocks[unit.block].column)
    ]
    return UnitBuffer(
        units,
        [owners[unit.name] if column is None else grid.row_of(owners[unit.name]) for unit in units],
        grid.world_size if column is None else grid.group_size,
        numel=lambda unit: payload_numel(unit, solver),
        packed=lambda unit: pack and is_symmetric(unit, solver),
    )
