from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.distributed.communicators.traffic import broadcast_bytes
from kfac_dist.distributed.movement.owner_buffer import (
    MOST_BROADCASTS,
    MOST_RECEIVED,
    Segment,
    SegmentLayout,
    reduce_to_owners,
    share_segments,
    sharing_traffic,
    split_buckets,
)
from tests.harness import run_ranks


def layout_for(size: int, segments: int) -> SegmentLayout:
    """Uneven, interleaved; rank 1 owns nothing when there are three or more."""
    owners = [rank for rank in range(size) if rank != 1 or size < 3]
    return SegmentLayout((Segment(f"s{i}", 3 * i % 7, owners[i % len(owners)]) for i in range(segments)), size)


def test_segments_of_one_owner_lie_together() -> None:
    layout = SegmentLayout([Segment("a", 2, 0), Segment("b", 3, 1), Segment("c", 0, 3), Segment("d", 4, 0)], 4)
    assert [segment.name for segment in layout.segments] == ["a", "d", "b", "c"]
    assert layout.owner_numels == (6, 3, 0, 0)
    assert [layout.owner_range(rank) for rank in range(4)] == [(0, 6), (6, 9), (9, 9), (9, 9)]
    buffer = torch.arange(9)
    assert layout.view(buffer, "d").tolist() == [2, 3, 4, 5]
    assert layout.view_in_part(layout.part(buffer, 1), "b", 1).tolist() == [6, 7, 8]
    assert layout.view(buffer, "c").tolist() == []


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment("a", 1, 0), Segment("a", 1, 1)], "two segments are named 'a'"),
        ([Segment("a", 1, 2)], "does not fit 2 ranks"),
        ([Segment("a", -1, 0)], "does not fit 2 ranks"),
    ],
)
def test_bad_segments_are_refused(segments: list[Segment], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentLayout(segments, 2)


def test_buffer_that_does_not_fit_is_refused() -> None:
    layout = SegmentLayout([Segment("a", 3, 0)], 1)
    with pytest.raises(ValueError, match="a layout of 3 elements over 1 ranks, which takes a buffer of 3, does not"):
        share_segments(SoloCommunicator(), torch.zeros(4), layout, label="x")


def contribution(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(dtype)


def by_halves(values: list[torch.Tensor]) -> torch.Tensor:
    """The second half of the ranks is added to the first, until one is left; a middle one waits."""
    if len(values) == 1:
        return values[0]
    kept = (len(values) + 1) // 2
    sums = [a + b for a, b in zip(values[: len(values) - kept], values[kept:], strict=True)]
    return by_halves(sums + values[len(sums) : kept])


def share_and_reduce(segments: int, dtype: torch.dtype) -> dict[str, Any]:
    comm = build_communicator(20.0)
    layout = layout_for(comm.size, segments)
    shared = torch.full((layout.numel,), torch.nan, dtype=dtype)
    layout.part(shared, comm.rank).copy_(layout.part(torch.arange(layout.numel), comm.rank))
    share_segments(comm, shared, layout, label="share").wait()
    pending = reduce_to_owners(comm, contribution(comm.rank, layout.numel, dtype), layout, label="reduce")
    return {"shared": shared.float(), "reduced": pending.wait(), "traffic": comm.traffic.snapshot()}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("segments", "dtype"), [(10, torch.float32), (10, torch.bfloat16), (1, torch.float32)])
def test_share_and_reduce(size: int, segments: int, dtype: torch.dtype) -> None:
    layout = layout_for(size, segments)
    total = by_halves([contribution(rank, layout.numel, dtype).float() for rank in range(size)])
    results = run_ranks(size, share_and_reduce, segments, dtype)
    for rank, result in enumerate(results):
        assert torch.equal(result["shared"], torch.arange(layout.numel).to(dtype).float())
        assert result["reduced"].dtype is torch.float32
        # Summed in fp32, in an order that the number of ranks gives: equal to the last bit, whatever travelled.
        assert torch.equal(result["reduced"], layout.part(total, rank))
        if size > 1:
            owners = sum(1 for numel in layout.owner_numels if numel)
            own = layout.owner_numels[rank]
            assert result["traffic"].get("share", (0, 0)) == (
                owners,
                broadcast_bytes(own * dtype.itemsize, size),
            )
            assert sharing_traffic(layout.owner_numels, rank, dtype.itemsize) == result["traffic"].get("share", (0, 0))
            assert result["traffic"]["reduce"] == (1, (layout.numel - own) * dtype.itemsize)
    if size > 1:
        sent = sum(result["traffic"]["reduce"][1] for result in results)
        assert sent == (size - 1) * layout.numel * dtype.itemsize  # N times (N-1)/N · b: a reduce-scatter


SIZE = MOST_BROADCASTS + 2
UNEVEN = [
    [1, 2, 3, 4, 5, 6],
    [1000, 1, 1, 1, 1, 1],  # nearly all of one rank
    [0, 7, 7, 7, 7, 7],  # one owns nothing: its piece comes from others, and it scatters nothing
    [12, 12, 12, 12, 12, 12],  # every part is a piece: the scatter sends nothing
    [1, 1, 1, 0, 1, 1],  # fewer elements than ranks: a piece of one element, and the last is empty
    [3, 0, 0, 8, 8, 0],  # few enough owners to broadcast
]


def by_owner(numels: list[int]) -> SegmentLayout:
    return SegmentLayout([Segment(str(rank), numel, rank) for rank, numel in enumerate(numels)], len(numels))


def share_among_many(dtypes: list[torch.dtype]) -> list[tuple[bool, tuple[int, int]]]:
    """Shares of all layouts in flight at once: whether each rank has the owners' bits, and what was counted."""
    comm = build_communicator(20.0)
    found = []
    in_flight = []
    for index, (numels, dtype) in enumerate((numels, dtype) for dtype in dtypes for numels in UNEVEN):
        layout = by_owner(numels)
        expected = contribution(index, layout.numel, dtype)
        buffer = torch.full((layout.sharing_numel,), torch.nan, dtype=dtype)
        layout.part(buffer, comm.rank).copy_(layout.part(expected, comm.rank))
        in_flight.append((expected, buffer, share_segments(comm, buffer, layout, label=str(index))))
    for _, _, sharing in in_flight[::3]:
        sharing.start_second_phase()
    for index, (expected, buffer, sharing) in enumerate(in_flight):
        sharing.wait()
        sharing.wait()
        found.append((torch.equal(buffer[: len(expected)], expected), comm.traffic.snapshot()[str(index)]))
    return found


def reduce_among_many(dtypes: list[torch.dtype]) -> list[tuple[bool, tuple[int, int]]]:
    """Sums of all layouts in flight at once: whether owners have the bits of a sum by halves, and what was counted."""
    comm = build_communicator(20.0)
    found = []
    in_flight = []
    for index, (numels, dtype) in enumerate((numels, dtype) for dtype in dtypes for numels in UNEVEN):
        layout = by_owner(numels)
        own = contribution(comm.rank, layout.numel, dtype)
        in_flight.append((layout, dtype, reduce_to_owners(comm, own, layout, label=str(index))))
    for index, (layout, dtype, pending) in enumerate(in_flight):
        total = by_halves([contribution(rank, layout.numel, dtype).float() for rank in range(comm.size)])
        found.append((torch.equal(pending.wait(), layout.part(total, comm.rank)), comm.traffic.snapshot()[str(index)]))
    return found


def test_one_large_part_is_summed_in_pieces() -> None:
    dtypes = [torch.float32, torch.bfloat16]
    by_rank = run_ranks(SIZE, reduce_among_many, dtypes)
    for index, (dtype, numels) in enumerate((dtype, numels) for dtype in dtypes for numels in UNEVEN):
        assert all(found[index][0] for found in by_rank), numels
        calls, sent = zip(*(found[index][1] for found in by_rank), strict=True)
        pieces = SIZE * max(numels) > MOST_RECEIVED * sum(numels)
        assert set(calls) == {2 if pieces else 1}
        there = (SIZE - 1) * sum(numels) * dtype.itemsize  # what a reduce-scatter sends
        layout, piece = by_owner(numels), -(-sum(numels) // SIZE)
        ranges = [(layout.owner_range(rank), (rank * piece, rank * piece + piece)) for rank in range(SIZE)]
        stays = sum(max(0, min(part[1], summed[1]) - max(part[0], summed[0])) for part, summed in ranges)
        back = 4 * (sum(numels) - stays) if pieces else 0  # in fp32, whatever came
        assert sum(sent) == there + back, numels
    assert any(SIZE * max(numels) > MOST_RECEIVED * sum(numels) for numels in UNEVEN)


def test_sharing_among_many_owners_takes_two_collectives() -> None:
    dtypes = [torch.float32, torch.bfloat16]
    for rank, found in enumerate(run_ranks(SIZE, share_among_many, dtypes)):
        cases = [(numels, dtype.itemsize) for dtype in dtypes for numels in UNEVEN]
        for (numels, width), (equal, counted) in zip(cases, found, strict=True):
            assert equal, numels
            assert counted == sharing_traffic(numels, rank, width), numels
            owners = sum(1 for numel in numels if numel)
            assert counted[0] == (2 if owners > MOST_BROADCASTS else owners), numels


@settings(deadline=None)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=12))
def test_sharing_sends_every_byte_to_every_rank_and_is_balanced(numels: list[int]) -> None:
    layout, size = by_owner(numels), len(numels)
    sent = [sharing_traffic(numels, rank, 4)[1] for rank in range(size)]
    if not layout.scatters:
        assert sum(sent) == 4 * (size - 1) * layout.numel
        assert layout.sharing_numel == layout.numel
        return
    piece = layout.piece_numel
    assert layout.numel <= size * piece < layout.numel + size  # padding of less than an element a rank
    # Each rank sends its share to all others, and an owner before it what it owns beyond its piece.
    assert all(
        0 <= 4 * numel - (nbytes - 4 * (size - 1) * piece) <= 4 * piece
        for numel, nbytes in zip(numels, sent, strict=True)
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 8))
def test_buckets_partition_the_items_nearly_evenly(numels: list[int], buckets: int) -> None:
    runs = split_buckets(numels, buckets)
    assert len(runs) == min(buckets, len(numels))
    assert [item for start, stop in runs for item in range(start, stop)] == list(range(len(numels)))
    for start, stop in runs:
        assert stop > start
        assert sum(numels[start:stop]) <= sum(numels) / len(runs) + max(numels)


def test_number_of_buckets_does_not_grow_with_the_items() -> None:
    assert {len(split_buckets([7] * items, 4)) for items in (4, 40, 400)} == {4}
    assert split_buckets([5, 5, 1, 1, 1, 1, 1, 5], 4) == ((0, 1), (1, 2), (2, 7), (7, 8))
