"""The samples of a step, of this rank and of this micro-batch: plans, without data.

The global batch of a step is a function of (seed, epoch, offset, step) alone, the same for any number of ranks; a rank
takes a contiguous part of it, and micro-batches are contiguous parts of that:

    epoch's permutation   [ . . . . . . . . . . . . . . . . . . ]
    global batch                  [ 0 1 2 3 4 5 6 ]
    rank                          [ 0 . . . | 1 . . ]          uneven: the first n % W ranks take one more
    micro-batch                   [ 0 . | 1 . | 0 . | 1 ]

Resuming therefore needs three integers, and the number of ranks may change. The step matters to batches that grow.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kfac_dist.config.schema import BatchGrowth, TrainConfig
from kfac_dist.errors import DataError


@dataclass(frozen=True)
class Position:
    """A run's position in the data: `offset` samples of `epoch` are used, after `step` optimizer steps."""

    epoch: int = 0
    offset: int = 0
    step: int = 0


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one optimizer step, over all ranks.

    Attributes:
        position: First sample of the batch.
        indices: Indices into the dataset, `[samples]` int64, in order.
    """

    position: Position
    indices: Tensor


class Sampler:
    """Cuts shuffled epochs into global batches; an epoch's last batch may be shorter.

    Args:
        size: Samples of the dataset.
        batch_size: Samples of a global batch.
        seed: Seed of the shuffles.
        growth: Growth of the batch; None keeps its size.

    Raises:
        DataError: The dataset is empty.
    """

    def __init__(self, size: int, batch_size: int, seed: int, growth: BatchGrowth | None = None) -> None:
        if size < 1:
            raise DataError("the training data has no samples")
        self.size = size
        self.batch_size = min(batch_size, size)
        self.seed = seed
        self._growth = growth

    def steps(self, epochs: int) -> int:
        """Return the batches of the first epochs, short ones included."""
        if self._growth is None:
            return epochs * -(-self.size // self.batch_size)
        position = Position()
        while position.epoch < epochs:
            position = self._following(position, self._samples(position))
        return position.step

    def batch_size_at(self, step: int) -> int:
        """Return the samples of a step's batch, as far as the epoch has them."""
        if self._growth is None:
            return self.batch_size
        share = min(1.0, step / self._growth.steps)
        ratio = self._growth.final / self.batch_size
        return min(self.size, round(self.batch_size * math.pow(ratio, share)))

    def check(self, world_size: int, start: Position) -> None:
        """Refuse batches that have no sample for some rank.

        Raises:
            DataError: A full batch, or the last one of an epoch, has fewer samples than there are ranks.
        """
        if self._growth is not None:
            self._check_growing(world_size, self.size - start.offset)
            return
        if self.batch_size < world_size:
            raise DataError(
                f"a batch of {self.batch_size} samples can't feed {world_size} ranks: "
                "raise train.batch_size or use fewer ranks"
            )
        for left in (self.size, self.size - start.offset):
            last = left % self.batch_size
            if 0 < last < world_size:
                raise DataError(
                    f"the last batch of an epoch has {last} of {self.size} samples for {world_size} ranks: "
                    f"choose a train.batch_size (now {self.batch_size}) that leaves none, or at least {world_size}"
                )

    def epoch(self, start: Position) -> Iterator[GlobalBatch]:
        """Yield the batches that are left of one epoch."""
        order, position = self._order(start.epoch), start
        while position.epoch == start.epoch:
            samples = self._samples(position)
            yield GlobalBatch(position, order[position.offset : position.offset + samples])
            position = self._following(position, samples)

    def after(self, batch: GlobalBatch) -> Position:
        """Return the position that follows a batch."""
        return self._following(batch.position, len(batch.indices))

    def _samples(self, position: Position) -> int:
        """Return the samples of the batch at a position."""
        wanted, left = self.batch_size_at(position.step), self.size - position.offset
        if self._growth is not None and 2 * (left - wanted) < wanted:
            return left
        return min(wanted, left)

    def _following(self, position: Position, samples: int) -> Position:
        end, step = position.offset + samples, position.step + 1
        return Position(position.epoch + 1, 0, step) if end >= self.size else Position(position.epoch, end, step)

    def _check_growing(self, world_size: int, left: int) -> None:
        """Refuse growing batches of which some may have too few samples: the shortest has half of what is asked."""
        if self.batch_size < 2 * world_size or left < world_size:
            raise DataError(
                f"a growing batch of {self.batch_size} samples at first, and half of that at an epoch's end, can't "
                f"feed {world_size} ranks: raise train.batch_size to at least {2 * world_size} or use fewer ranks"
            )

    def _order(self, epoch: int) -> Tensor:
        # A digest, because torch's CPU generator reads 32 bits of its seed: those of seed and epoch together.
        digest = hashlib.blake2b(f"{self.seed}/{epoch}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        return torch.randperm(self.size, generator=generator)


def sampler_of(config: TrainConfig, size: int, seed: int) -> Sampler:
    """Return the sampler of a run over a dataset of `size` samples."""
    return Sampler(size, config.batch_size, seed, config.batch_growth)


def split(count: int, parts: int) -> list[range]:
    """Cut `range(count)` into contiguous near-equal ranges, the first `count % parts` of them one longer."""
    short, longer = divmod(count, parts)
    starts = [part * short + min(part, longer) for part in range(parts + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


def micro_batches(count: int, rank: int, world_size: int, accumulate: int) -> list[range]:
    """Return the parts of a global batch that one rank takes, one range a micro-batch.

    Every rank gets the same number of them (they may hold collectives, SyncBatchNorm's say), so a short batch is cut
    into fewer.

    Args:
        count: Samples of the global batch; at least `world_size`.
        rank: The rank of the part.
        world_size: Number of ranks.
        accumulate: Micro-batches of a full step.
    """
    mine = split(count, world_size)[rank]
    windows = min(accumulate, count // world_size)
    return [range(mine.start + part.start, mine.start + part.stop) for part in split(len(mine), windows)]
