"""The block-tridiagonal inverse of K-FAC for chains of layers (Martens & Grosse 2015, §4.3 and appendix B).

F̃ has the blocks A_ij ⊗ G_ij. F̂ agrees with it on the three middle diagonals, and F̂⁻¹ is block-tridiagonal: the
gradients of the layers are taken for a chain of Gaussian variables in which each depends on the next one alone.

    F̂⁻¹ = Ξᵀ Λ Ξ        Ξ: I on the diagonal, −Ψ_{i,i+1} above it;  Λ: the inverses of the conditional covariances

    Ψ_{i,i+1} = Ψᴬ ⊗ Ψᴳ,  Ψᴬ = A_{i,i+1} A_{i+1}⁻¹,  Ψᴳ alike             the part of layer i known from layer i+1
    Σ_{i|i+1} = A_i ⊗ G_i − C ⊗ D,  C = Ψᴬ A_{i+1} Ψᴬᵀ,  D alike           the rest; Σ of the last layer: A ⊗ G

The inverse of A ⊗ G − C ⊗ D takes one eigendecomposition a side: with A = LLᵀ and L⁻¹CL⁻ᵀ = E diag(s) Eᵀ, and the same
of G and D, it is (K_A ⊗ K_G) diag(1 − s_A s_Gᵀ)⁻¹ (K_A ⊗ K_G)ᵀ for K = L⁻ᵀE. The sides don't need each other for it.

Factors come here damped: with δI on the diagonal blocks the matrices of both sides are positive definite, so that all
s lie in [0, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# 1 − s_A s_G can't be smaller than this and still mean something.
_LEAST = {torch.float32: 1e-6, torch.float64: 1e-14}


@dataclass(frozen=True)
class ChainLink:
    """One layer's share of F̂⁻¹.

    Attributes:
        root_a: K_A `[n, n]`.
        root_g: K_G `[m, m]`.
        told_a: s_A `[n]`; zeros in the last layer.
        told_g: s_G `[m]`.
        next_a: Ψᴬ `[n, n']`; None in the last layer.
        next_g: Ψᴳ `[m, m']`.
    """

    root_a: Tensor
    root_g: Tensor
    told_a: Tensor
    told_g: Tensor
    next_a: Tensor | None = None
    next_g: Tensor | None = None

    def conditional(self, matrix: Tensor) -> Tensor:
        """Return `Σ⁻¹ vec(V)` as a matrix, for V `[m, n]`."""
        left = (1 - self.told_g[:, None] * self.told_a).clamp_(min=_LEAST[matrix.dtype])
        inner = (self.root_g.mT @ matrix @ self.root_a) / left
        return self.root_g @ inner @ self.root_a.mT


def regression(following: Tensor, cross: Tensor) -> Tensor:
    """Return `Ψ = M_{i,i+1} M_{i+1}⁻¹`.

    Args:
        following: M_{i+1} `[n', n']`, damped.
        cross: M_{i,i+1} `[n, n']`.

    Raises:
        torch.linalg.LinAlgError: The matrix isn't positive definite.
    """
    return torch.cholesky_solve(cross.mT, torch.linalg.cholesky(following)).mT


def root_and_told(own: Tensor, following: Tensor | None = None, cross: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return K and s of one side.

    Args:
        own: M_i `[n, n]`, damped.
        following: M_{i+1}, damped; None in the last layer.
        cross: M_{i,i+1}.

    Raises:
        torch.linalg.LinAlgError: A matrix isn't positive definite.
    """
    lower = torch.linalg.cholesky(own)
    if following is None or cross is None:
        eye = torch.eye(len(own), dtype=own.dtype, device=own.device)
        return torch.linalg.solve_triangular(lower.mT, eye, upper=True), own.new_zeros(len(own))
    told = regression(following, cross) @ cross.mT
    scaled = torch.linalg.solve_triangular(lower, told, upper=False)
    scaled = torch.linalg.solve_triangular(lower, scaled.mT, upper=False)
    values, vectors = torch.linalg.eigh((scaled + scaled.mT) / 2)
    return torch.linalg.solve_triangular(lower.mT, vectors, upper=True), values.clamp(0, 1)


def apply_inverse(links: Sequence[ChainLink], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return `Ξᵀ Λ Ξ v`, a matrix a layer.

    Args:
        links: The layers in the order of the chain.
        gradients: Their gradients `[m, n]`.
    """
    weighted = []
    for place, (link, own) in enumerate(zip(links, gradients, strict=True)):
        left = own
        if link.next_a is not None and link.next_g is not None:
            left = own - link.next_g @ gradients[place + 1] @ link.next_a.mT
        weighted.append(link.conditional(left))
    out = weighted[:1]
    for place, link in enumerate(links[:-1]):
        assert link.next_a is not None
        assert link.next_g is not None
        out.append(weighted[place + 1] - link.next_g.mT @ weighted[place] @ link.next_a)
    return out
