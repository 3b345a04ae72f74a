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

No element has an index of its own: there are no index arrays to build, to keep or to gather by.
"""

from __future__ import annotations

from torch import Tensor

from kfac_dist.distributed.cost import triangle_numel


def packed_numel(matrix: Tensor) -> int:
    """Elements that the symmetric matrices [..., n, n] take when packed."""
    n = matrix.shape[-1]
    return matrix.shape[:-2].numel() * triangle_numel(n)


def pack_symmetric(matrix: Tensor, out: Tensor) -> None:
    """Writes the lower triangles of symmetric matrices into a flat buffer.

    Args:
        matrix: Symmetric matrices [..., n, n].
        out: 1-D view of `packed_numel(matrix)` elements, contiguous; of another dtype, it is converted.
    """
    n = matrix.shape[-1]
    m = (n + 1) // 2
    rectangle, corner = _views(out, matrix)
    first_row = (n + 1) % 2
    rectangle[..., first_row:, :].copy_(matrix[..., :, :m])
    if corner.numel():
        # The lower part of the corner belongs to A[:, :m]; S goes above it, with its diagonal.
        corner.copy_(corner.tril(-1).add_(matrix[..., m:, m:].triu().to(corner.dtype)))


def unpack_symmetric(packed: Tensor, out: Tensor) -> None:
    """Writes full symmetric matrices [..., n, n] from what `pack_symmetric` made of them.

    Args:
        packed: 1-D, contiguous, n(n+1)/2 elements a matrix.
        out: Where the matrices go, both triangles; of another dtype, they are converted.
    """
    n = out.shape[-1]
    m = (n + 1) // 2
    rectangle, corner = _views(packed, out)
    columns = rectangle[..., (n + 1) % 2 :, :]
    _mirror(columns[..., :m, :].tril(), out[..., :m, :m], strict=-1)
    if corner.numel():
        out[..., m:, :m].copy_(columns[..., m:, :])
        out[..., :m, m:].copy_(columns[..., m:, :].mT)
        _mirror(corner.triu(), out[..., m:, m:], strict=1)


def _views(packed: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The packed rectangle, and the k×k corner of it whose upper triangle holds S."""
    n = matrix.shape[-1]
    if packed.dim() != 1 or packed.numel() != packed_numel(matrix):
        raise ValueError(
            f"{tuple(matrix.shape)} packs into {packed_numel(matrix)} elements, not into {tuple(packed.shape)}"
        )
    half = n // 2
    if n % 2:
        rectangle = packed.view(*matrix.shape[:-2], n, half + 1)
        return rectangle, rectangle[..., :half, 1:]
    rectangle = packed.view(*matrix.shape[:-2], n + 1, half)
    return rectangle, rectangle[..., :half, :]


def _mirror(triangle: Tensor, out: Tensor, *, strict: int) -> None:
    """Writes a triangular matrix plus its mirror image; `strict` names the triangle without its diagonal."""
    image = triangle.tril(strict) if strict < 0 else triangle.triu(strict)
    out.copy_(triangle + image.mT)
