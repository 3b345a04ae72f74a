"""Gram matrices, accumulated in place and only where a symmetric matrix needs them.

Convention for every stored factor: the *upper block-triangle* is valid, what lies below the diagonal blocks is zero or
stale. Every operation on factors between measuring and inverting is linear and elementwise, so nobody has to know;
`complete` mirrors the upper half once, when a factor is about to be inverted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

# Panels by size: k of them multiply (k+1)/2k of the full product, and cost k calls.
_PANELS = ((512, 8), (256, 4))


def _panels(n: int) -> Iterator[tuple[int, int]]:
    count = next((panels for size, panels in _PANELS if n >= size), 1)
    edges = [n * i // count for i in range(count + 1)]
    return itertools.pairwise(edges)


def accumulate_gram(
    out: Tensor, rows: Tensor, *, alpha: float, beta: float, ones: bool = False, weights: Tensor | None = None
) -> None:
    """Set `out ← beta·out + alpha·[rows, 1]ᵀ D [rows, 1]` in place, upper block-triangle only.

    Args:
        out: `[batch, n, n]`, fp32; a strided view is fine as long as its last dimension is contiguous.
        rows: `[batch, M, d]` with d = n, or n − 1 when `ones` is set.
        alpha: Scale of the new term.
        beta: Scale of what is there; 0 ignores it, even when it is not finite.
        ones: Whether rows carry an implicit last column of ones (the homogeneous coordinate of a bias). It is never
            materialised: its row of the Gram matrix is a column sum.
        weights: `[M]`, the diagonal of D; one for every row by default.
    """
    width = rows.shape[-1]
    rows = rows.to(out.dtype)
    weighted = rows if weights is None else rows * weights[:, None]
    for start, stop in _panels(width):
        panel = out[:, start:stop, start:width]
        left, right = weighted[..., start:stop].mT, rows[..., start:]
        if out.shape[0] == 1:
            panel[0].addmm_(left[0], right[0], beta=beta, alpha=alpha)
        else:
            panel.baddbmm_(left, right, beta=beta, alpha=alpha)
    if ones:
        border = out[:, :, width]
        if beta == 0:
            border.zero_()
        else:
            border.mul_(beta)
        border[:, :width].add_(weighted.sum(dim=1), alpha=alpha)
        border[:, width].add_(alpha * (rows.shape[1] if weights is None else weights.sum()))


def complete(matrix: Tensor) -> Tensor:
    """Mirror the upper triangle of `[..., n, n]` into the lower one, in place, and return the matrix."""
    n = matrix.shape[-1]
    for start, stop in _panels(n):
        matrix[..., stop:, start:stop] = matrix[..., start:stop, stop:].mT
        diagonal = matrix[..., start:stop, start:stop]
        upper = diagonal.triu()
        diagonal.copy_(upper + upper.triu(1).mT)
    return matrix


def asymmetry(matrix: Tensor, width: int | None = None) -> Tensor:
    """Return `max|M − Mᵀ| / max|M|` of `[batch, n, n]`, a 0-dim tensor, over what has both of its halves.

    The largest entry of a positive semi-definite matrix is on its diagonal.

    Args:
        matrix: The matrices.
        width: Rows that `accumulate_gram` was given had so many columns: both halves are in its diagonal panels alone.
            By default all entries are there.
    """
    tiles = [(0, matrix.shape[-1])] if width is None else _panels(width)
    parts = [matrix[..., start:stop, start:stop] for start, stop in tiles]
    largest = torch.stack([(part - part.mT).abs().max() for part in parts]).max().float()
    return largest / matrix.diagonal(dim1=-2, dim2=-1).abs().max().float().clamp(min=torch.finfo(torch.float32).tiny)


def traces(matrix: Tensor) -> Tensor:
    """Return the sum of all diagonals of `[batch, n, n]`, a 0-dim tensor.

    A Gram matrix is finite exactly when its diagonal is: |S_ij| ≤ sqrt(S_ii S_jj). So this cheap number also answers
    whether anything non-finite entered.
    """
    return matrix.diagonal(dim1=-2, dim2=-1).sum()


def gram(rows: Tensor) -> Tensor:
    """Return the complete Gram matrix `[batch, d, d]` of `[batch, M, d]` rows."""
    batch, _, width = rows.shape
    out = rows.new_zeros(batch, width, width, dtype=torch.float32)
    accumulate_gram(out, rows, alpha=1.0, beta=0.0)
    return complete(out)
