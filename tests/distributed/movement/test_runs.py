from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kfac_dist.distributed.movement.runs import as_rows, cut_like, runs

MATRIX = torch.arange(2 * 4 * 7.0).view(2, 4, 7)
# Places of a weight in a gradient matrix: whole; beside a bias; transposed; a convolution's; a bias.
VIEWS = {
    "whole": MATRIX,
    "beside a bias": MATRIX[0, :, :6],
    "two groups": MATRIX[:, :, :6].flatten(0, 1),
    "transposed": MATRIX[0, :, :6].mT,
    "convolution": MATRIX[:, :, :6].unflatten(2, (3, 2)),
    "bias": MATRIX[:, :, 6],
    "one row": MATRIX[:1, :1, :6],
    "scalar": MATRIX[0, 0, 0],
}


@pytest.mark.parametrize("name", VIEWS)
def test_rows_are_the_same_memory_in_the_same_order(name: str) -> None:
    rows = as_rows(VIEWS[name])
    assert rows is not None
    assert rows.ndim == 2
    assert torch.equal(rows.flatten(), VIEWS[name].flatten())
    assert rows.untyped_storage().data_ptr() == MATRIX.untyped_storage().data_ptr()


def test_what_no_matrix_shows_has_no_rows() -> None:
    assert as_rows(MATRIX[:, :2, :6]) is None
    assert as_rows(MATRIX[:, :, :6].permute(1, 0, 2)) is None


@given(st.sampled_from(sorted(VIEWS)), st.integers(0, 60), st.integers(0, 60))
def test_runs_are_the_elements_asked_for(name: str, one: int, other: int) -> None:
    view: Tensor = VIEWS[name]
    start, stop = sorted((min(one, view.numel()), min(other, view.numel())))
    rows = as_rows(view)
    assert rows is not None
    found = runs(rows, start, stop)
    assert len(found) <= 3
    assert [value for run in found for value in run.flatten().tolist()] == view.flatten().tolist()[start:stop]
    flat = torch.arange(float(stop - start))
    pieces = cut_like(flat, found)
    assert [piece.shape for piece in pieces] == [run.shape for run in found]
    assert [value for piece in pieces for value in piece.flatten().tolist()] == flat.tolist()
