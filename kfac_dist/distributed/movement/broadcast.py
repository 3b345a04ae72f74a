"""Broadcast of many small tensors in one message per dtype."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kfac_dist.distributed.communicators.base import Communicator


def broadcast_all(comm: Communicator, tensors: Iterable[Tensor], root: int, *, label: str) -> None:
    """Overwrites tensors with those of `root`, in place; a collective a dtype, however many tensors there are.

    Args:
        comm: The ranks.
        tensors: In the same order, and of the same shapes and dtypes, on every rank.
        root: The rank whose values count.
        label: Name of the traffic.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
    if comm.size == 1:
        return
    flat = {dtype: torch.cat([tensor.flatten() for tensor in own]) for dtype, own in by_dtype.items()}
    works = [comm.broadcast(values, root, label=label) for values in flat.values()]
    for work, (dtype, own) in zip(works, by_dtype.items(), strict=True):
        work.wait()
        parts = flat[dtype].split([tensor.numel() for tensor in own])
        torch._foreach_copy_(own, [part.view(tensor.shape) for part, tensor in zip(parts, own, strict=True)])
