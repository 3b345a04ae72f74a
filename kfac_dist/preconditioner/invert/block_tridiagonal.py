"""Refreshing the block-tridiagonal inverse of a chain: a unit's owner also needs its neighbour's factors.

    unit of block i    A, G             A_next, G_next
    takes              M_i, M_{i+1}, M_{i,i+1}    M_{i+1}, M_{i,i+1}
    makes              K, s             Ψ

The units are divided over the ranks like all others, and shared by one broadcast. Each needs statistics that belong to
other units, so that all ranks keep all of them (reduction all_reduce).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kfac_dist.curvature.block_tridiagonal import regression, root_and_told
from kfac_dist.curvature.block_tridiagonal_units import NEXT
from kfac_dist.curvature.factors import FactorKind, Side, Unit
from kfac_dist.curvature.gram import complete
from kfac_dist.curvature.inverses.solvers import Task, tikhonov
from kfac_dist.preconditioner.invert.class_conditional import Combined
from kfac_dist.preconditioner.invert.refresh import Refresh

_SIDE = {crossed: side for side, crossed in NEXT.items()}


class ChainRefresh(Refresh):
    """Solves the units of a chain in float64; see `Refresh` for its arguments."""

    # A unit takes its neighbours' statistics, too: copies for a thread would be of most of them.
    beside = False

    def _solve_now(
        self, units: Sequence[Unit], totals: Tensor, combined: Mapping[str, Combined], damping: float
    ) -> list[Tensor]:
        weights, traces = totals[:2].tolist()
        tasks = [*self._tasks(units, weights, traces, damping)]
        for task in tasks:  # before `_damped` mirrors them; K has no such number: K Kᵀ is symmetric
            self._note_asymmetry(task.unit.name, self._solving.asymmetry(task.unit, task.sums))
        started = time.perf_counter()
        payloads = [self._solve_unit(unit, weights, traces, damping) for unit in units]
        self.inspector.note(time.perf_counter() - started, tasks)
        return payloads

    def _solve_unit(self, unit: Unit, weights: list[float], traces: list[float], damping: float) -> Tensor:
        previous = self.holders[unit.name].payload(unit)
        try:
            payload = self._payload(unit, weights, traces, damping)
        except RuntimeError as error:  # not positive definite, no memory: raised on one rank, others would wait
            warnings.warn(f"solving {unit.name} failed: {error}; its last good inverse stays", stacklevel=2)
            payload = None
        if payload is None or not bool(torch.isfinite(payload).all()):
            self.failures += self._weight(unit, weights) > 0
            return previous
        return payload

    def _tasks(
        self, units: Sequence[Unit], weights: list[float], traces: list[float], damping: float
    ) -> Iterator[Task]:
        """Yield the factors among the units, whose spectra can be read: moments of two layers have none."""
        for unit in units:
            weight = self._weight(unit, weights)
            if unit.kind is not FactorKind.CROSS and weight > 0:
                delta = self._share(unit.block, unit.side, weights, traces, damping)
                yield Task(unit, self._averages.sums(unit), delta, None, weight, dtype=self._averages.working)

    def _payload(self, unit: Unit, weights: list[float], traces: list[float], damping: float) -> Tensor | None:
        """Return K and s, or Ψ; None while something that it takes was never measured."""
        side = _SIDE.get(unit.side, unit.side)
        crossed = self._unit(unit.block, NEXT[side])
        following = None if crossed is None else self._following(unit.block)
        takes = [unit, *([crossed] if crossed is not None else [])]
        takes += [self._required(following, side)] if following is not None else []
        if any(self._weight(taken, weights) <= 0 for taken in takes):
            return None
        after = cross = None
        if crossed is not None and following is not None:
            after = self._damped(following, side, weights, traces, damping)
            cross = self._averages.sums(crossed)[0].double() / self._weight(crossed, weights)
        if unit.kind is FactorKind.CROSS:
            assert after is not None
            assert cross is not None
            return regression(after, cross).flatten().to(self._averages.working)
        root, told = root_and_told(self._damped(unit.block, side, weights, traces, damping), after, cross)
        return torch.cat([root.flatten(), told]).to(self._averages.working)

    def _damped(self, block: str, side: Side, weights: list[float], traces: list[float], damping: float) -> Tensor:
        """Return a factor with its share of the damping (§6.3), in float64."""
        unit = self._required(block, side)
        matrix = complete(self._averages.sums(unit)[0].double() / self._weight(unit, weights))
        matrix.diagonal().add_(self._share(block, side, weights, traces, damping))
        return matrix

    def _share(self, block: str, side: Side, weights: list[float], traces: list[float], damping: float) -> float:
        """Return the damping's addition to the diagonal of one of a block's two factors."""
        mean: list[float] = []
        for other in (self._required(block, Side.A), self._required(block, Side.G)):
            weight = self._weight(other, weights)
            mean += [traces[self._averages.layout.index(other)] / weight if weight > 0 else 0.0, other.dim]
        on_a, on_g = tikhonov(mean[0], int(mean[1]), mean[2], int(mean[3]), damping)
        return on_a if side is Side.A else on_g

    def _weight(self, unit: Unit, weights: list[float]) -> float:
        return weights[self._averages.layout.index(unit)]

    def _unit(self, block: str, side: Side) -> Unit | None:
        return next((unit for unit in self._plan.blocks[block].units if unit.side is side), None)

    def _required(self, block: str, side: Side) -> Unit:
        unit = self._unit(block, side)
        assert unit is not None
        return unit

    def _following(self, block: str) -> str:
        """Return the block after this one in the chain, which is the model's order."""
        names = list(self._plan.blocks)
        return names[names.index(block) + 1]
