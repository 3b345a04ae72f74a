"""Ranks agree on plans and votes; a failure on one is a failure on all, with that rank's reason."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from kfac_dist.distributed.communicators.agreement import agree_on_plan, agreed, any_rank, plan_digest
from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.errors import CheckpointError, CollectiveError, DataError, KFACError, PlanMismatchError
from tests.harness import run_ranks

Rows = list[tuple[str, str]]


def agree(plans: list[Rows]) -> tuple[str, int]:
    comm = build_communicator(20.0)
    try:
        return agree_on_plan(comm, plans[comm.rank]), comm.traffic.calls["plan"]
    except PlanMismatchError as error:
        return str(error), comm.traffic.calls["plan"]


SAME: Rows = [("fc1", "linear 4x3 owner 0"), ("fc2", "linear 3x2 owner 1"), ("fc3", "linear 2x2 owner 0")]


def test_equal_plans_cost_one_small_collective() -> None:
    assert run_ranks(3, agree, [SAME] * 3) == [(plan_digest(SAME), 1)] * 3


def test_first_block_that_differs_is_named_on_every_rank() -> None:
    other = [SAME[0], ("fc2", "linear 3x2 owner 0"), ("fc3", "linear 9x9 owner 0")]
    messages = run_ranks(4, agree, [SAME, other, SAME, SAME])
    assert [message for message, _ in messages] == [
        "the ranks plan different work, first at block 1 (fc2):\n"
        "  ranks 0, 2-3: fc2: linear 3x2 owner 1\n"
        "  rank 1: fc2: linear 3x2 owner 0\n"
        "every rank must build the same model and read the same configuration"
    ] * 4


def test_missing_and_renamed_blocks() -> None:
    for message, _ in run_ranks(2, agree, [SAME, SAME[:2]]):
        assert "first at block 2 (fc3)" in message
        assert "  rank 1: no such block, the plan ends before it" in message
    for message, _ in run_ranks(2, agree, [SAME, [("head", "linear"), *SAME]]):
        assert "first at block 0 (fc1 / head)" in message


def test_digest_sees_where_a_name_ends() -> None:
    assert plan_digest([("ab", "c")]) != plan_digest([("a", "bc")])
    assert plan_digest([]) != plan_digest([("", "")])
    assert agree_on_plan(SoloCommunicator(), SAME) == plan_digest(SAME)


def vote(voters: list[int]) -> bool:
    return any_rank(build_communicator(20.0), dist.get_rank() in voters)


@pytest.mark.parametrize("voters", [[], [1], [0, 1, 2]])
def test_one_vote_is_enough(voters: list[int]) -> None:
    assert run_ranks(3, vote, voters) == [bool(voters)] * 3


def test_one_rank_decides_alone() -> None:
    assert any_rank(SoloCommunicator(), True)
    assert not any_rank(SoloCommunicator(), False)


def test_errors_of_the_user_keep_their_type_and_others_get_one() -> None:
    solo = SoloCommunicator()
    with agreed(solo):
        pass
    with pytest.raises(DataError, match=r"^no data$"), agreed(solo, CheckpointError, "can't save"):
        raise DataError("no data")
    with (
        pytest.raises(CheckpointError, match=r"^can't save: full$") as caught,
        agreed(solo, CheckpointError, "can't save"),
    ):
        raise OSError("full")
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(KFACError, match=r"^ZeroDivisionError: division by zero$"), agreed(solo):
        _ = 1 / 0
    with pytest.raises(KFACError, match=r"^KeyError: KeyError$"), agreed(solo):
        raise KeyError


def test_ranks_that_have_lost_each_other_do_not_vote() -> None:
    with pytest.raises(CollectiveError, match="timed out"), agreed(SoloCommunicator(), DataError, "can't read"):
        raise CollectiveError("timed out")


def _one_fails() -> tuple[str, str]:
    communicator = build_communicator(20.0)
    try:
        with agreed(communicator):
            if dist.get_rank() == 1:
                raise DataError("no such file")
    except KFACError as error:
        return type(error).__name__, str(error)
    finally:
        communicator.close()
    return "", ""


def test_every_rank_hears_of_it() -> None:
    assert run_ranks(3, _one_fails) == [
        ("DataError", "rank 1: no such file"),
        ("DataError", "no such file"),
        ("DataError", "rank 1: no such file"),
    ]
