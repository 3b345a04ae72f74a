"""`packing`'s layout in one pass over memory each way, by Triton kernels.

    pack      a tile of the rectangle     reads A below the diagonal, or S's mirrored element, and writes it converted
    unpack    a tile of the matrix        reads the packed element of (max(i, j), min(i, j)), and writes it

Made of copies of whole blocks, packing goes over the corner three times and unpacking makes four triangles first. Only
`packing` imports this module, and only for tensors on a GPU: torch brings Triton there.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_TILE = 32


@triton.jit  # type: ignore[untyped-decorator]
def _pack(  # type: ignore[no-untyped-def]
    matrix,
    packed,
    n,
    columns,
    numel,
    stride_batch,
    stride_row,
    stride_column,
    ODD: tl.constexpr,
    TILE: tl.constexpr,
):
    r = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    c = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    batch = tl.program_id(2).to(tl.int64)
    inside = (r < n + 1 - ODD) & (c < columns)
    i = r - (1 - ODD)  # the row of A[:, :m] that this one of the rectangle holds
    first = (n + 1) // 2
    below = i >= c
    row = tl.where(below, i, first + c - ODD)
    column = tl.where(below, c, first + r)
    place = batch * stride_batch + row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
    values = tl.load(matrix + place, mask=inside)
    tl.store(packed + batch * numel + r.to(tl.int64) * columns + c, values, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _unpack(  # type: ignore[no-untyped-def]
    packed,
    matrix,
    n,
    columns,
    numel,
    stride_batch,
    stride_row,
    stride_column,
    ODD: tl.constexpr,
    TILE: tl.constexpr,
):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    batch = tl.program_id(2).to(tl.int64)
    inside = (i < n) & (j < n)
    low, high = tl.maximum(i, j), tl.minimum(i, j)
    first = (n + 1) // 2
    left = high < first
    r = tl.where(left, low + 1 - ODD, high - first)
    c = tl.where(left, high, low - first + ODD)
    values = tl.load(packed + batch * numel + r.to(tl.int64) * columns + c, mask=inside)
    place = batch * stride_batch + i.to(tl.int64) * stride_row + j.to(tl.int64) * stride_column
    tl.store(matrix + place, values, mask=inside)


def pack(matrix: Tensor, out: Tensor) -> None:
    """Write the lower triangles of `[batch, n, n]`, of any strides, into a contiguous `[batch, n(n+1)/2]`."""
    _launch(_pack, matrix, out, rows=matrix.shape[-1] + 1, columns=(matrix.shape[-1] + 1) // 2)


def unpack(packed: Tensor, out: Tensor) -> None:
    """Write the symmetric matrices of a contiguous `[batch, n(n+1)/2]` into `[batch, n, n]`, of any strides."""
    _launch(_unpack, packed, out, rows=out.shape[-1], columns=out.shape[-1])


def _launch(kernel: Any, source: Tensor, target: Tensor, *, rows: int, columns: int) -> None:
    matrix = source if kernel is _pack else target
    batch, n, _ = matrix.shape
    if not batch * n:
        return
    grid = (triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE), batch)
    width = n // 2 + 1 if n % 2 else n // 2
    kernel[grid](source, target, n, width, n * (n + 1) // 2, *matrix.stride(), ODD=n % 2, TILE=_TILE)
