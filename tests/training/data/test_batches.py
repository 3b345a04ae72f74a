"""Samples reach the model whole and in the planned order, whichever way they are stored."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from kfac_dist.errors import DataError
from kfac_dist.training.data.batches import InMemorySource, LoadedSource, Stream, evaluation_batches, source_of
from kfac_dist.training.data.sampler import Position, Sampler

CPU = torch.device("cpu")
INPUTS = torch.arange(22.0).view(11, 2)


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return INPUTS[index], index


def _memory() -> InMemorySource:
    return InMemorySource(TensorDataset(INPUTS, torch.arange(11)), CPU)


def _stream(source: Any, rank: int, world_size: int, accumulate: int = 1) -> Stream:
    return Stream(source, Sampler(11, 4, seed=5), rank=rank, world_size=world_size, accumulate=accumulate)


def test_each_kind_of_dataset_gets_its_source() -> None:
    assert isinstance(source_of(TensorDataset(INPUTS, INPUTS), CPU, 0), InMemorySource)
    assert isinstance(source_of(Pairs(), CPU, 0), LoadedSource)
    assert isinstance(source_of(TensorDataset(INPUTS), CPU, 0), LoadedSource)


def test_a_stream_can_only_be_read_from_its_beginning_and_is_refused() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(DataError, match=r"Endless has no length or can't be indexed: .* map-style"):
        source_of(Endless(), CPU, 0)


@pytest.mark.parametrize("source", [_memory(), source_of(Pairs(), CPU, 0)], ids=["memory", "loader"])
def test_ranks_together_see_the_global_batch_across_epochs(source: Any) -> None:
    alone = [step.micro_batches[0] for step in islice(_stream(source, 0, 1).steps(Position()), 7)]
    ranks = [list(islice(_stream(source, rank, 3).steps(Position()), 7)) for rank in range(3)]
    for step, whole in enumerate(alone):
        parts = [ranks[rank][step].micro_batches[0] for rank in range(3)]
        assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
        assert [part.first_sample for part in parts] == ([0, 2, 3] if len(whole.inputs) == 4 else [0, 1, 2])
    assert torch.cat([micro.targets for micro in alone[:3]]).sort().values.tolist() == list(range(11))
    assert torch.equal(alone[0].inputs, INPUTS[alone[0].targets])


def test_an_input_may_be_several_tensors_whichever_way_they_are_stored() -> None:
    class Two(Dataset[Any]):
        def __init__(self, named: bool) -> None:
            self.named = named

        def __len__(self) -> int:
            return 11

        def __getitem__(self, index: int) -> Any:
            parts = {"rows": INPUTS[index], "twice": 2 * index} if self.named else (INPUTS[index], 2 * index)
            return parts, index

    memory = source_of(TensorDataset(INPUTS, 2 * torch.arange(11), torch.arange(11)), CPU, 0)
    for source in (memory, source_of(Two(named=False), CPU, 0), source_of(Two(named=True), CPU, 0)):
        [micro] = next(_stream(source, 0, 1).steps(Position())).micro_batches
        rows, twice = micro.inputs.values() if isinstance(micro.inputs, dict) else micro.inputs
        assert torch.equal(rows, INPUTS[micro.targets])
        assert torch.equal(twice, 2 * micro.targets)


def test_accumulation_cuts_the_part_of_a_rank() -> None:
    step = next(_stream(_memory(), 1, 2, accumulate=2).steps(Position()))
    assert [micro.first_sample for micro in step.micro_batches] == [2, 3]
    assert [len(micro.inputs) for micro in step.micro_batches] == [1, 1]
    assert step.samples == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_continues_in_the_middle_of_an_epoch_and_leaves_the_random_state_alone(workers: int) -> None:
    source = LoadedSource(Pairs(), CPU, workers)
    before = torch.get_rng_state()
    steps = list(islice(_stream(source, 0, 1).steps(Position()), 5))
    again = list(islice(_stream(source, 0, 1).steps(steps[1].after), 3))
    expected = [step.micro_batches[0].targets.tolist() for step in steps[2:]]
    assert [step.micro_batches[0].targets.tolist() for step in again] == expected
    assert torch.equal(before, torch.get_rng_state())


def test_items_that_are_no_pairs_are_refused() -> None:
    source = LoadedSource(TensorDataset(INPUTS, INPUTS, INPUTS), CPU, 0)
    with pytest.raises(DataError, match=r"TensorDataset: an item must be a pair .* list of \(Tensor, Tensor, Tensor\)"):
        next(source.fetch([torch.arange(2)], seed=0))


def test_evaluation_covers_the_samples_once_over_all_ranks() -> None:
    seen = [
        target
        for rank in range(3)
        for counted, _, targets in evaluation_batches(_memory(), 7, 2, rank, 3)
        for target in targets.tolist()
        if counted
    ]
    assert seen == list(range(7))


def test_every_rank_passes_forward_equally_often() -> None:
    counted = [[counted for counted, *_ in evaluation_batches(_memory(), 7, 2, rank, 3)] for rank in range(3)]
    assert counted == [[True, True], [True, False], [True, False]]
    [(counts, _, targets)] = evaluation_batches(_memory(), 1, 2, 1, 2)
    assert not counts
    assert targets.tolist() == [0], "the first sample stands in"
