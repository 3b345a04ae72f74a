"""Cost models of an inversion: n³, or seconds measured on rank 0."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kfac_dist.errors import CollectiveError

if TYPE_CHECKING:
    from kfac_dist.distributed.communicators.base import Communicator


def cubic(n: int, batch: int = 1) -> float:
    """Cost of inverting `batch` dense symmetric matrices of size n, in flops up to a constant: batch · n³."""
    return float(batch) * float(n) ** 3


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
