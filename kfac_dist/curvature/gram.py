"""Gram matrices, accumulated in place and only where a symmetric matrix needs them.

Convention for every stored factor: the *upper block-triangle* is valid, entries below the diagonal blocks are zero or
stale. Every operation on factors between measuring and inverting is linear and elementwise, so that none reads it;
`complete` mirrors the upper half once, when a factor is about to be inverted.

Rows in bf16 are multiplied as they are where a GPU adds their products up in fp32, in which each is exact; elsewhere
they are made fp32 first.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from kfac_dist.precision import at_least_single

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
        out: `[batch, n, n]`, fp32 or fp64; a strided view is fine as long as its last dimension is contiguous.
        rows: `[batch, M, d]` with d = n, or n − 1 when `ones` is set.
        alpha: Scale of the new term.
        beta: Scale of the previous values; 0 ignores them, even if they are not finite.
        ones: Whether rows carry an implicit last column of ones (the homogeneous coordinate of a bias). It is never
            materialised: its row of the Gram matrix is a column sum.
        weights: `[M]`, the diagonal of D; one for every row by default.
    """
    width = rows.shape[-1]
    halves = (
        rows.dtype is torch.bfloat16
        and out.dtype is torch.float32
        and weights is None
        and multiplies_halves(rows.device)
    )
    if not halves:
        rows = rows.to(out.dtype)
    weighted = rows if weights is None else rows * weights.to(rows.dtype)[:, None]
    for start, stop in _panels(width):
        panel = out[:, start:stop, start:width]
        left, right = weighted[..., start:stop].mT, rows[..., start:]
        if halves:
            _add_product_of_halves(panel, left, right, alpha=alpha, beta=beta)
        elif out.shape[0] == 1:
            panel[0].addmm_(left[0], right[0], beta=beta, alpha=alpha)
        else:
            panel.baddbmm_(left, right, beta=beta, alpha=alpha)
    if ones:
        border = out[:, :, width]
        if beta == 0:
            border.zero_()
        else:
            border.mul_(beta)
        border[:, :width].add_(weighted.sum(dim=1, dtype=out.dtype), alpha=alpha)
        border[:, width].add_(alpha * (rows.shape[1] if weights is None else weights.sum()))


def _add_product_of_halves(panel: Tensor, left: Tensor, right: Tensor, *, alpha: float, beta: float) -> None:
    """Set `panel ← beta·panel + alpha·left @ right` in place, for factors in bf16.

    By a separate product: before torch 2.10, products that also add don't accept an fp32 sum.
    """
    if len(panel) == 1:
        product = torch.mm(left[0], right[0], out_dtype=torch.float32)[None]
    else:
        product = torch.bmm(left, right, out_dtype=torch.float32)
    if beta == 0:
        torch.mul(product, alpha, out=panel)
    else:
        panel.mul_(beta).add_(product, alpha=alpha)


@functools.cache
def multiplies_halves(device: torch.device) -> bool:
    """Whether a device multiplies bf16 with sums in fp32: GPUs, from torch 2.8 on. Tried once, which waits for it."""
    return device.type == "cuda" and _adds_up_exactly(device)


def _adds_up_exactly(device: torch.device) -> bool:
    """Whether sums of bf16 products come out right that bf16, or fp16, couldn't hold."""
    rows = (torch.arange(2 * 500 * 24, device=device) % 31 - 15).view(2, 500, 24).bfloat16()
    right = True
    for batch in (1, 2):
        left, panel = rows[:batch, :, 4:12], torch.ones(2, 24, 24, device=device, dtype=torch.float32)[:batch, 4:12, 4:]
        expected = 1 + left.double().mT @ rows[:batch, :, 4:].double()
        try:
            _add_product_of_halves(panel, left.mT, rows[:batch, :, 4:], alpha=1.0, beta=1.0)
        except (TypeError, RuntimeError):  # torch has no such product, or none for this device
            return False
        right = right and bool((panel == expected).all())
    return right


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
    """Return `max|M − Mᵀ| / max|M|` of `[batch, n, n]`, a 0-dim tensor, over entries with both halves.

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
    out = rows.new_zeros(batch, width, width, dtype=at_least_single(rows.dtype))
    accumulate_gram(out, rows, alpha=1.0, beta=0.0)
    return complete(out)
