"""Solvers on one device: seconds and errors of one inversion by size."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import synchronize
from kfac_dist.config.schema import Solver
from kfac_dist.curvature.factors import FactorKind, Side, Unit
from kfac_dist.curvature.inverses.solvers import Task, solve

DAMPING = 1e-3
"""Of the factor's mean eigenvalue."""

METHODS = {
    "cholesky": (Solver.CHOLESKY, False),
    "eigh": (Solver.EIGEN, False),
    "newton_schulz from nothing": (Solver.NEWTON_SCHULZ, False),
    "newton_schulz from the last inverse": (Solver.NEWTON_SCHULZ, True),
}


def compare(device: torch.device, sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """Time each method on the same factor; each a row of the result."""
    rows = []
    for n in sizes:
        factor, before = _factors(n, device)
        damped = factor + DAMPING * torch.eye(n, device=device)
        unit = Unit("trial", Side.A, 0, 0, n, 1, FactorKind.DENSE)
        for name, (solver, warm) in METHODS.items():
            previous = None
            if warm:
                start, _ = solve([Task(unit, before[None], DAMPING, None)], Solver.CHOLESKY)
                previous = start[0]
            seconds, payload = _timed(Task(unit, factor[None], DAMPING, previous), solver, device, repeats)
            row = {"n": n, "method": name, "seconds": seconds}
            rows.append(row | {"error": None if payload is None else _error(payload, factor, damped, solver)})
    return rows


def _timed(task: Task, solver: Solver, device: torch.device, repeats: int) -> tuple[float | None, Tensor | None]:
    """Return the shortest time, by the clock as solvers wait for their results; None if it can't be solved."""
    found = []
    payload: Tensor | None = None
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        payloads, failures = solve([task], solver)
        synchronize(device)
        found.append(time.perf_counter() - started)
        if failures:
            return None, None
        payload = payloads[0]
    return min(found[1:]), payload


def _error(payload: Tensor, factor: Tensor, damped: Tensor, solver: Solver) -> float:
    """Return `‖(M + δI)X − I‖ / √n`, for eigenbases with X = Q (D + δ)⁻¹ Qᵀ, in float64."""
    n = len(factor)
    if solver is Solver.EIGEN:
        q, d = payload[: n * n].view(n, n).double(), payload[n * n :].double()
        inverse = q / (d + DAMPING) @ q.mT
    else:
        inverse = payload.view(n, n).double()
    residual = damped.double() @ inverse
    residual.diagonal().sub_(1)
    return float(torch.linalg.matrix_norm(residual)) / n**0.5


def _factors(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a factor with eigenvalues that fall as 1/k, scaled to a mean of one, and an earlier version of it."""
    torch.manual_seed(0)
    scales = (1 / torch.arange(1, n + 1, device=device)).sqrt()
    basis = torch.linalg.qr(torch.randn(n, n, device=device)).Q
    factor = gram_of(torch.randn(4 * n, n, device=device) * scales @ basis.mT)
    later = gram_of(torch.randn(4 * n, n, device=device) * scales @ basis.mT)
    mean = factor.diagonal().mean()
    return factor / mean, 0.95 * factor / mean + 0.05 * later / mean


def gram_of(rows: Tensor) -> Tensor:
    return rows.mT @ rows / len(rows)
