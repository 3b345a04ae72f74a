from __future__ import annotations

import pytest
import torch

from kfac_dist.distributed.movement.gradient_layout import GradientLayout, ParameterSlices, Slice


def test_replicated_is_held_in_full_by_everyone() -> None:
    layout = GradientLayout((ParameterSlices.replicated("w", (2, 3)), ParameterSlices.replicated("none", (0,))), 4)
    assert layout.is_replicated
    assert layout.held_by(3) == {"w": Slice(3, 0, 6)}
    assert "w" in layout
    assert "b" not in layout


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(5, 3), (3,), (2, 2, 2), (9, 1)])
def test_rows_are_those_of_chunk(size: int, shape: tuple[int, ...]) -> None:
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    parameter = ParameterSlices.rows("w", shape, size)
    chunks = numbers.chunk(size)
    for rank in range(size):
        held = parameter.held_by(rank)
        expected = chunks[rank].flatten().tolist() if rank < len(chunks) else []
        assert ([] if held is None else numbers.flatten()[held.start : held.stop].tolist()) == expected


def test_ranges_come_in_any_order_and_empty_ones_are_dropped() -> None:
    parameter = ParameterSlices.sharded("w", (10,), [Slice(2, 4, 10), Slice(1, 4, 4), Slice(0, 0, 4)])
    assert parameter.slices == (Slice(0, 0, 4), Slice(2, 4, 10))
    layout = GradientLayout((parameter, ParameterSlices.replicated("b", (1,))), 3)
    assert not layout.is_replicated
    assert layout.held_by(1) == {"b": Slice(1, 0, 1)}
    assert layout.held_by(2) == {"w": Slice(2, 4, 10), "b": Slice(2, 0, 1)}


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([Slice(0, 0, 4), Slice(1, 5, 10)], r"w: Slice\(rank=1, start=5, stop=10\) does not begin at element 4"),
        ([Slice(0, 0, 6), Slice(1, 5, 10)], "does not begin at element 6"),
        ([Slice(0, 0, 9)], "its slices end at element 9 of 10"),
        ([], "its slices end at element 0 of 10"),
        ([Slice(0, 0, 4), Slice(0, 4, 10)], "a rank holds two slices"),
    ],
)
def test_slices_that_do_not_tile_are_refused(slices: list[Slice], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParameterSlices.sharded("w", (10,), slices)


def test_empty_slice_is_refused_where_it_is_not_dropped() -> None:
    with pytest.raises(ValueError, match="is empty"):
        ParameterSlices("w", (1,), (Slice(0, 0, 0), Slice(1, 0, 1)))


def test_bad_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="two parameters share a name"):
        GradientLayout((ParameterSlices.replicated("w", (1,)), ParameterSlices.replicated("w", (1,))), 1)
    with pytest.raises(ValueError, match="belongs to none of 2 ranks"):
        GradientLayout((ParameterSlices.sharded("w", (1,), [Slice(2, 0, 1)]),), 2)
