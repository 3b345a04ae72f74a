"""Refreshing inverses: owners solve their units, every rank of the block's column receives them.

    factor S/w of every owned unit that is due ── damp ── solve in batches of equal size ──┐
    one flat buffer, a segment an owner  ◀─────────────────────────────────────────────────┘
    shared down the column (in flight for `inverse_lag` steps) ── load into the groups

A unit that can't be solved is sent as it was: the last good inverse stays, and no rank has to be told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.config.schema import Solver
from kfac_dist.curvature.factors import FactorKind, Side, Unit
from kfac_dist.curvature.payloads import Payloads
from kfac_dist.curvature.solvers import Task, is_eigen, is_symmetric, payload_numel, solve, tikhonov
from kfac_dist.curvature.statistics import RunningAverages
from kfac_dist.distributed.communicator import Communicator
from kfac_dist.distributed.segments import Sharing, share_segments
from kfac_dist.preconditioner.class_combination import Combined, combine
from kfac_dist.preconditioner.inspection import Inspector
from kfac_dist.preconditioner.moments import Moments
from kfac_dist.preconditioner.plan import Plan
from kfac_dist.preconditioner.wire import UnitWire

LABEL = "inverses"


@dataclass
class Refreshed:
    """Payloads on their way: in use from step `due` on.

    Attributes:
        due: The step.
        payloads: What has arrived; None while it travels.
        travelling: Layout, buffer and collectives of what has not.
        new: Whether no step has passed since it was sent.
    """

    due: int
    payloads: list[tuple[Unit, Tensor]] | None
    travelling: tuple[UnitWire, Tensor, Sharing] | None = None
    new: bool = True

    @property
    def names(self) -> set[str]:
        """Whose payloads they are, by unit."""
        units = self.travelling[0].units if self.travelling is not None else [unit for unit, _ in self.payloads or ()]
        return {unit.name for unit in units}


class Refresh:
    """Solves what this rank owns and keeps the groups' payloads up to date.

    Args:
        averages: The statistics.
        plan: Who owns what.
        holders: Who holds each unit's payload here, by unit name: the groups that this rank preconditions with, and
            for EKFAC bases of other columns' blocks.
        sharing: The ranks that share inverses with this one: its column, or for EKFAC all.
        rank: This rank.
        solver: How factors are inverted.
        pack: Whether symmetric inverses travel as triangles.
        moments: EKFAC's, which follow their bases.

    Attributes:
        refreshes: Refreshes that this rank took part in.
        failures: Units that this rank could not solve, and left as they were.
        pending: Payloads on their way.
        inspector: Reads spectra of what is solved here, if somebody has asked.
        asymmetries: `[2, units]`: how far this rank's factors, and their inverses, were from symmetric when they were
            last solved and before anything made them so; −1 where nothing was measured. Eigenbases have no such number,
            and no more have factors that a packed wire has mirrored.
        holders: Who holds each unit's payload here.
    """

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
        moments: Moments | None,
    ) -> None:
        self.refreshes = 0
        self.failures = 0
        self.pending: list[Refreshed] = []
        self.inspector = Inspector(rank)
        self.asymmetries = torch.full((2, len(plan.units)), -1.0, device=averages.device)
        self.holders = holders
        self._averages = averages
        self._plan = plan
        self._sharing = sharing
        self._rank = rank
        self._solver = solver
        self._pack = pack
        self._moments = moments
        self._wires: dict[tuple[int, ...], UnitWire] = {}

    def start(self, slots: tuple[int, ...], totals: Tensor, damping: float, due: int) -> None:
        """Solve this rank's units of some slots and send them on their way.

        Args:
            slots: What is due.
            totals: `[2 + C, units]` weights and traces over all ranks, and weights by class.
            damping: λ.
            due: The step from which on the new inverses are used.
        """
        if slots not in self._wires:
            # Who shares them holds them: the units of the own column's blocks, or all.
            column = None if self._sharing.size == self._plan.grid.world_size else self._plan.grid.column_of(self._rank)
            self._wires[slots] = payload_wire(self._plan, slots, column, self._solver, pack=self._pack)
        wire = self._wires[slots]
        # What is still on its way for these slots is older than what comes now.
        names = {unit.name for unit in wire.units}
        late = [other for other in self.pending if names & other.names]
        self.pending = [other for other in self.pending if not names & other.names]
        for other in late:
            self.arrived(other)
        own = [unit for unit in wire.units if self._plan.assignment.owners[unit.name] == self._rank]
        combined = combine(wire.units, own, self._averages, totals, self._sharing)
        solved = list(zip(own, self._solve(own, totals, combined, damping), strict=True))
        self.refreshes += 1
        if self._sharing.size == 1:
            self.pending.append(Refreshed(due, solved))
            return
        buffer = wire.sharing_buffer(torch.float32, self._averages.device)
        for unit, payload in solved:
            wire.put(buffer, unit, payload)
        work = share_segments(self._sharing, buffer, wire.layout, label=LABEL)
        self.pending.append(Refreshed(due, None, (wire, buffer, work)))

    def unmeasured(self, slots: tuple[int, ...], totals: Tensor) -> set[int]:
        """Return those of the slots that have a unit which no rank has measured yet."""
        weights = totals[0].tolist()
        empty = {unit.block for unit, weight in zip(self._plan.units, weights, strict=True) if weight <= 0}
        return {self._plan.blocks[block].slot for block in empty} & set(slots)

    def activate(self, step: int) -> None:
        """Load the payloads that are due, and help those on that aren't."""
        due = [refreshed for refreshed in self.pending if refreshed.due <= step]
        self.pending = [refreshed for refreshed in self.pending if refreshed.due > step]
        for refreshed in due:
            arrived = [(unit, payload) for unit, payload in self.arrived(refreshed) if unit.name in self.holders]
            if self._moments is not None:
                self._moments.load(arrived, self.holders)
                continue
            for unit, payload in arrived:
                self.holders[unit.name].load(unit, payload)
        if self._moments is not None and due:
            self._moments.publish()
        for refreshed in self.pending:
            if refreshed.travelling is not None and not refreshed.new:
                refreshed.travelling[2].go_on()
            refreshed.new = False

    def arrived(self, refreshed: Refreshed) -> list[tuple[Unit, Tensor]]:
        """Wait for payloads on their way, and return them."""
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

    def _solve(
        self, units: Sequence[Unit], totals: Tensor, combined: Mapping[str, Combined], damping: float
    ) -> list[Tensor]:
        weights, traces = self._quotients(totals, combined)
        tasks: list[Task] = []
        kept: list[Tensor | None] = []
        for unit in units:
            weight = weights[self._averages.layout.index(unit)]
            previous = self.holders[unit.name].payload(unit)
            if weight <= 0:  # never measured on any rank: the plain gradient stays
                kept.append(previous)
                continue
            delta = self._damping(unit, weights, traces, damping)
            classes = combined.get(unit.name)
            coefficients = None if classes is None else classes.coefficients
            tasks.append(Task(unit, self._averages.sums(unit), delta, previous, weight, coefficients))
            kept.append(None)
        inverses: dict[str, Tensor] = {}
        with self.inspector.watching(tasks):
            solved, failures = solve(tasks, self._solver, inverses)
        self._note_asymmetries([task.unit for task in tasks], inverses)
        self.failures += failures
        fresh = iter(
            payload if payload is task.previous else self._fold_identity(task.unit, payload, weights, traces, damping)
            for task, payload in zip(tasks, solved, strict=True)
            if payload is not None
        )
        return [next(fresh) if previous is None else previous for previous in kept]

    def _note_asymmetries(self, units: Sequence[Unit], inverses: Mapping[str, Tensor]) -> None:
        mirrored = self._pack and self._plan.grid.world_size > 1
        for unit in units:
            index = self._averages.layout.index(unit)
            if unit.kind is FactorKind.DENSE and not mirrored and (found := self._averages.asymmetry(unit)) is not None:
                self.asymmetries[0, index] = found
            if unit.name in inverses:
                self.asymmetries[1, index] = inverses[unit.name]

    def _quotients(self, totals: Tensor, combined: Mapping[str, Combined]) -> tuple[list[float], list[float]]:
        """Return what each unit's sum is divided by, and its trace: the weight, or tr F for `L ⊗ R / tr F`.

        The coefficients of combined classes have their weights in them.
        """
        weights, traces = totals[:2].tolist()
        for name, found in combined.items():
            index = self._averages.layout.index_of(name)
            weights[index], traces[index] = (0.0, 0.0) if found.trace is None else (1.0, found.trace)
        for block in self._plan.blocks.values():
            if block.partial_traces:
                own = [self._averages.layout.index(unit) for unit in block.units if unit.side is Side.A]
                whole = sum(traces[index] for index in own)
                for index in own if whole > 0 else ():
                    weights[index] = whole
        return weights, traces

    def _damping(self, unit: Unit, weights: list[float], traces: list[float], damping: float) -> float:
        if is_eigen(unit, self._solver):
            return 0.0
        if unit.side is Side.F:
            return damping
        on_a, on_g = self._split(unit.block, weights, traces, damping)
        return on_a if unit.side is Side.A else on_g

    def _split(self, block: str, weights: list[float], traces: list[float], damping: float) -> tuple[float, float]:
        """Split λ over the block's factors by their global traces; a missing G is the identity."""
        trace = {Side.A: 0.0, Side.G: 0.0}
        dim = {Side.A: 0, Side.G: 0}
        for unit in self._plan.blocks[block].units:
            index = self._averages.layout.index(unit)
            trace[unit.side] += traces[index] / weights[index] if weights[index] > 0 else 0.0
            dim[unit.side] += unit.batch * unit.dim
        if not dim[Side.G]:
            trace[Side.G], dim[Side.G] = 1.0, 1
        return tikhonov(trace[Side.A], dim[Side.A], trace[Side.G], dim[Side.G], damping)

    def _fold_identity(
        self, unit: Unit, payload: Tensor, weights: list[float], traces: list[float], damping: float
    ) -> Tensor:
        """Fold the damped identity `(I + δ_G I)⁻¹` of a block without G into the inverse of A."""
        measured = {other.side for other in self._plan.blocks[unit.block].units}
        if measured != {Side.A} or is_eigen(unit, self._solver):
            return payload
        _, on_g = self._split(unit.block, weights, traces, damping)
        return payload / (1 + on_g)


def payload_wire(plan: Plan, slots: Sequence[int], column: int | None, solver: Solver, *, pack: bool) -> UnitWire:
    """Return the layout in which payloads travel among the ranks that share them.

    Args:
        plan: Who owns what.
        slots: What is refreshed.
        column: The column whose ranks share; None for all ranks.
        solver: What makes the payloads.
        pack: Whether symmetric inverses travel as triangles.
    """
    grid, owners = plan.grid, plan.assignment.owners
    units = [
        unit
        for unit in plan.units
        if plan.blocks[unit.block].slot in slots and column in (None, plan.blocks[unit.block].column)
    ]
    return UnitWire(
        units,
        [owners[unit.name] if column is None else grid.row_of(owners[unit.name]) for unit in units],
        grid.world_size if column is None else grid.group_size,
        numel=lambda unit: payload_numel(unit, solver),
        packed=lambda unit: pack and is_symmetric(unit, solver),
    )
