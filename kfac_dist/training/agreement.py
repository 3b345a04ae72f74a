"""A failure on one rank becomes a failure on all, before any rank waits for one that has left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kfac_dist.distributed.communicators.agreement import caught, fail_together
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.errors import KFACError


@contextmanager
def agreed(communicator: Communicator, error_type: type[KFACError] = KFACError, what: str = "") -> Iterator[None]:
    """Run a block on every rank and let none go on unless it succeeded on all.

    Args:
        communicator: The ranks; every one of them enters the block.
        error_type: What an exception of the block that isn't a `KFACError` becomes.
        what: What failed then, such as "can't write runs/a".

    Raises:
        KFACError: The block failed on a rank: on that rank its own error, on the others one that names the rank.
    """

    def failed(error: Exception) -> KFACError:
        reason = str(error).strip() or type(error).__name__
        return error_type(f"{what}: {reason}" if what else f"{type(error).__name__}: {reason}")

    with caught(failed) as found:
        yield
    fail_together(communicator, found)
