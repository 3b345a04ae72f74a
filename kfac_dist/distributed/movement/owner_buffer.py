"""One flat buffer whose contiguous segments belong to ranks: how results leave their owners and sums reach them.

    buffer   | owner 0: a, d | owner 1: b | owner 2: – | owner 3: c, e |      the same layout on every rank

    share_segments      every owner hands out its part; afterwards all ranks hold all of it
    reduce_to_owners    every rank sends each owner its part of the sum; afterwards the owner holds its part summed

Few owners share by one broadcast each. More do it in two collectives, however many they are (van de Geijn's broadcast,
Chan, Heimlich, Purkayastha & van de Geijn 2007, CCPE 19(13), §4, of all owners at once):

    owners' parts     | 0 0 0 0 0 0 0 | 1 1 1 | 3 3 3 3 3 |        15 elements on 4 ranks
    scatter           | r 0     | r 1     | r 2     | r 3  ┊ |     all_to_all: rank r gets the r-th 4th, of any owner
    all-gather        | 0 0 0 0 0 0 0 | 1 1 1 | 3 3 3 3 3 ┊ |      every rank gets the other pieces

Every rank then sends an equal share, however unevenly the parts are owned. Sums take the same way back where an owner
would otherwise receive many times the buffer: every rank sums a piece, and hands it to its owner.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kfac_dist.distributed.communicators.base import Communicator, Work
from kfac_dist.distributed.communicators.traffic import all_gather_bytes, broadcast_bytes
from kfac_dist.precision import widened

MOST_BROADCASTS = 4
"""Owners up to which each broadcasts its part.

Broadcasts of k owners one after the other take k latencies and send each byte along a link once; scatter and all-gather
take two, but the scatter comes on top: with k owners up to 1/k of the bytes, from the busiest. So a few broadcasts are
never slower, and their work can't be in flight while something else has to come first.
"""


MOST_RECEIVED = 4
"""Bound on what an owner receives of one sum at once, in multiples of the whole buffer.

Its part comes from every rank: with one large part among a thousand, a thousand times that part.
"""


@dataclass(frozen=True)
class Segment:
    """A named run of elements that belongs to one rank."""

    name: str
    numel: int
    owner: int


class SegmentLayout:
    """Places of segments: by owner, and within one owner in the order given.

    Attributes:
        size: Number of ranks.
        segments: All of them, as they lie in the buffer.
        numel: Elements of all.
        owner_numels: Elements by owner.
        scatters: Whether `share_segments` scatters and gathers, or broadcasts.
        piece_numel: Elements of a rank's piece in between.
        sharing_numel: Elements of the buffer of `share_segments`: `numel`, and its workspace behind them.

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
        self._cuts: dict[int, tuple[Sequence[int], Sequence[int]]] = {}
        self.scatters = scatters(self.owner_numels)
        self.piece_numel = piece_numel(self.owner_numels)
        self.sharing_numel = sharing_numel(self.owner_numels)

    def owner_range(self, rank: int) -> tuple[int, int]:
        """First element of a rank's part of the buffer, and the one after its last."""
        return self._owner_starts[rank], self._owner_starts[rank + 1]

    def cuts(self, rank: int) -> tuple[Sequence[int], Sequence[int]]:
        """Return the elements of a rank's part in each rank's piece, and of its piece that are each owner's."""
        if (
            rank not in self._cuts
        ):  # made once: among thousands of ranks it takes longer than a step's other bookkeeping
            pieces = [_piece(self.piece_numel, other) for other in range(self.size)]
            parts = [self.owner_range(other) for other in range(self.size)]
            self._cuts[rank] = (
                [_overlap(parts[rank], piece) for piece in pieces],
                [_overlap(part, pieces[rank]) for part in parts],
            )
        return self._cuts[rank]

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


def scatters(owner_numels: Sequence[int]) -> bool:
    """Whether parts of these sizes are shared by scatter and all-gather, not by broadcasts."""
    return sum(1 for numel in owner_numels if numel) > MOST_BROADCASTS


def piece_numel(owner_numels: Sequence[int]) -> int:
    """Elements of the equal pieces between scatter and all-gather, one a rank; the last may have padding."""
    return -(-sum(owner_numels) // len(owner_numels))


def sharing_numel(owner_numels: Sequence[int]) -> int:
    """Elements of the buffer that `share_segments` takes for parts of these sizes.

    Behind a piece a rank there is room for the own one: an all-to-all can't receive into its send buffer.
    """
    if not scatters(owner_numels):
        return sum(owner_numels)
    return (len(owner_numels) + 1) * piece_numel(owner_numels)


def sharing_traffic(owner_numels: Sequence[int], rank: int, element_size: int) -> tuple[int, int]:
    """Return the traffic of `share_segments` on a rank: collectives, and bytes sent by the formulas of `traffic`.

    Args:
        owner_numels: Elements by owner, `SegmentLayout.owner_numels`.
        rank: The rank.
        element_size: Bytes of an element.
    """
    size, own = len(owner_numels), owner_numels[rank]
    if size == 1:
        return 0, 0
    if not scatters(owner_numels):
        return sum(1 for numel in owner_numels if numel), broadcast_bytes(own * element_size, size)
    piece = piece_numel(owner_numels)
    start = sum(owner_numels[:rank])
    kept = _overlap((start, start + own), _piece(piece, rank))
    return 2, (own - kept) * element_size + all_gather_bytes(piece * element_size, size)


class PendingBroadcast:
    """Parts on their way from their owners to all ranks."""

    def __init__(self, works: Sequence[Work], follow: Callable[[], Work] | None = None) -> None:
        self._works = list(works)
        self._follow = follow

    def start_second_phase(self) -> None:
        """Starts the second phase; collective: all ranks call it, or `wait`, at the same point.

        It may block, for as long as the first half takes. Calling it between start and `wait` leaves less to wait for.
        """
        follow, self._follow = self._follow, None
        if follow is not None:
            for work in self._works:
                work.wait()
            self._works.append(follow())

    def wait(self) -> None:
        """Waits for everything, in the order in which it was started."""
        self.start_second_phase()
        for work in self._works:
            work.wait()


def share_segments(comm: Communicator, buffer: Tensor, layout: SegmentLayout, *, label: str) -> PendingBroadcast:
    """Gives every rank every owner's part of the buffer.

    What can be in flight at once is, before anything is waited for. Owners without elements broadcast nothing, which
    all ranks read off the same layout.

    Args:
        comm: The ranks.
        buffer: 1-D, `layout.sharing_numel` elements, in which this rank's own part is set. It may be read once the
            result has been waited for; the elements behind `layout.numel` mean nothing.
        layout: The segments of the buffer.
        label: Name of the traffic.

    Returns:
        The work. Where collectives don't run in order, waiting for it is collective;
        see `PendingBroadcast.start_second_phase`.
    """
    _check(comm, buffer, layout, layout.sharing_numel)
    if not layout.scatters:
        return PendingBroadcast(
            [
                comm.broadcast(layout.part(buffer, owner), owner, label=label)
                for owner in range(comm.size)
                if layout.owner_numels[owner]
            ]
        )
    piece = layout.piece_numel
    whole, own_piece = buffer[: comm.size * piece], buffer[comm.size * piece :]
    sent, received = layout.cuts(comm.rank)
    scatter = comm.all_to_all(own_piece[: sum(received)], layout.part(buffer, comm.rank), received, sent, label=label)

    def gather() -> Work:
        return comm.all_gather(whole, own_piece, label=label)

    return (
        PendingBroadcast([scatter, gather()])
        if comm.in_order and buffer.is_cuda
        else PendingBroadcast([scatter], gather)
    )


def _piece(numel: int, rank: int) -> tuple[int, int]:
    return rank * numel, (rank + 1) * numel


def _overlap(first: tuple[int, int], second: tuple[int, int]) -> int:
    return max(0, min(first[1], second[1]) - max(first[0], second[0]))


class PendingReduce:
    """A reduction to owners in flight.

    Args:
        work: The first collective.
        received: The receive buffer: as many elements from every rank.
        size: Number of ranks.
        follow: Takes the sum of what was received to those whose it is, and returns what comes here.
    """

    def __init__(
        self, work: Work, received: Tensor, size: int, follow: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._work = work
        self._received = received
        self._size = size
        self._follow = follow

    def wait(self) -> Tensor:
        """This rank's part, 1-D, summed over the ranks in fp32 at least, for any dtype sent; empty if it owns nothing.

        Collective where the sums were made elsewhere: all ranks wait for their reductions in the same order.
        """
        self._work.wait()
        parts = self._received.view(self._size, -1) if self._received.numel() else self._received.view(1, 0)
        total = _folded(parts)
        return total if self._follow is None else self._follow(total)


def _folded(parts: Tensor) -> Tensor:
    """Return the sum of `[W, n]` over the ranks in fp32 or fp64, halving them log2 W times; the parts are overwritten.

    Elementwise and in an order that W alone gives: the same bits however parts arrived, and in whichever pieces.
    """
    count = len(parts)
    while count > 1:
        kept = (count + 1) // 2
        first = widened(parts[:kept])
        first[: count - kept].add_(parts[kept:count])
        parts, count = first, kept
    return widened(parts[0])


def reduce_to_owners(comm: Communicator, buffer: Tensor, layout: SegmentLayout, *, label: str) -> PendingReduce:
    """Sums every segment over the ranks, on its owner alone.

    One all-to-all with uneven parts, and a sum on the owner: a rank sends exactly what it does not own, in the
    buffer's dtype, and what it owns is summed in fp32. (A reduce-scatter wants equal parts, hence padding; gloo has
    none, and it would sum bf16 in bf16.) Where the largest part would come in too often (`MOST_RECEIVED`), each rank
    sums an equal piece instead, and a second all-to-all takes the sums to the owners, in fp32: the same bits. The
    buffer may be written again once the result has been waited for.
    """
    _check(comm, buffer, layout, layout.numel)
    own = layout.owner_numels[comm.rank]
    if comm.size * max(layout.owner_numels) <= MOST_RECEIVED * layout.numel:
        received = buffer.new_empty(comm.size * own)
        work = comm.all_to_all(received, buffer, [own] * comm.size, layout.owner_numels, label=label)
        return PendingReduce(work, received, comm.size)
    lengths = [_overlap(_piece(layout.piece_numel, rank), (0, layout.numel)) for rank in range(comm.size)]
    received = buffer.new_empty(comm.size * lengths[comm.rank])
    work = comm.all_to_all(received, buffer, [lengths[comm.rank]] * comm.size, lengths, label=label)

    def to_owners(sums: Tensor) -> Tensor:
        coming, going = layout.cuts(comm.rank)
        total = sums.new_empty(own)
        comm.all_to_all(total, sums, coming, going, label=label).wait()
        return total

    return PendingReduce(work, received, comm.size, to_owners)


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


def _check(comm: Communicator, buffer: Tensor, layout: SegmentLayout, numel: int) -> None:
    if layout.size != comm.size or buffer.shape != (numel,):
        raise ValueError(
            f"a layout of {layout.numel} elements over {layout.size} ranks, which takes a buffer of {numel}, does not "
            f"fit one of shape {tuple(buffer.shape)} on {comm.size} ranks"
        )
