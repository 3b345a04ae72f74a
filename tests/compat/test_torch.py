"""Groups made without a timeout get the default group's; others keep theirs."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from kfac_dist.compat.torch import shorten_unchosen_timeouts
from tests.harness import run_ranks


def timeouts() -> list[float]:
    groups = [dist.group.WORLD, dist.new_group([0, 1]), dist.new_group([0, 1], timeout=timedelta(seconds=70))]
    shorten_unchosen_timeouts()
    return [
        group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for group in groups
        if group is not None
    ]


def test_a_group_without_a_timeout_gets_that_of_the_default_group() -> None:
    for world, unchosen, chosen in run_ranks(2, timeouts):
        assert world == unchosen < 1800
        assert chosen == 70


def test_without_ranks_there_is_nothing_to_shorten() -> None:
    shorten_unchosen_timeouts()
    assert not dist.is_initialized()
