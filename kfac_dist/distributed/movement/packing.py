"""Symmetric matrices at half the bytes: one triangle, laid out so that packing is a few copies of whole blocks.

Rectangular Full Packed format (Gustavson, Waśniewski, Dongarra & Langou 2010, ACM TOMS 37(2):18, LAPACK's `pftrf`): the
n(n+1)/2 elements of the lower triangle fill a rectangle. With k = n // 2 and S = A[m:, m:], the square right of the
rectangle's columns, of which by symmetry the upper triangle is as good as the lower:

    n odd, m = k+1: n × (k+1)                        n even, m = k: (n+1) × k

        A00 S00 S01                                      S00 S01
        A10 A11 S11       columns A[:, :m], with the     A00 S11      the same, one row lower, so that the
        A20 A21 A22       upper triangle of S in the     A10 A11      upper triangle of S fits with its
        A30 A31 A32       place above the diagonal       A20 A21      diagonal
        A40 A41 A42                                      A30 A31

No element has an index of its own: there are no index arrays to build, to keep or to gather by. On a CPU that is views
and copies of whole blocks; on a GPU a kernel each way reads and writes everything once (`packing_kernels`).
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor


def triangle_numel(n: int) -> int:
    """Elements of a symmetric n×n matrix when one triangle of it is sent: n(n+1)/2."""
    return n * (n + 1) // 2


def pack_symmetric(matrix: Tensor, out: Tensor) -> None:
    """Writes the lower triangles of symmetric matrices into a buffer.

    Args:
        matrix: Matrices [..., n, n], of which only the lower triangle is read.
        out: Contiguous [..., n(n+1)/2], or the same elements in one dimension; of another dtype, it is converted to.
    """
    n = matrix.shape[-1]
    m = (n + 1) // 2
    rectangle, corner = _views(out, matrix.shape[:-2], n)
    if matrix.is_cuda and (kernels := gpu_kernels()) is not None:
        kernels.pack(matrix.reshape(-1, n, n), out.view(-1, triangle_numel(n)))
        return
    _columns(rectangle, n).copy_(matrix[..., :, :m])
    if corner.numel():
        # Below the corner's diagonal are elements of A[:, :m]; S goes above it, with its own diagonal.
        corner.copy_(corner.tril(-1).add_(matrix[..., m:, m:].mT.triu().to(corner.dtype)))


def unpack_symmetric(packed: Tensor, n: int, out: Tensor | None = None) -> Tensor:
    """The full symmetric matrices [..., n, n] of the result of `pack_symmetric`.

    Args:
        packed: Contiguous [..., n(n+1)/2].
        n: Size of a matrix.
        out: The matrices, [..., n, n], converted to its dtype; by default a new tensor like `packed`.

    Returns:
        The matrices: `out` where it was given.
    """
    m = (n + 1) // 2
    lead = packed.shape[:-1] if out is None else out.shape[:-2]
    full = packed.new_empty(*lead, n, n) if out is None else out
    rectangle, corner = _views(packed, lead, n)
    if packed.is_cuda and full.is_contiguous() and (kernels := gpu_kernels()) is not None:
        kernels.unpack(packed.view(-1, triangle_numel(n)), full.view(-1, n, n))
        return full
    columns = _columns(rectangle, n)
    lower = columns[..., :m, :].tril()
    full[..., :m, :m].copy_(lower + lower.tril(-1).mT)
    if corner.numel():
        full[..., m:, :m].copy_(columns[..., m:, :])
        full[..., :m, m:].copy_(columns[..., m:, :].mT)
        upper = corner.triu()
        full[..., m:, m:].copy_(upper + upper.triu(1).mT)
    return full


@functools.cache
def gpu_kernels() -> ModuleType | None:
    """Return the kernels, or None after a warning that says why there are none: packing then takes several copies."""
    try:
        return importlib.import_module("kfac_dist.distributed.movement.packing_kernels")
    except ImportError as error:
        warnings.warn(
            f"triangles are packed by several copies each: Triton, which torch brings for GPUs, can't be imported "
            f"({error}); pip install triton makes it one",
            stacklevel=2,
        )
        return None


def _views(packed: Tensor, lead: torch.Size, n: int) -> tuple[Tensor, Tensor]:
    """The packed rectangle, and the k×k corner of it whose upper triangle holds S."""
    if packed.numel() != lead.numel() * triangle_numel(n):
        raise ValueError(
            f"matrices of shape {(*lead, n, n)} pack into {lead.numel()} × {triangle_numel(n)} elements, "
            f"not into {tuple(packed.shape)}"
        )
    half = n // 2
    if n % 2:
        rectangle = packed.view(*lead, n, half + 1)
        return rectangle, rectangle[..., :half, 1:]
    rectangle = packed.view(*lead, n + 1, half)
    return rectangle, rectangle[..., :half, :]


def _columns(rectangle: Tensor, n: int) -> Tensor:
    """The rows of the rectangle that hold A[:, :m]: one lower when n is even."""
    return rectangle if n % 2 else rectangle[..., 1:, :]
