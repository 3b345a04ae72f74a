from __future__ import annotations

import pytest

from kfac_dist.distributed.assignment import inversion_cost as cost
from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.errors import CollectiveError
from tests.harness import run_ranks


def test_formulas() -> None:
    assert cost.cubic(3) == 27
    assert cost.cubic(3, batch=2) == 54


def measure(fail: bool) -> tuple[dict[int, float], list[int], str]:
    comm = build_communicator(20.0)
    solved: list[int] = []

    def solve(size: int) -> None:
        solved.append(size)
        if fail:
            raise MemoryError("planted")

    try:
        measured = cost.measure_costs(comm, [8, 2, 8], solve, repeats=3)
    except CollectiveError as error:
        return {}, solved, str(error)
    return measured, solved, ""


def test_measured_costs_are_rank_zeros_everywhere() -> None:
    results = run_ranks(3, measure, False)
    first = results[0][0]
    assert list(first) == [2, 8]
    assert all(seconds >= 0 for seconds in first.values())
    assert [result[0] for result in results] == [first] * 3
    assert [result[1] for result in results] == [[2] * 4 + [8] * 4, [], []]


def test_trial_solve_that_fails_on_rank_zero_fails_everywhere() -> None:
    for _, _, message in run_ranks(2, measure, True):
        assert "failed on rank 0 (MemoryError: planted)" in message


def test_one_rank_measures_for_itself() -> None:
    with pytest.raises(CollectiveError, match="planted"):
        cost.measure_costs(SoloCommunicator(), [1], lambda _: (_ for _ in ()).throw(ValueError("planted")))
