"""What work and messages cost: cost models of an inversion, and the bytes of each collective.

Bytes are those that ONE rank sends by the bandwidth-optimal algorithm, for a message of b bytes on N ranks:

    all-reduce        2(N-1)/N · b     every rank, rounded up
    reduce-scatter     (N-1)/N · b     every rank, rounded up: half of an all-reduce
    broadcast          (N-1)   · b     the root, whatever tree carries it; the others send nothing
    all-gather         (N-1)   · b     every rank, of its own b bytes
    all-to-all         what the rank sends to others; its own part stays where it is

so that summed over the ranks each byte is counted once for every link end that it has to reach.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kfac_dist.errors import CollectiveError

if TYPE_CHECKING:
    from kfac_dist.distributed.communicator import Communicator


def cubic(n: int, batch: int = 1) -> float:
    """Cost of inverting `batch` dense symmetric matrices of size n, in flops up to a constant: batch · n³."""
    return float(batch) * float(n) ** 3


def triangle_numel(n: int) -> int:
    """Elements of a symmetric n×n matrix when one triangle of it is sent: n(n+1)/2."""
    return n * (n + 1) // 2


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


def measure_costs(
    comm: Communicator, sizes: Iterable[int], solve: Callable[[int], None], *, repeats: int = 3
) -> dict[int, float]:
    """Seconds that one solve takes for each size, measured on rank 0 and the same on every rank.

    A plan made of measured costs is only a plan if all ranks hold the same numbers: two ranks never measure the same.
    Collective: every rank calls it with the same sizes.

    Args:
        comm: Ranks that need the numbers; the others wait while rank 0 measures.
        sizes: Sizes to measure; each distinct one is measured once.
        solve: Runs one solve of the given size and returns when it has finished (on a GPU: after a synchronise).
        repeats: Timed solves of each size, after one that isn't timed; the median counts.

    Raises:
        CollectiveError: On every rank, when a solve fails on rank 0.
    """
    measured: dict[int, float] = {}
    failure: str | None = None
    if comm.rank == 0:
        try:
            measured = {size: _median_seconds(solve, size, repeats) for size in sorted(set(sizes))}
        except Exception as error:  # raised below, on every rank: alone, rank 0 would leave the others waiting
            failure = f"{type(error).__name__}: {error}"
    measured, failure = comm.gather_objects((measured, failure), label="measured_costs")[0]
    if failure is not None:
        raise CollectiveError(f"cost_model measured: a trial solve failed on rank 0 ({failure}); cubic needs none")
    return measured


def _median_seconds(solve: Callable[[int], None], size: int, repeats: int) -> float:
    solve(size)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        solve(size)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
