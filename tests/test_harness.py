from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness import RankError, run_ranks


def rank_and_sum(offset: int) -> tuple[int, int, float, int]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), float(total), os.getpid()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("planted")
    dist.barrier()


def exit_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def set_variable() -> None:
    os.environ["PLANTED"] = "1"


def environment() -> tuple[str, str | None, bool]:
    return os.environ["RANK"], os.environ.get("PLANTED"), dist.is_initialized()


def test_results_come_by_rank_from_kept_processes() -> None:
    first = run_ranks(3, rank_and_sum, 1)
    assert [result[:3] for result in first] == [(0, 3, 6.0), (1, 3, 6.0), (2, 3, 6.0)]
    for size in (1, 2):
        again = run_ranks(size, rank_and_sum, 0)
        assert {result[3] for result in again} <= {result[3] for result in first}


def test_failure_names_the_rank_and_shows_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)^rank 1 of 2 failed: Traceback.*fail_on.*ValueError: planted"):
        run_ranks(2, fail_on, 1)
    assert len(run_ranks(2, rank_and_sum, 0)) == 2


def test_dead_and_hung_ranks_are_replaced() -> None:
    with pytest.raises(RankError, match=r"rank 0 of 2 failed: the process died \(exit code 3\)"):
        run_ranks(2, exit_on, 0)
    with pytest.raises(RankError, match=r"ranks \[1\] did not finish in 5 s and were killed"):
        run_ranks(2, hang_on, 1, timeout=5)
    assert len(run_ranks(2, rank_and_sum, 0)) == 2


def test_environment_is_restored_and_the_group_is_optional() -> None:
    run_ranks(2, set_variable)
    assert run_ranks(2, environment, process_group=False) == [("0", None, False), ("1", None, False)]
