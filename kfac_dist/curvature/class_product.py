"""The Kronecker product that is nearest to `F = Σ_c π_c A_c⊗G_c`: its Kronecker SVD's first term, by power iteration.

Van Loan & Pitsianis (1993): rearranged, `A⊗G` is the outer product `vec A vec Gᵀ`, so that F becomes the matrix
`Σ_c π_c vec A_c vec G_cᵀ` of rank C, whose leading singular vectors are the best A and G in Frobenius norm. Its power
iteration,

    A ← Σ_c π_c ⟨G_c, G⟩ A_c / ⟨G, G⟩        G ← Σ_c π_c ⟨A_c, A⟩ G_c / ⟨A, A⟩,

never leaves the span of the classes' factors. With `A = Σ_c α_c A_c` and `G = Σ_c β_c G_c` all that it needs are the
inner products `P_cd = ⟨A_c, A_d⟩` and `Q_cd = ⟨G_c, G_d⟩`, C×C each:

    α_c ← π_c (Qβ)_c / βᵀQβ                  β_c ← π_c (Pα)_c / αᵀPα

Each half is the least-squares solution given the other, so that the distance to F falls at every step; it begins at
`E[A]⊗E[G]` and can't end above it. Inner products of positive semi-definite matrices are not negative, hence neither
are α and β: the result is symmetric and positive semi-definite. And the owners of A and of G, which may be two ranks,
have to tell each other no more than these few numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS = 200
_TOLERANCE = 1e-7
_PANEL = 128


@dataclass(frozen=True)
class Summary:
    """The owner's figures of a unit's factors by class.

    Attributes:
        products: `[batch, C, C]`: ⟨M_c, M_d⟩ of each matrix of the batch.
        traces: `[batch, C]`: tr M_c.
    """

    products: Tensor
    traces: Tensor

    @staticmethod
    def numel(batch: int, classes: int) -> int:
        """Return the number of values."""
        return batch * classes * (classes + 1)

    def flat(self) -> Tensor:
        """Return all of it, one after the other."""
        return torch.cat([self.products.flatten(), self.traces.flatten()])

    @classmethod
    def of_flat(cls, values: Tensor, batch: int, classes: int) -> Summary:
        """Return the inverse of `flat`."""
        products = values[: batch * classes**2].view(batch, classes, classes)
        return cls(products, values[batch * classes**2 :].view(batch, classes))


def summarize(sums: Tensor, weights: Tensor) -> Summary:
    """Return the inner products and traces of one unit's factors `S_c / w_c`; a class without weight has the factor 0.

    Args:
        sums: `[C, batch, n, n]`, of which the upper triangle is enough, or `[C, batch, n]` diagonals.
        weights: `[C]`.
    """
    dtype = torch.promote_types(sums.dtype, weights.dtype)
    scale = torch.where(weights > 0, 1 / weights.clamp(min=torch.finfo(weights.dtype).tiny), 0.0)
    if sums.ndim == 3:
        diagonals = sums.to(dtype) * scale[:, None, None]
        products = diagonals.movedim(0, 1) @ diagonals.movedim(0, 1).mT
        return Summary(products, diagonals.sum(-1).mT)
    classes, batch, n, _ = sums.shape
    products = sums.new_zeros(batch, classes, classes, dtype=dtype)
    traces = sums.new_zeros(batch, classes, dtype=dtype)
    for start in range(0, n, _PANEL):
        stop = min(start + _PANEL, n)
        # ⟨X, Y⟩ = 2⟨triu X, triu Y⟩ − ⟨diag X, diag Y⟩ of symmetric matrices, some rows at a time.
        panel = (sums[:, :, start:stop, start:].to(dtype) * scale[:, None, None, None]).triu()
        diagonal = panel.diagonal(dim1=-2, dim2=-1).movedim(0, 1)
        rows = panel.movedim(0, 1).flatten(2)
        products += 2 * rows @ rows.mT - diagonal @ diagonal.mT
        traces += diagonal.sum(-1)
    return Summary(products, traces)


def nearest(
    products_a: Tensor, products_g: Tensor, frequencies: Tensor, tolerance: float = _TOLERANCE
) -> tuple[Tensor, Tensor]:
    """Return α and β `[batch, C]` of the Kronecker product `(Σ α_c A_c) ⊗ (Σ β_c G_c)` that is nearest to F.

    Args:
        products_a: P `[batch, C, C]`, on the host.
        products_g: Q `[batch, C, C]`.
        frequencies: π `[C]`, adding up to 1.
        tolerance: Relative change of α below which it has settled.
    """
    p, q, pi = products_a.double(), products_g.double(), frequencies.double()
    alpha, beta = pi.expand(p.shape[:2]), pi.expand(p.shape[:2])
    for _ in range(_STEPS):
        previous = alpha
        alpha = _half(q, beta, pi, alpha)
        beta = _half(p, alpha, pi, beta)
        if bool(((alpha - previous).abs().amax(-1) <= tolerance * alpha.abs().amax(-1)).all()):
            break
    return alpha, beta


def _half(products: Tensor, coefficients: Tensor, frequencies: Tensor, otherwise: Tensor) -> Tensor:
    """Return one half of the iteration; the previous values where a factor is 0 or not finite."""
    inner = (products @ coefficients[:, :, None]).squeeze(-1)
    length = (inner * coefficients).sum(-1, keepdim=True)
    new = frequencies * inner.clamp(min=0) / length
    return torch.where((length > 0) & torch.isfinite(new).all(-1, keepdim=True), new, otherwise)
