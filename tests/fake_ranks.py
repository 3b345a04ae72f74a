"""One rank of any number of them, whose messages go nowhere: torch's fake process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_ranks(rank: int, size: int) -> Iterator[None]:
    """Let this process be `rank` of `size`, until the context ends."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    real = dist.all_to_all_single

    def all_to_all_single(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> dist.Work | None:
        # The fake one makes up what it receives from what it sends, and refuses to from nothing.
        return real(output, input, *args, **kwargs) if input.numel() else None

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_to_all_single", all_to_all_single)
            yield
    finally:
        dist.destroy_process_group()
