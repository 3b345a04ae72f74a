"""Bytes that a rank sends: the formula of each collective, and a counter by label for tests and metrics.

Bytes are those that ONE rank sends by the bandwidth-optimal algorithm, for a message of b bytes on N ranks:

    all-reduce        2(N-1)/N · b     every rank, rounded up
    reduce-scatter     (N-1)/N · b     every rank, rounded up: half of an all-reduce
    broadcast          (N-1)   · b     the root, for any tree; the others send nothing
    all-gather         (N-1)   · b     every rank, of its own b bytes
    all-to-all         the rank's parts for others; its own part stays in place

so that summed over the ranks each byte is counted once for every link end that it has to reach.
"""

from __future__ import annotations

from collections import defaultdict


class Traffic:
    """Traffic of this rank by label: numbers of collectives, and bytes by the formulas below.

    A label names the contents ("factors", "inverses", "gradients"). One counter serves a communicator and all that are
    split from it. Collectives among one rank are not counted: nothing travels.
    """

    def __init__(self) -> None:
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.bytes_sent: defaultdict[str, int] = defaultdict(int)

    @property
    def total_calls(self) -> int:
        """Collectives that this rank took part in."""
        return sum(self.calls.values())

    @property
    def total_bytes(self) -> int:
        """Bytes that this rank sent."""
        return sum(self.bytes_sent.values())

    def count(self, label: str, nbytes: int) -> None:
        """Adds one collective that sends `nbytes` from this rank."""
        self.calls[label] += 1
        self.bytes_sent[label] += nbytes

    def snapshot(self) -> dict[str, tuple[int, int]]:
        """Label to (collectives, bytes sent) so far."""
        return {label: (self.calls[label], self.bytes_sent[label]) for label in sorted(self.calls)}

    def reset(self) -> None:
        """Starts counting afresh."""
        self.calls.clear()
        self.bytes_sent.clear()


def all_reduce_bytes(nbytes: int, size: int) -> int:
    """Bytes that one of `size` ranks sends in an all-reduce of `nbytes` bytes: 2(N-1)/N · b, rounded up."""
    return -(-2 * (size - 1) * nbytes // size)


def reduce_scatter_bytes(nbytes: int, size: int) -> int:
    """Bytes that one of `size` ranks sends in a reduce-scatter of `nbytes` bytes: (N-1)/N · b, rounded up."""
    return -(-(size - 1) * nbytes // size)


def broadcast_bytes(nbytes: int, size: int) -> int:
    """Bytes that the root sends in a broadcast of `nbytes` bytes to the other N-1 ranks: (N-1) · b."""
    return (size - 1) * nbytes


def all_gather_bytes(nbytes: int, size: int) -> int:
    """Bytes that one of `size` ranks sends in an all-gather to which each brings `nbytes` bytes: (N-1) · b."""
    return (size - 1) * nbytes
