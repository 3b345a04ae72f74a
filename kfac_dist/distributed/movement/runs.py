"""Runs of a tensor's elements, in row-major order, as views: a flat slice of a parameter as parts of a matrix.

A weight's rows lie apart where a bias is the matrix's last column, so that a flat run of elements is at most three
views: the rest of a row, whole rows, the beginning of a row.

         ┌──────────────┐
         │      ████████│     rows [start, stop) = rest of a row
         │██████████████│                          + whole rows
         │██████████████│
         │████          │                          + beginning of a row
         └──────────────┘
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_rows(view: Tensor) -> Tensor | None:
    """Return `[R, C]` with the elements of `view` in the same order and memory; None if no such view exists."""
    sides = [(size, stride) for size, stride in zip(view.shape, view.stride(), strict=True) if size != 1]
    merged: list[tuple[int, int]] = []
    for size, stride in sides:
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    (rows, row_stride), (columns, column_stride) = [(1, 1), (1, 1), *merged][-2:]
    return view.as_strided((rows, columns), (row_stride, column_stride))


def runs(rows: Tensor, start: int, stop: int) -> list[Tensor]:
    """Return views that hold elements [start, stop) of `[R, C]`, in order."""
    columns = rows.shape[1]
    first, left = divmod(start, columns)
    last, right = divmod(stop, columns)
    if first == last:
        return [rows[first, left:right]] if left < right else []
    found = []
    if left:
        found.append(rows[first, left:])
        first += 1
    if first < last:
        found.append(rows[first:last])
    if right:
        found.append(rows[last, :right])
    return found


def cut_like(flat: Tensor, views: Sequence[Tensor]) -> list[Tensor]:
    """Cut a 1-D tensor into consecutive pieces shaped like `views`, which it has as many elements as."""
    pieces = torch.split(flat, [view.numel() for view in views]) if views else ()
    return [piece.view(view.shape) for piece, view in zip(pieces, views, strict=True)]
