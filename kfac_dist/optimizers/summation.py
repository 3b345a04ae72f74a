"""Sums over ranks of numbers computed by passes over the batch: a pass that fails on one rank fails on all.

    numbers   [ filled in by the block …  | mark ]   ── all-reduce ──▶   sums, and on how many ranks the block failed

The mark costs no collective of its own. Only where it isn't zero do the ranks tell each other what happened, before
any rank waits for one that has left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from kfac_dist.distributed.communicators.agreement import caught, fail_together
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.errors import KFACError, ModelError


@contextmanager
def summed(numbers: Tensor, communicator: Communicator, *, label: str) -> Iterator[None]:
    """Run a block that fills in all of `numbers` but the last, then add them up over the ranks, in place.

    Every rank enters the block; waits for the device.

    Args:
        numbers: 1-dim, of the same length on every rank; the last one is the mark.
        communicator: The ranks.
        label: Label of the contents.

    Raises:
        KFACError: The block failed on a rank: on that rank its own error, on the others one that names the rank.
    """
    with caught(_failed) as found:
        yield
    numbers[-1] = float(bool(found))
    communicator.all_reduce(numbers, label=label).wait()
    if numbers[-1] > 0:
        fail_together(communicator, found)


def _failed(error: Exception) -> KFACError:
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return ModelError(f"a pass over the step's batch that kfac.solver repeats failed: {reason}")
