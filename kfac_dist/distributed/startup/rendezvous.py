"""The meeting of the ranks of one start of a job: a store that no earlier start has written into.

torchrun keeps one store over restarts of its workers. gloo and NCCL publish their addresses there, so that restarted
ranks would read those of dead ones and fail to connect. Counting restarts doesn't part them: every agent counts its own
failures, and a node that joins late has none. So the ranks that are alive find each other first:

    rank 0       epoch := a fresh name                      for each r: welcome/r := hello/r    (below the epoch)
    rank r       read epoch; hello/r := a fresh number      until welcome/r is that number; else read epoch again

A dead rank 0 answers no fresh number, and a dead rank r never greeted the fresh epoch. What follows is stored under
the epoch's name.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed import DistStoreError, PrefixStore, Store

EPOCH = "kfac_dist/epoch"
FIRST_PAUSE_SECONDS = 0.002
LONGEST_PAUSE_SECONDS = 0.1


def fresh_store(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """A part of `store` that belongs to the ranks that call this now; collective.

    Raises:
        DistStoreError: A rank did not come within the timeout.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    epoch = _welcome(store, world_size, deadline) if rank == 0 else _greet(store, rank, deadline)
    return PrefixStore(epoch, store)


def _welcome(store: Store, world_size: int, deadline: float) -> str:
    epoch = f"kfac_dist/{uuid.uuid4().hex}"
    store.set(EPOCH, epoch)
    for rank in range(1, world_size):
        greeting = f"{epoch}/hello/{rank}"
        pause = FIRST_PAUSE_SECONDS
        while not store.check([greeting]):
            pause = _sleep(pause, deadline, f"rank {rank} has not come")
        store.set(f"{epoch}/welcome/{rank}", store.get(greeting).decode())
    return epoch


def _greet(store: Store, rank: int, deadline: float) -> str:
    own = uuid.uuid4().hex
    pause = FIRST_PAUSE_SECONDS
    greeted = ""
    while True:
        epoch = store.get(EPOCH).decode() if store.check([EPOCH]) else ""
        if epoch and epoch != greeted:
            store.set(f"{epoch}/hello/{rank}", own)
            greeted = epoch
        welcome = f"{epoch}/welcome/{rank}"
        if epoch and store.check([welcome]) and store.get(welcome).decode() == own:
            return epoch
        pause = _sleep(pause, deadline, "rank 0 has not come")


def _sleep(pause: float, deadline: float, missing: str) -> float:
    if time.monotonic() > deadline:
        raise DistStoreError(missing)
    time.sleep(pause)
    return min(2 * pause, LONGEST_PAUSE_SECONDS)
