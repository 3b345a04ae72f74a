"""Batches are plans: the same for any number of ranks, a partition of every epoch, resumable from two integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.config.schema import BatchGrowth
from kfac_dist.errors import DataError
from kfac_dist.training.data.sampler import Position, Sampler, micro_batches, split


@given(count=st.integers(0, 200), parts=st.integers(1, 20))
def test_split_is_contiguous_and_near_equal_with_the_longer_parts_first(count: int, parts: int) -> None:
    ranges = split(count, parts)
    assert [index for part in ranges for index in part] == list(range(count))
    lengths = [len(part) for part in ranges]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


@given(data=st.data(), world_size=st.integers(1, 6), accumulate=st.integers(1, 5))
def test_ranks_and_micro_batches_partition_the_global_batch(
    data: st.DataObject, world_size: int, accumulate: int
) -> None:
    count = data.draw(st.integers(world_size, 60))
    parts = [micro_batches(count, rank, world_size, accumulate) for rank in range(world_size)]
    assert [index for mine in parts for window in mine for index in window] == list(range(count))
    assert len({len(mine) for mine in parts}) == 1, "every rank runs the same number of forward passes"
    assert all(len(window) for mine in parts for window in mine)


@given(size=st.integers(1, 100), batch_size=st.integers(1, 120), seed=st.integers(0, 2**20))
def test_an_epoch_uses_every_sample_once(size: int, batch_size: int, seed: int) -> None:
    sampler = Sampler(size, batch_size, seed)
    batches = list(sampler.epoch(Position(3)))
    assert len(batches) == sampler.steps(1)
    assert torch.cat([batch.indices for batch in batches]).sort().values.tolist() == list(range(size))
    assert sampler.after(batches[-1]) == Position(4, 0, len(batches))


def test_epochs_and_seeds_shuffle_differently() -> None:
    orders = [
        next(Sampler(50, 50, seed).epoch(Position(epoch))).indices.tolist() for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_an_epoch_continues_where_it_was_left() -> None:
    sampler = Sampler(23, 5, seed=1)
    batches = list(sampler.epoch(Position(2)))
    rest = list(sampler.epoch(sampler.after(batches[1])))
    assert [batch.indices.tolist() for batch in rest] == [batch.indices.tolist() for batch in batches[2:]]


@pytest.mark.parametrize(
    ("size", "batch_size", "world_size", "start", "message"),
    [
        (100, 2, 3, Position(), "a batch of 2 samples can't feed 3 ranks"),
        (101, 10, 2, Position(), "the last batch of an epoch has 1 of 101 samples for 2 ranks"),
        (100, 10, 2, Position(0, 9), "the last batch of an epoch has 1 of 100 samples for 2 ranks"),
    ],
)
def test_batches_that_starve_a_rank_are_refused(
    size: int, batch_size: int, world_size: int, start: Position, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Sampler(size, batch_size, 0).check(world_size, start)


def _growing(size: int, first: int, final: int, steps: int) -> Sampler:
    return Sampler(size, first, 0, BatchGrowth(final=final, steps=steps))


def test_a_batch_grows_exponentially_and_then_stays() -> None:
    sampler = _growing(10**6, 1000, 16000, 4)
    assert [sampler.batch_size_at(step) for step in range(7)] == [1000, 2000, 4000, 8000, 16000, 16000, 16000]
    assert _growing(5000, 1000, 16000, 4).batch_size_at(4) == 5000, "never more than there is"


@given(
    size=st.integers(20, 400),
    first=st.integers(6, 50),
    growth=st.integers(1, 400),
    steps=st.integers(1, 12),
    epochs=st.integers(1, 4),
)
def test_growing_batches_use_every_sample_once_an_epoch(
    size: int, first: int, growth: int, steps: int, epochs: int
) -> None:
    sampler = _growing(size, first, first + growth, steps)
    position = Position()
    for epoch in range(epochs):
        batches = list(sampler.epoch(position))
        assert torch.cat([batch.indices for batch in batches]).sort().values.tolist() == list(range(size))
        for batch in batches:
            wanted = sampler.batch_size_at(batch.position.step)
            assert min(first, size) / 2 <= len(batch.indices) < 1.5 * wanted
        halfway = sampler.after(batches[len(batches) // 2])
        if halfway.epoch == epoch:  # resumed there, it is the same plan
            rest = [batch.indices.tolist() for batch in sampler.epoch(halfway)]
            assert rest == [batch.indices.tolist() for batch in batches[len(batches) // 2 + 1 :]]
        position = sampler.after(batches[-1])
        assert position.epoch == epoch + 1
    assert position.step == sampler.steps(epochs)


def test_growing_batches_need_two_samples_a_rank() -> None:
    _growing(100, 6, 50, 10).check(3, Position())
    with pytest.raises(DataError, match=r"can't feed 4 ranks: raise train\.batch_size to at least 8"):
        _growing(100, 6, 50, 10).check(4, Position())


def test_good_batches_are_accepted() -> None:
    for size, ranks in ((102, 2), (3, 3)):
        sampler = Sampler(size, 10, 0)
        sampler.check(ranks, Position())
        assert min(len(batch.indices) for batch in sampler.epoch(Position())) >= ranks
        with pytest.raises(DataError, match=f"for {ranks + 1} ranks|can't feed {ranks + 1} ranks"):
            sampler.check(ranks + 1, Position())


def test_no_samples_is_refused() -> None:
    with pytest.raises(DataError, match="has no samples"):
        Sampler(0, 4, 0)
