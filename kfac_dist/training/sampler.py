"""Which samples a step uses, and which of them this rank and this micro-batch take: plans, without data.

The global batch of a step is a function of (seed, epoch, offset) alone, the same for any number of ranks; a rank takes
a contiguous part of it, and micro-batches are contiguous parts of that:

    epoch's permutation   [ . . . . . . . . . . . . . . . . . . ]
    global batch                  [ 0 1 2 3 4 5 6 ]
    rank                          [ 0 . . . | 1 . . ]          uneven: the first n % W ranks take one more
    micro-batch                   [ 0 . | 1 . | 0 . | 1 ]

Resuming therefore needs two integers, and the number of ranks may change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kfac_dist.errors import DataError


@dataclass(frozen=True)
class Position:
    """Where in the data a run stands: `offset` samples of `epoch` are used."""

    epoch: int = 0
    offset: int = 0


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one optimizer step, over all ranks.

    Attributes:
        position: Where the batch starts.
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

    Raises:
        DataError: The dataset is empty.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        if size < 1:
            raise DataError("the training data has no samples")
        self.size = size
        self.batch_size = min(batch_size, size)
        self.seed = seed

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch, the short one included."""
        return -(-self.size // self.batch_size)

    def check(self, world_size: int, start: Position) -> None:
        """Refuse batches that have no sample for some rank.

        Raises:
            DataError: A full batch, or the last one of an epoch, has fewer samples than there are ranks.
        """
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
        order = self._order(start.epoch)
        for offset in range(start.offset, self.size, self.batch_size):
            yield GlobalBatch(Position(start.epoch, offset), order[offset : offset + self.batch_size])

    def after(self, batch: GlobalBatch) -> Position:
        """Return the position that follows a batch."""
        end = batch.position.offset + len(batch.indices)
        return Position(batch.position.epoch + 1) if end >= self.size else Position(batch.position.epoch, end)

    def _order(self, epoch: int) -> Tensor:
        # A digest, because torch's CPU generator reads 32 bits of its seed: those of seed and epoch together.
        digest = hashlib.blake2b(f"{self.seed}/{epoch}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        return torch.randperm(self.size, generator=generator)


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
        rank: Whose part.
        world_size: Number of ranks.
        accumulate: Micro-batches of a full step.
    """
    mine = split(count, world_size)[rank]
    windows = min(accumulate, count // world_size)
    return [range(mine.start + part.start, mine.start + part.stop) for part in split(len(mine), windows)]
