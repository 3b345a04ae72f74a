"""Orthogonal polar factors by Newton-Schulz: `msign(U) = U (UᵀU)^(−½)`, products alone.

    X ← aX + (bXXᵀ + c(XXᵀ)²)X        from X = U / ‖U‖, as `[m, n]` with m ≤ n

Muon's coefficients (Jordan et al. 2024) bring singular values to about 0.7 to 1.2 in five steps; those of polar express
(Amsel et al. 2025) are another polynomial each step, and come to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_dist.config.schema import Iteration, IterationDType, Length
from kfac_dist.preconditioner.precondition.transforms.base import Stack, Stage, State, Transform

Coefficients = tuple[float, float, float]
MUON: Coefficients = (3.4445, -4.7750, 2.0315)
_POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# Rounding may push a singular value above 1, where those polynomials would throw it far off.
_SAFETY = 1.01
_EPS = 1e-7
_DTYPES = {
    IterationDType.BFLOAT16: torch.bfloat16,
    IterationDType.FLOAT32: torch.float32,
    IterationDType.FLOAT64: torch.float64,
}


class Orthogonalised(Transform):
    """Replaces each matrix by its orthogonal polar factor, or keeps its direction at that factor's Frobenius norm.

    Args:
        iteration: Coefficients.
        iterations: Number of their applications.
        dtype: Precision.
    """

    stage = Stage.UPDATE

    def __init__(self, iteration: Iteration, iterations: int, dtype: IterationDType) -> None:
        self._coefficients = coefficients(iteration, iterations)
        self._safety = _SAFETY if iteration is Iteration.POLAR_EXPRESS else 1.0
        self._dtype = dtype

    def apply(self, update: Tensor, stack: Stack, state: State) -> Tensor:
        """See `Transform.apply`."""
        if not self._coefficients:
            norms: Tensor = torch.linalg.vector_norm(update.flatten(1), dim=1).clamp(min=_EPS)
            return update * (math.sqrt(min(update.shape[1:])) / norms)[:, None, None]
        dtype = _DTYPES.get(self._dtype) or (torch.bfloat16 if update.is_cuda else update.dtype)
        return msign(update, self._coefficients, dtype, self._safety).to(update.dtype)


class StepLength(Transform):
    """Gives each matrix of singular values near 1 its length, and what an engine's loss scale will divide.

    Args:
        length: The length of the update.
    """

    stage = Stage.LENGTH

    def __init__(self, length: Length) -> None:
        self._length = length

    def apply(self, update: Tensor, stack: Stack, state: State) -> Tensor:
        """See `Transform.apply`."""
        scale = step_length(self._length, *update.shape[1:]) * stack.gradient_scale
        return update if scale == 1 else update * scale


def step_length(length: Length, d_out: int, d_in: int) -> float:
    """Return the factor of a step `[d_out, d_in]`."""
    match length:
        case Length.SPECTRAL:
            return math.sqrt(max(1.0, d_out / d_in))
        case Length.RMS:
            return 0.2 * math.sqrt(max(d_out, d_in))
        case Length.NONE:
            return 1.0


def coefficients(iteration: Iteration, iterations: int) -> tuple[Coefficients, ...]:
    """Return (a, b, c) of each iteration; none for `Iteration.NONE`."""
    match iteration:
        case Iteration.MUON:
            return (MUON,) * iterations
        case Iteration.POLAR_EXPRESS:
            *first, last = _POLAR_EXPRESS
            safe = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in first]
            return (*safe, *[last] * iterations)[:iterations]
        case Iteration.NONE:
            return ()


def msign(matrices: Tensor, polynomials: Sequence[Coefficients], dtype: torch.dtype, safety: float = 1.0) -> Tensor:
    """Return the orthogonal polar factors of `[k, m, n]`, in `dtype`; of a zero matrix zero.

    On a CPU, where a batch gains nothing, matrices go one by one, by the same products as `torch.optim.Muon`.

    Args:
        matrices: The matrices.
        polynomials: (a, b, c) of each iteration.
        dtype: In which precision.
        safety: Factor of the first norm.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x.to(dtype)
    if x.is_cuda:
        x = _iterated(x, polynomials, safety)
    else:
        x = torch.stack([_iterated(one, polynomials, safety) for one in x])
    return x.mT if tall else x


def _iterated(x: Tensor, polynomials: Sequence[Coefficients], safety: float) -> Tensor:
    """Return the iteration's result for one matrix or a batch, of more columns than rows."""
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    norm = x.norm() if x.ndim == 2 else x.flatten(1).norm(dim=1)[:, None, None]
    x = x / (norm * safety).clamp(min=_EPS)
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
