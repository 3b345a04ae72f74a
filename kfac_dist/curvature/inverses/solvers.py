"""Solvers: payloads of damped factors, equal sizes in one batch, without exceptions.

A *payload* is the result that a unit's owner computes and the others receive, one flat tensor per unit:

    dense unit,    cholesky / newton_schulz   (M + δI)⁻¹                  batch·n²     also of a registered solver
    dense unit,    eigen / ekfac              Q, then eigenvalues d       batch·(n² + n)
    diagonal unit, cholesky / newton_schulz   1 / (m + δ)                 batch·n
    diagonal unit, eigen / ekfac              m itself                    batch·n
    unit-wise F,   any solver                 (F + λI)⁻¹                  batch·n²

A factorisation that fails is retried in float64, then with ten times the damping, up to a limit; if it still fails, the
unit keeps its last good payload, and is counted. A factor that isn't positive definite with its own damping is
reported: Gram matrices are, up to rounding, so that something is wrong with it.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.config.schema import Solver
from kfac_dist.curvature.factors import FactorKind, Side, Unit
from kfac_dist.curvature.gram import asymmetry, complete
from kfac_dist.errors import ExtensionError

# EKFAC's bases are those of the factors; `moments` measures in them.
_EIGEN = (Solver.EIGEN, Solver.EKFAC)
_RAISES = (1.0, 10.0, 100.0, 1000.0)
# On a CPU, larger matrices gain nothing from a batch, and stacking them costs a copy.
_LARGEST_BATCHED = 256
_NEWTON_SCHULZ_STEPS = 60
_NEWTON_SCHULZ_TRIAL = 3
# Largest residual of an inverse before the last step, which squares it.
_NEWTON_SCHULZ_RESIDUAL = 1e-4

Invert = Callable[[Tensor, Tensor], Tensor]
# Solvers registered from outside of the package.
REGISTERED: dict[Solver, Invert] = {}


def add_solver(name: str, invert: Invert) -> None:
    """Add a solver by name; see `kfac_dist.extensions.register_solver`.

    Raises:
        ExtensionError: The name is taken or no name, or the solver isn't callable.
    """
    where = "register_solver"
    if isinstance(invert, type) or not callable(invert):
        raise ExtensionError(
            f"{where}: found {invert!r} for {name!r}; expected a function of (matrices, previous) that returns inverses"
        )
    try:
        inspect.signature(invert).bind(None, None)
    except TypeError as error:
        raise ExtensionError(f"{where}: {name!r} can't be called with (matrices, previous): {error}") from None
    REGISTERED[Solver.add(name, where)] = invert


@dataclass(frozen=True)
class Task:
    """One unit to solve.

    Attributes:
        unit: The unit.
        sums: `[batch, n, n]` (upper triangle is enough) or `[batch, n]`: the factor times its weight; only read.
        damping: δ, added to the factor's diagonal; unused by `eigen` on Kronecker factors.
        previous: Last good payload of the unit, or None.
        weight: Divisor of the sums.
        dtype: Precision in which it is solved.
        coefficients: `[C, batch]` if the sums are of C classes, `[C·batch, n, n]`: the factor of each.
    """

    unit: Unit
    sums: Tensor
    damping: float
    previous: Tensor | None
    weight: float = 1.0
    coefficients: Tensor | None = None
    dtype: torch.dtype = torch.float32

    def factor(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the factor itself, a new tensor."""
        dtype = self.dtype if dtype is None else dtype
        if self.coefficients is None:
            return self.sums.to(dtype) / self.weight
        out = self.sums.new_zeros(self.unit.shape, dtype=dtype)
        scales = self.coefficients.to(out) / self.weight
        by_class = self.sums.unflatten(0, tuple(scales.shape))
        for scale, sums in zip(scales, by_class, strict=True):  # one class at a time: no second copy of all of them
            out.addcmul_(sums.to(dtype), scale.view(-1, *[1] * (out.ndim - 1)))
        return out


def is_eigen(unit: Unit, solver: Solver) -> bool:
    """Whether the unit's payload is an eigendecomposition (or the bare diagonal), damped only when it is applied."""
    return solver in _EIGEN and unit.side is not Side.F


def payload_numel(unit: Unit, solver: Solver) -> int:
    """Return the number of values in a unit's payload."""
    vectors = unit.batch * unit.dim if is_eigen(unit, solver) and unit.kind is FactorKind.DENSE else 0
    return unit.numel + vectors


def is_symmetric(unit: Unit, solver: Solver) -> bool:
    """Whether the payload is symmetric matrices, so that a triangle of each says everything."""
    return unit.kind is FactorKind.DENSE and not is_eigen(unit, solver)


def tikhonov(trace_a: float, dim_a: int, trace_g: float, dim_g: int, damping: float) -> tuple[float, float]:
    """Split λ over A and G: `(π√λ, √λ/π)` with `π = sqrt((tr A/dim A)/(tr G/dim G))` (Martens & Grosse 2015, §6.3).

    π is 1 when a trace is zero or not finite.
    """
    ratio = (trace_a / dim_a) / (trace_g / dim_g) if trace_g > 0 and math.isfinite(trace_g) else 0.0
    pi = math.sqrt(ratio) if ratio > 0 and math.isfinite(ratio) else 1.0
    return pi * math.sqrt(damping), math.sqrt(damping) / pi


def solve(
    tasks: Sequence[Task],
    solver: Solver,
    asymmetries: dict[str, Tensor] | None = None,
    raised: dict[str, str] | None = None,
) -> tuple[list[Tensor | None], int]:
    """Solve every task, equal sizes in one batch.

    Args:
        tasks: The units to solve.
        solver: The method.
        asymmetries: Filled with each dense unit's `max|M − Mᵀ| / max|M|` before it is made symmetric; 0-dim tensors.
        raised: Filled, by unit name, with the reaction to a factor that wasn't positive definite with its damping.

    Returns:
        The flat payloads in the order of the tasks, None where nothing good could be computed and nothing good was
        known before; and the number of units that failed.
    """
    raised = {} if raised is None else raised
    payloads: list[Tensor | None] = [None] * len(tasks)
    batches: dict[tuple[bool, int, int], list[int]] = {}
    for index, task in enumerate(tasks):
        if task.unit.kind is FactorKind.DIAGONAL:
            batches[True, 0, index] = [index]
        else:
            alone = task.sums.device.type == "cpu" and task.unit.dim > _LARGEST_BATCHED
            key = (is_eigen(task.unit, solver), task.unit.dim, index if alone else -1)
            batches.setdefault(key, []).append(index)
    for (eigen, _, _), members in batches.items():
        first = tasks[members[0]]
        # Under `eigen`, unit-wise blocks are still inverted.
        method = solver if solver not in _EIGEN else Solver.EIGEN if eigen else Solver.CHOLESKY
        try:
            if first.unit.kind is FactorKind.DIAGONAL:
                payloads[members[0]] = _solve_diagonal(first, raised, eigen=is_eigen(first.unit, solver))
                continue
            _solve_batch([tasks[index] for index in members], members, payloads, method, asymmetries, raised)
        except RuntimeError as error:  # out of memory above all: raised on one rank, it would leave the others waiting
            warnings.warn(
                f"inverting {len(members)} factors failed: {error}; the last good inverses stay", stacklevel=2
            )
    failures = 0
    for index, task in enumerate(tasks):
        if payloads[index] is None:
            payloads[index] = task.previous
            failures += 1
    return payloads, failures


def _solve_batch(
    tasks: list[Task],
    positions: list[int],
    payloads: list[Tensor | None],
    solver: Solver,
    asymmetries: dict[str, Tensor] | None,
    raised: dict[str, str],
) -> None:
    """Solve dense units of one size; leaves None where the result isn't finite."""
    sizes = [task.unit.batch for task in tasks]
    matrices = _stack([task.factor() for task in tasks])
    if solver is not Solver.CHOLESKY:  # which reads the upper triangle alone
        complete(matrices)
    if solver is Solver.EIGEN:
        values, vectors, good = _eigen(matrices)
        _clamp_spectra(values, tasks, raised)
        parts = zip(torch.split(vectors, sizes), torch.split(values, sizes), torch.split(good, sizes), strict=True)
        for position, (q, d, ok) in zip(positions, parts, strict=True):
            if bool(ok.all()):
                payloads[position] = torch.cat([q.flatten(), d.flatten()])
        return
    damping = torch.cat([torch.full((task.unit.batch,), task.damping, dtype=torch.float64) for task in tasks])
    inverse, good, factors = _inverse(matrices, damping.to(matrices.device), tasks, solver, raised)
    for task, own in zip(tasks, factors.split(sizes), strict=True):
        if (factor := float(own.max())) > 1:
            raised[task.unit.name] = f"inverted with {factor:g} times its damping {task.damping:.3g}"
    if asymmetries is not None:
        asymmetries |= {task.unit.name: asymmetry(part) for task, part in zip(tasks, inverse.split(sizes), strict=True)}
    if solver is not Solver.CHOLESKY:
        inverse = (inverse + inverse.mT) / 2
    for position, part, ok in zip(positions, torch.split(inverse, sizes), torch.split(good, sizes), strict=True):
        if bool(ok.all()):
            payloads[position] = part.flatten()


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _stack_previous(tasks: list[Task]) -> Tensor:
    known = [
        task.sums.new_zeros(task.unit.shape, dtype=task.dtype)
        if task.previous is None
        else task.previous.view(task.unit.shape).to(task.dtype)
        for task in tasks
    ]
    return torch.cat(known)


def _solve_diagonal(task: Task, raised: dict[str, str], *, eigen: bool) -> Tensor | None:
    """Return the payload of a diagonal unit; None if nothing good can be computed."""
    factor = task.factor()
    if eigen:
        if not bool(torch.isfinite(factor.sum())):
            return None
        _clamp_spectra(factor, [task], raised)
        return factor.flatten()
    lowest, finite = torch.stack([factor.amin(), factor.sum()]).tolist()
    for times in _RAISES if math.isfinite(finite) else ():
        if lowest + times * task.damping > 0:
            if times > 1:
                raised[task.unit.name] = f"inverted with {times:g} times its damping {task.damping:.3g}"
            inverse = 1 / (factor + times * task.damping)
            return inverse.flatten() if bool(torch.isfinite(inverse.sum())) else None
    return None


def _clamp_spectra(values: Tensor, tasks: Sequence[Task], raised: dict[str, str]) -> None:
    """Make eigenvalues `[k, n]` of some units' matrices ≥ 0, in place; report those not explained by rounding."""
    rounding = torch.finfo(values.dtype).eps * values.shape[-1] + torch.finfo(tasks[0].sums.dtype).eps
    lowest, largest = values.amin(-1), values.abs().amax(-1)
    wrong = lowest < -rounding * largest
    if bool(wrong.any()):
        sizes = [task.unit.batch for task in tasks]
        for task, bad, low in zip(tasks, wrong.split(sizes), lowest.split(sizes), strict=True):
            if bool(bad.any()):
                raised[task.unit.name] = f"its eigenvalue {float(low.min()):.3g} taken for 0"
    values.clamp_(min=0)


def _inverse(
    matrices: Tensor, damping: Tensor, tasks: list[Task], solver: Solver, raised: dict[str, str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(M + δI)⁻¹` for `[k, n, n]`, which of them are good, and the factor of their δ, on the host.

    It escalates for the matrices that aren't good.

    The matrices are overwritten; those that fail are made again from their tasks, in float64.
    """
    diagonal = matrices.diagonal(dim1=-2, dim2=-1).double()
    matrices.diagonal(dim1=-2, dim2=-1).copy_(diagonal + damping[:, None])
    # An infinite diagonal has the finite inverse 0, which is no inverse to use.
    finite = torch.isfinite(diagonal.sum(-1))
    if solver is Solver.NEWTON_SCHULZ:
        inverse, good = newton_schulz(matrices, _stack_previous(tasks))
    elif solver in REGISTERED:
        inverse, good, problem = _registered_inverse(matrices, _stack_previous(tasks), solver)
        for task, ok in zip(tasks, good.split([task.unit.batch for task in tasks]), strict=True):
            if not bool(ok.all()):
                raised[task.unit.name] = f"inverted by cholesky, since {solver} {problem}"
    else:
        inverse, good = _cholesky_inverse(matrices)
    good &= finite
    factors = torch.ones(len(matrices), dtype=torch.float64)
    if bool(good.all()):
        return inverse, good, factors
    exact = _stack([task.factor(torch.float64) for task in tasks])
    for factor in _RAISES:
        failed = (~good).nonzero().flatten()
        retry = exact[failed]
        retry.diagonal(dim1=-2, dim2=-1).add_(damping[failed, None] * factor)
        redone, ok = _cholesky_inverse(retry)
        ok &= finite[failed]
        factors[failed[ok].cpu()] = factor
        inverse[failed[ok]] = redone[ok].to(inverse.dtype)
        good[failed[ok]] = True
        if bool(good.all()):
            break
    return inverse, good, factors


def _registered_inverse(matrices: Tensor, previous: Tensor, solver: Solver) -> tuple[Tensor, Tensor, str]:
    """Return a registered solver's result for `[k, n, n]`, which of it can be an inverse, and the problem otherwise."""
    failed = torch.zeros(len(matrices), dtype=torch.bool, device=matrices.device)
    try:
        inverse = REGISTERED[solver](matrices.clone(), previous)
    except Exception as error:  # the user's own code may raise anything, and no rank may stop alone
        return torch.empty_like(matrices), failed, f"raises {type(error).__name__}: {error}"
    if not isinstance(inverse, Tensor) or inverse.shape != matrices.shape:
        found = list(inverse.shape) if isinstance(inverse, Tensor) else type(inverse).__name__
        return torch.empty_like(matrices), failed, f"returned {found} where {list(matrices.shape)} was due"
    inverse = inverse.to(matrices)
    lowest = inverse.diagonal(dim1=-2, dim2=-1).amin(-1)  # an inverse's diagonal is positive
    return inverse, torch.isfinite(inverse.sum((-2, -1))) & (lowest > 0), "returned no positive definite matrix"


def _cholesky_inverse(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverses of `[k, n, n]`, from the upper triangles, and which of them are good; overwrites them."""
    # LAPACK's columns are our rows: its lower triangle is the upper one, and on a CPU it works where the matrices are.
    columns = matrices.mT
    in_place = columns if columns.device.type == "cpu" else torch.empty_like(columns)
    info = torch.empty(len(matrices), dtype=torch.int32, device=matrices.device)
    factor, _ = torch.linalg.cholesky_ex(columns, out=(in_place, info))
    failed = info != 0
    if bool(failed.any()):  # the identity keeps the inverse of the others' batch defined
        factor[failed] = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    inverse = torch.cholesky_inverse(factor, out=factor).mT
    return inverse, ~failed & torch.isfinite(inverse.diagonal(dim1=-2, dim2=-1).sum(-1))


def newton_schulz(matrices: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Invert `[k, n, n]` symmetric positive definite matrices by matrix products only (Schulz 1933).

    `X ← X(2I − MX)` squares R = I − MX, and converges if the spectral radius of R is below one: from the last inverse
    where that holds, else from `I/‖M‖_∞`, about 2·log₂κ iterations away. The spectral radius is costly to compute, and
    ‖R‖_F is √n times as large if eigenvalues are equal. But ‖R⁸‖_F^⅛ bounds it for any R, then within n^(1/16), and R⁸
    is the residual after three iterations. So three are done; matrices that don't converge start again from `I/‖M‖_∞`.

    Returns:
        The inverses, symmetric up to rounding, and which of them reached the residual.
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    cold = eye / matrices.abs().sum(-1).amax(-1)[:, None, None]
    inverse, good = start, torch.zeros(len(matrices), dtype=torch.bool, device=matrices.device)
    warm = ~good
    size = torch.linalg.matrix_norm(matrices)
    steps, tolerance = _NEWTON_SCHULZ_STEPS, _NEWTON_SCHULZ_RESIDUAL
    if matrices.dtype is torch.float64:  # twice as many digits
        steps, tolerance = 2 * steps, tolerance**2
    for step in range(steps):
        residual = eye - matrices @ inverse
        distance = torch.linalg.matrix_norm(residual)
        # A product of M and X can't come closer to I than rounding lets it: κ·ε, as for any other solver.
        rounding = 4 * torch.finfo(matrices.dtype).eps * size * torch.linalg.matrix_norm(inverse)
        enough = rounding.clamp(max=0.1) + tolerance * math.sqrt(matrices.shape[-1])
        good = distance <= enough
        inverse = torch.baddbmm(inverse, inverse, residual)
        if step >= _NEWTON_SCHULZ_TRIAL:
            lost = warm & ~(distance < 0.9)  # also where it is no number
            inverse, warm = torch.where(lost[:, None, None], cold, inverse), warm & ~lost
        if bool(good.all()):
            break
    return inverse, good & torch.isfinite(inverse.diagonal(dim1=-2, dim2=-1).sum(-1))


def _eigen(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return eigenvalues, eigenvectors and which of `[k, n, n]` are good."""
    finite = torch.isfinite(matrices.sum((-2, -1)))
    if bool(finite.all()):
        try:
            values, vectors = torch.linalg.eigh(matrices)
            return values, vectors, finite
        except torch.linalg.LinAlgError:
            if matrices.dtype is torch.float32:
                values, vectors, good = _eigen(matrices.double())
                return values.float(), vectors.float(), good
            if matrices.shape[0] == 1:
                finite = torch.zeros_like(finite)
    if matrices.shape[0] > 1:  # one bad matrix must not cost the others their result
        single = [_eigen(matrix[None]) for matrix in matrices]
        values, vectors, good = (torch.cat(parts) for parts in zip(*single, strict=True))
        return values, vectors, good
    return matrices.new_zeros(matrices.shape[:2]), torch.zeros_like(matrices), finite
