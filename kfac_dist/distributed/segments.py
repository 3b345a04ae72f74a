"""One flat buffer whose contiguous segments belong to ranks: how results leave their owners and sums reach them.

    buffer   | owner 0: a, d | owner 1: b | owner 2: – | owner 3: c, e |      the same layout on every rank

    share_segments      every owner broadcasts its part; afterwards all ranks hold all of it
    reduce_to_owners    every rank sends each owner its part of the sum; afterwards the owner holds its part summed

The number of collectives depends on the number of ranks, never on the number of segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.distributed.communicator import Communicator, Work


@dataclass(frozen=True)
class Segment:
    """A named run of elements that belongs to one rank."""

    name: str
    numel: int
    owner: int


class SegmentLayout:
    """Where each segment lies: by owner, and within one owner in the order given.

    Raises:
        ValueError: Two segments share a name, an owner is no rank, or a size is negative.
    """

    def __init__(self, segments: Iterable[Segment], size: int) -> None:
        given = tuple(segments)
        for segment in given:
            if not 0 <= segment.owner < size or segment.numel < 0:
                raise ValueError(f"{segment} does not fit {size} ranks")
        self.size = size
        self.segments = tuple(sorted(given, key=lambda segment: segment.owner))  # stable
        self._starts: dict[str, int] = {}
        start = 0
        for segment in self.segments:
            if segment.name in self._starts:
                raise ValueError(f"two segments are named {segment.name!r}")
            self._starts[segment.name] = start
            start += segment.numel
        self._numels = {segment.name: segment.numel for segment in self.segments}
        self.numel = start
        owner_numels = [0] * size
        for segment in self.segments:
            owner_numels[segment.owner] += segment.numel
        self.owner_numels = tuple(owner_numels)
        self._owner_starts = (0, *itertools.accumulate(self.owner_numels))

    def owner_range(self, rank: int) -> tuple[int, int]:
        """First element of a rank's part of the buffer, and the one after its last."""
        return self._owner_starts[rank], self._owner_starts[rank + 1]

    def part(self, buffer: Tensor, rank: int) -> Tensor:
        """View of a rank's part of the buffer."""
        start, stop = self.owner_range(rank)
        return buffer[start:stop]

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """View of one segment in the whole buffer."""
        start = self._starts[name]
        return buffer[start : start + self._numels[name]]

    def view_in_part(self, part: Tensor, name: str, rank: int) -> Tensor:
        """View of one segment in its owner's part alone, as `reduce_to_owners` returns it."""
        start = self._starts[name] - self._owner_starts[rank]
        return part[start : start + self._numels[name]]


class _AllWork:
    """Several collectives in flight."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = works

    def wait(self) -> None:
        """Waits for all of them, in the order in which they were started."""
        for work in self._works:
            work.wait()


def share_segments(comm: Communicator, buffer: Tensor, layout: SegmentLayout, *, label: str) -> Work:
    """Gives every rank every owner's part of the buffer.

    All broadcasts are in flight before any is waited for. Owners without elements broadcast nothing, which all ranks
    read off the same layout.
    """
    _check(comm, buffer, layout)
    works = [
        comm.broadcast(layout.part(buffer, owner), owner, label=label)
        for owner in range(comm.size)
        if layout.owner_numels[owner]
    ]
    return _AllWork(works)


class PendingReduce:
    """A reduction to owners in flight."""

    def __init__(self, work: Work, received: Tensor, size: int) -> None:
        self._work = work
        self._received = received
        self._size = size

    def wait(self) -> Tensor:
        """This rank's part, 1-D, summed over the ranks in fp32 whatever travelled; empty where it owns nothing."""
        self._work.wait()
        parts = self._received.view(self._size, -1) if self._received.numel() else self._received.view(1, 0)
        total = parts[0].to(torch.float32, copy=True)
        for part in parts[1:]:  # in the order of ranks: the sum has the same bits however the parts arrived
            total.add_(part)
        return total


def reduce_to_owners(comm: Communicator, buffer: Tensor, layout: SegmentLayout, *, label: str) -> PendingReduce:
    """Sums every segment over the ranks, on its owner alone.

    One all-to-all with uneven parts, and a sum on the owner: a rank sends exactly what it does not own, in the
    buffer's dtype, and what it owns is summed in fp32. (A reduce-scatter wants equal parts, hence padding; gloo has
    none, and it would sum bf16 in bf16.) The buffer may be written again once the result has been waited for.
    """
    _check(comm, buffer, layout)
    own = layout.owner_numels[comm.rank]
    received = buffer.new_empty(comm.size * own)
    work = comm.all_to_all(received, buffer, [own] * comm.size, layout.owner_numels, label=label)
    return PendingReduce(work, received, comm.size)


def split_buckets(numels: Sequence[int], buckets: int) -> tuple[tuple[int, int], ...]:
    """Cuts consecutive items into min(buckets, items) runs of nearly equal size, each (start, stop) in items.

    A cut falls between two items, at the one nearest to its ideal place: a run is larger than total / runs by at most
    its largest item.
    """
    count = min(buckets, len(numels))
    cumulated = (0, *itertools.accumulate(numels))
    cuts = [0]
    for index in range(1, count):
        ideal = cumulated[-1] * index / count
        # Every run, before the cut and after it, keeps an item.
        choices = range(cuts[-1] + 1, len(numels) - (count - index) + 1)
        cuts.append(min(choices, key=lambda cut: abs(cumulated[cut] - ideal)))
    cuts.append(len(numels))
    return tuple(itertools.pairwise(cuts)) if count else ()


def _check(comm: Communicator, buffer: Tensor, layout: SegmentLayout) -> None:
    if layout.size != comm.size or buffer.shape != (layout.numel,):
        raise ValueError(
            f"a layout of {layout.numel} elements over {layout.size} ranks does not fit a buffer of shape "
            f"{tuple(buffer.shape)} on {comm.size} ranks"
        )
