"""Readings of the factors that refreshes invert: spectrum, condition, damping and owner of each factor.

Reading costs an eigenvalue decomposition beside the inversion, so it happens only at refreshes for which it was asked,
and changes nothing that the run computes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.curvature.factors import FactorKind, Unit
from kfac_dist.curvature.gram import complete
from kfac_dist.curvature.inverses.solvers import Task

QUANTILES = tuple(place / 32 for place in range(33))
"""Shares of the eigenvalues that lie below the values of `FactorReading.spectrum`."""

# Beyond this size a decomposition costs seconds on one core: only the largest eigenvalue is looked for.
_LARGEST = 2048
_POWER_STEPS = 30


@dataclass(frozen=True)
class FactorReading:
    """One factor (or one block of a cut one) when it was inverted.

    Attributes:
        step: Optimizer step, counted from 0.
        block: The layer.
        unit: The unit of work.
        side: `A`, `G` or `F`.
        dim: Size of the matrix.
        batch: Number of them, such as the groups of a convolution.
        rank: The rank that inverted it.
        damping: The value added to its diagonal.
        trace: Mean of its eigenvalues.
        spectrum: Eigenvalues at `QUANTILES`; the largest alone, the others None, where the matrix is large.
        condition: `(largest + damping) / (smallest + damping)`; of a large matrix its upper bound, with 0 as smallest.
        cost: batch · dim³.
    """

    step: int
    block: str
    unit: str
    side: str
    dim: int
    batch: int
    rank: int
    damping: float
    trace: float
    spectrum: tuple[float | None, ...]
    condition: float
    cost: float


@dataclass(frozen=True)
class RefreshReading:
    """One rank's part of a refresh.

    Attributes:
        step: Optimizer step, counted from 0.
        rank: The rank.
        seconds: Its host's time for solving its units.
        factors: The inverted factors.
    """

    step: int
    rank: int
    seconds: float
    factors: tuple[FactorReading, ...]


class Inspector:
    """Reads what this rank inverts, each factor once after a request.

    Args:
        rank: This rank.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._wanted: set[str] = set()
        self._outside: Callable[[], AbstractContextManager[None]] = nullcontext
        self._solved: tuple[float, list[Task]] | None = None
        self._readings: list[RefreshReading] = []

    def ask(self, units: Iterable[Unit], outside: Callable[[], AbstractContextManager[None]]) -> None:
        """Read these at their next refresh, inside of a context; moments of two layers have no spectrum."""
        self._wanted |= {unit.name for unit in units if unit.kind is not FactorKind.CROSS}
        self._outside = outside

    def take(self) -> list[RefreshReading]:
        """Return the readings, once."""
        taken, self._readings = self._readings, []
        return taken

    def note(self, seconds: float, tasks: Sequence[Task]) -> None:
        """Record the units just solved, and the time of solving."""
        if self._wanted:
            self._solved = (seconds, [task for task in tasks if task.unit.name in self._wanted])

    def read(self, step: int) -> None:
        """Read the units just solved, before their statistics change; `step` is the one of the request."""
        if self._solved is None:
            return
        (seconds, tasks), self._solved = self._solved, None
        self._wanted -= {task.unit.name for task in tasks}
        factors: list[FactorReading] = []
        with self._outside():
            for task in tasks:
                try:
                    factors.append(self._read(task, step))
                except RuntimeError as error:  # raised on one rank, the others would wait; nothing depends on it
                    warnings.warn(f"the spectrum of {task.unit.name} can't be read: {error}", stacklevel=2)
        self._readings.append(RefreshReading(step, self._rank, seconds, tuple(factors)))

    def _read(self, task: Task, step: int) -> FactorReading:
        unit = task.unit
        spectrum = spectrum_of(task)
        trace = float(_diagonal(task).mean())
        smallest, largest = spectrum[0] or 0.0, spectrum[-1] or 0.0
        damped = max(smallest, 0.0) + task.damping
        return FactorReading(
            step=step,
            block=unit.block,
            unit=unit.name,
            side=str(unit.side),
            dim=unit.dim,
            batch=unit.batch,
            rank=self._rank,
            damping=task.damping,
            trace=trace,
            spectrum=spectrum,
            condition=(largest + task.damping) / damped if damped > 0 else float("inf"),
            cost=unit.cost,
        )


def spectrum_of(task: Task) -> tuple[float | None, ...]:
    """Return the eigenvalues of a task's factor at `QUANTILES`, over all matrices of a batch."""
    if task.unit.kind is not FactorKind.DIAGONAL and task.unit.dim > _LARGEST:
        return (*[None] * (len(QUANTILES) - 1), _largest(task))
    factor = task.factor()
    if task.unit.kind is FactorKind.DIAGONAL:
        values = factor.flatten()
    else:
        complete(factor)
        values = torch.linalg.eigvalsh(factor).flatten()
    ordered = values.sort().values
    # Not torch.quantile, which refuses large tensors.
    places = [round(share * (ordered.numel() - 1)) for share in QUANTILES]
    return tuple(float(ordered[place]) for place in places)


def _diagonal(task: Task) -> Tensor:
    factor = task.factor()
    return factor if task.unit.kind is FactorKind.DIAGONAL else factor.diagonal(dim1=-2, dim2=-1)


def _largest(task: Task) -> float:
    """Return the largest eigenvalue by power iteration."""
    factor = task.factor()
    complete(factor)
    vector = factor.new_ones(*factor.shape[:-1], 1)
    for _ in range(_POWER_STEPS):
        vector = factor @ (vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True).clamp_min(1e-30))
    return float(torch.linalg.vector_norm(vector, dim=-2).max())
