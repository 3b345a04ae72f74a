"""Errors of collectives that are no communicator's, but an engine's, DDP's, SyncBatchNorm's, DTensor's.

They have no type of their own, and pages of traceback; all that they mean is that other ranks are gone.
"""

from __future__ import annotations

import torch.distributed as dist

from kfac_dist.errors import CollectiveError

# Of gloo's own errors one does not name gloo; NCCL's and the store's are `DistError`s, or say so.
_WORDS = ("gloo", "nccl", "pair closure", "connection closed by peer", "connection reset by peer", "broken pipe")


def is_of_lost_ranks(error: BaseException) -> bool:
    """Whether an error, or one that it was raised because of, is that of a collective which lost a rank."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen).lower()
        if isinstance(seen, dist.DistError) or (isinstance(seen, RuntimeError) and any(w in text for w in _WORDS)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def lost_ranks(where: str, error: BaseException) -> CollectiveError:
    """Return such an error as a line that says where it happened."""
    return CollectiveError(
        f"{where}: the other ranks are gone or stand still ({first_line(error)}); the rank that failed first says why"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
