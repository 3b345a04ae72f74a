"""Solving units at a refresh, from inputs to payloads: in the training thread, or in the background."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from kfac_dist.config.schema import Solver
from kfac_dist.curvature.factors import FactorKind, Side, Unit
from kfac_dist.curvature.inverses.solvers import Task, is_eigen, solve, tikhonov
from kfac_dist.curvature.statistics import RunningAverages
from kfac_dist.preconditioner.invert.class_conditional import Combined
from kfac_dist.preconditioner.plan import Plan


@dataclass(frozen=True)
class SolveInput:
    """Factors, weights and damping from which units are solved.

    Attributes:
        units: The units.
        sums: The statistics of each.
        previous: The last good payload of each.
        totals: `[2 + C, all units]` weights and traces over all ranks, and weights by class.
        combined: Combination of classes into one factor, by unit name.
        damping: λ.
    """

    units: Sequence[Unit]
    sums: Sequence[Tensor]
    previous: Sequence[Tensor]
    totals: Tensor
    combined: Mapping[str, Combined]
    damping: float


@dataclass(frozen=True)
class SolveResult:
    """Payloads of solved units, and which units failed.

    Attributes:
        payloads: Of each unit.
        failures: Number of units that keep their last payload.
        raised: By unit name, how a factor was changed that wasn't positive definite with its damping.
        asymmetries: By unit name, of the factor and of the inverse.
        tasks: The solved tasks, for readings of spectra.
        seconds: The host's time for it.
    """

    payloads: list[Tensor]
    failures: int
    raised: Mapping[str, str]
    asymmetries: Mapping[str, tuple[Tensor | None, Tensor | None]]
    tasks: list[Task]
    seconds: float

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that was computed."""
        found = [value for values in self.asymmetries.values() for value in values if value is not None]
        return [*self.payloads, *found]


class UnitSolver:
    """Divides sums by their weights, splits the damping and solves.

    Args:
        averages: Indices of units in per-unit tensors, and how their sums were made.
        plan: The blocks.
        solver: The inversion of factors.
        mirrored: Whether sums came as triangles, so that nothing tells whether they were symmetric.
    """

    def __init__(self, averages: RunningAverages, plan: Plan, solver: Solver, *, mirrored: bool) -> None:
        self._averages = averages
        self._layout = averages.layout
        self._plan = plan
        self._solver = solver
        self._mirrored = mirrored

    def solve(self, given: SolveInput) -> SolveResult:
        """Solve units from the given inputs; reads nothing else that training changes."""
        weights, traces = self._quotients(given.totals, given.combined)
        unmeasured = self._unmeasured(weights)
        tasks: list[Task] = []
        kept: list[Tensor | None] = []
        for unit, sums, previous in zip(given.units, given.sums, given.previous, strict=True):
            weight = weights[self._layout.index(unit)]
            if unit.block in unmeasured:
                kept.append(previous)
                continue
            delta = self._damping(unit, weights, traces, given.damping)
            classes = given.combined.get(unit.name)
            coefficients = None if classes is None else classes.coefficients
            tasks.append(Task(unit, sums, delta, previous, weight, coefficients, self._averages.working))
            kept.append(None)
        inverses: dict[str, Tensor] = {}
        started = time.perf_counter()
        raised: dict[str, str] = {}
        solved, failures = solve(tasks, self._solver, inverses, raised)
        seconds = time.perf_counter() - started
        fresh = iter(
            payload if payload is task.previous else self._fold_identity(task.unit, payload, weights, traces, given)
            for task, payload in zip(tasks, solved, strict=True)
            if payload is not None
        )
        payloads = [next(fresh) if previous is None else previous for previous in kept]
        return SolveResult(payloads, failures, raised, self._asymmetries(tasks, inverses), tasks, seconds)

    def _unmeasured(self, weights: Sequence[float]) -> set[str]:
        """Return the blocks of which a factor has no statistics on any rank.

        They keep their payload, at first the plain gradient, under any solver: one factor alone is no curvature.
        """
        return {unit.block for unit in self._plan.units if weights[self._layout.index(unit)] <= 0}

    def asymmetry(self, unit: Unit, sums: Tensor) -> Tensor | None:
        """Return how far a unit's sums are from symmetric, a 0-dim tensor; None where nothing tells."""
        if unit.kind is not FactorKind.DENSE or self._mirrored:
            return None
        try:
            return self._averages.asymmetry(unit, sums)
        except RuntimeError:  # no memory for a number that is only shown: raised on one rank, the others would wait
            return None

    def _asymmetries(
        self, tasks: Sequence[Task], inverses: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        return {task.unit.name: (self.asymmetry(task.unit, task.sums), inverses.get(task.unit.name)) for task in tasks}

    def _quotients(self, totals: Tensor, combined: Mapping[str, Combined]) -> tuple[list[float], list[float]]:
        """Return each unit's divisor of its sum, and its trace: the weight, or tr F for `L ⊗ R / tr F`.

        The coefficients of combined classes have their weights in them.
        """
        weights, traces = totals[:2].tolist()
        for name, found in combined.items():
            index = self._layout.index_of(name)
            weights[index], traces[index] = (0.0, 0.0) if found.trace is None else (1.0, found.trace)
        for block in self._plan.blocks.values():
            if block.partial_traces:
                own = [self._layout.index(unit) for unit in block.units if unit.side is Side.A]
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
            index = self._layout.index(unit)
            trace[unit.side] += traces[index] / weights[index] if weights[index] > 0 else 0.0
            dim[unit.side] += unit.batch * unit.dim
        if not dim[Side.G]:
            trace[Side.G], dim[Side.G] = 1.0, 1
        return tikhonov(trace[Side.A], dim[Side.A], trace[Side.G], dim[Side.G], damping)

    def _fold_identity(
        self, unit: Unit, payload: Tensor, weights: list[float], traces: list[float], given: SolveInput
    ) -> Tensor:
        """Fold the damped identity `(I + δ_G I)⁻¹` of a block without G into the inverse of A."""
        measured = {other.side for other in self._plan.blocks[unit.block].units}
        if measured != {Side.A} or is_eigen(unit, self._solver):
            return payload
        _, on_g = self._split(unit.block, weights, traces, given.damping)
        return payload / (1 + on_g)
