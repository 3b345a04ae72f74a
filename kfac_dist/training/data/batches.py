"""Brings the samples that the sampler planned to the device: cut out of memory, or through a `DataLoader`.

A step's batch, and the numbers of its loss's terms.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from kfac_dist.errors import DataError
from kfac_dist.inputs import Inputs, each, is_inputs
from kfac_dist.training.data.sampler import Position, Sampler, micro_batches, split
from kfac_dist.training.passes import user_line
from kfac_dist.training.recovery.preemption import SIGNALS


@dataclass(frozen=True)
class LoadedBatch:
    """Samples of one forward pass on this rank.

    Attributes:
        first_sample: Index of the first of them in the step's global batch.
        inputs: The model's inputs, each tensor `[samples, ...]`, on the device.
        targets: The loss's targets, `[samples, ...]`, on the device.
    """

    first_sample: int
    inputs: Inputs
    targets: Tensor


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of one optimizer step.

    Attributes:
        samples: Samples of the step over all ranks.
        micro_batches: This rank's part.
        after: Position of the data after this step.
    """

    samples: int
    micro_batches: list[LoadedBatch]
    after: Position


class Source(Protocol):
    """A dataset on its way to the device."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def fetch(self, plan: Sequence[Tensor], seed: int) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield `(inputs, targets)` on the device for each tensor of sample indices in the plan."""


class InMemorySource:
    """Tensors that live on the device: a batch is one indexed read of each; the last of them is the target."""

    def __init__(self, dataset: TensorDataset, device: torch.device) -> None:
        *inputs, self.targets = (tensor.to(device) for tensor in dataset.tensors)
        self.inputs: Inputs = inputs[0] if len(inputs) == 1 else tuple(inputs)
        self.device = device

    def __len__(self) -> int:
        return self.targets.shape[0]

    def fetch(self, plan: Sequence[Tensor], seed: int) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield each batch of the plan."""
        for indices in plan:
            on_device = indices.to(self.device, non_blocking=True)
            cut = partial(torch.index_select, dim=0, index=on_device)
            yield each(cut, self.inputs), cut(self.targets)


class LoadedSource:
    """Any other map-style dataset of `(input, target)` pairs, through a `DataLoader` with the default collation."""

    def __init__(self, dataset: Dataset[Any], device: torch.device, workers: int) -> None:
        self.dataset = dataset
        self.device = device
        self.workers = workers

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # checked by `source_of`

    def fetch(self, plan: Sequence[Tensor], seed: int) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield each batch of the plan.

        Raises:
            DataError: The dataset raises, its items can't be stacked, or they are not pairs of tensors.
        """
        loader = DataLoader(
            self.dataset,
            batch_sampler=[indices.tolist() for indices in plan],
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            # Its own generator: the loader's base seed must not advance the run's random state.
            generator=torch.Generator().manual_seed(seed),
            worker_init_fn=_leave_signals_to_the_rank,
        )
        for item in self._items(loader):
            if not (isinstance(item, list | tuple) and len(item) == 2 and _is_pair(*item)):
                raise DataError(
                    f"{type(self.dataset).__name__}: an item must be a pair (input, target), each a tensor, an array "
                    "or a number, or the input a tuple or dict of these; batches of it came out as "
                    f"{_describe(item)}"
                )
            inputs, targets = item
            inputs = tuple(inputs) if isinstance(inputs, list) else inputs
            move = partial(Tensor.to, device=self.device, non_blocking=True)
            yield each(move, inputs), move(targets)

    def _items(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Yield the loader's batches; after any exception of the dataset's own code the run can't continue."""
        try:
            yield from loader
        except Exception as error:
            # A worker's error carries its traceback as text: the last line is the error.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"{type(self.dataset).__name__}: reading samples fails with {type(error).__name__}: {lines[-1]}"
                f"{user_line(error)}; every item must be a pair (input, target) of equal shapes"
            ) from error


def source_of(dataset: Dataset[Any], device: torch.device, workers: int) -> Source:
    """Choose how a dataset gets to the device.

    Raises:
        DataError: The dataset can't be indexed by sample.
    """
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) >= 2:
        return InMemorySource(dataset, device)
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(
            f"{type(dataset).__name__} has no length or can't be indexed: train and test must be map-style datasets "
            "(torch.utils.data.Dataset with __len__ and __getitem__)"
        )
    return LoadedSource(dataset, device, workers)


class Stream:
    """This rank's part of the steps of a run, one after the other, without end.

    Args:
        source: The training data.
        sampler: The sampler of each step's samples.
        rank: This rank.
        world_size: Number of ranks.
        accumulate: Micro-batches of a step.
    """

    def __init__(self, source: Source, sampler: Sampler, *, rank: int, world_size: int, accumulate: int) -> None:
        self.source = source
        self.sampler = sampler
        self.rank = rank
        self.world_size = world_size
        self.accumulate = accumulate

    def steps(self, start: Position) -> Generator[StepBatch]:
        """Yield the steps from a position on; closed, it ends the processes that load samples."""
        position = start
        while True:
            for step in self._epoch(position):
                position = step.after
                yield step

    def _epoch(self, start: Position) -> Iterator[StepBatch]:
        batches = list(self.sampler.epoch(start))
        parts = [micro_batches(len(batch.indices), self.rank, self.world_size, self.accumulate) for batch in batches]
        plan = [
            batch.indices[part.start : part.stop]
            for batch, ranges in zip(batches, parts, strict=True)
            for part in ranges
        ]
        fetched = self.source.fetch(plan, seed=self.sampler.seed + start.epoch)
        for batch, ranges in zip(batches, parts, strict=True):
            tensors = islice(fetched, len(ranges))
            micro = [LoadedBatch(part.start, *pair) for part, pair in zip(ranges, tensors, strict=True)]
            yield StepBatch(len(batch.indices), micro, self.sampler.after(batch))


def evaluation_batches(
    source: Source, samples: int, batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[bool, Inputs, Tensor]]:
    """Yield this rank's part of the first `samples` samples, in order, in batches of at most `batch_size`.

    Every rank gets as many batches as the one that has the most, because under sharded engines a forward pass is a
    collective. The first value tells whether a batch counts: those that only make up the number hold the first sample.
    """
    parts = split(samples, world_size)
    most = max(-(-len(part) // batch_size) for part in parts)
    mine = torch.arange(parts[rank].start, parts[rank].stop)
    plan = list(mine.split(batch_size)) if len(mine) else []
    batches = source.fetch([*plan, *[torch.arange(1)] * (most - len(plan))], seed=0)
    for place, (inputs, targets) in enumerate(batches):
        yield place < len(plan), inputs, targets


def _leave_signals_to_the_rank(worker: int) -> None:
    """Ignore a scheduler's signals to all processes of a job: the rank needs its samples up to the next boundary.

    A worker ends when its rank says so, or is gone.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _is_pair(inputs: object, targets: object) -> bool:
    return is_inputs(inputs) and isinstance(targets, Tensor)


def _describe(item: object) -> str:
    if isinstance(item, list | tuple):
        return f"{type(item).__name__} of ({', '.join(type(part).__name__ for part in item)})"
    return type(item).__name__


@dataclass(frozen=True)
class TermCounts:
    """Loss terms of a step.

    Attributes:
        here: Of each of this rank's micro-batches, on the device; None where the number of samples says it.
        everywhere: Of all ranks and micro-batches together; at least 1.
    """

    here: Sequence[Tensor | None]
    everywhere: int | Tensor
