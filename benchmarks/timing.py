"""Seconds of something that all ranks do together."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist


def seconds_of(action: Callable[[], None]) -> float:
    """Return the slowest rank's seconds; collective where there are ranks."""
    if dist.is_initialized():
        dist.barrier()
    started = time.perf_counter()
    action()
    seconds = torch.tensor(time.perf_counter() - started)
    if dist.is_initialized():
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()
