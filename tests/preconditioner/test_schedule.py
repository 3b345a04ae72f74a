"""The cadence: a pure function of the step."""

from __future__ import annotations

from kfac_dist.config.options import parse_kfac
from kfac_dist.preconditioner.schedule import Cadence


def cadence(factor_every: int = 10, inverse_every: int = 50, **inversion: int) -> Cadence:
    config = {"curvature": {"factor_every": factor_every}, "inversion": {"inverse_every": inverse_every, **inversion}}
    return Cadence.of(parse_kfac(config))


def measured(plan: Cadence, steps: int) -> list[int]:
    return [step for step in range(steps) if plan.measures(step)]


def refreshed(plan: Cadence, steps: int, slot: int = 0) -> list[int]:
    return [step for step in range(steps) if slot in plan.due(step)]


def test_early_refreshes_double_until_the_regular_ones_begin() -> None:
    plan = cadence()
    assert refreshed(plan, 160) == [0, 1, 2, 4, 8, 16, 32, 50, 100, 150]
    assert measured(plan, 80) == [0, 1, 2, 4, 8, 10, 16, 20, 30, 32, 40, 50, 60, 70]


def test_they_begin_where_they_are_told() -> None:
    assert refreshed(cadence(early_refresh=3), 120) == [0, 3, 6, 12, 24, 48, 50, 100]
    assert refreshed(cadence(early_refresh=50), 120) == [0, 50, 100]
    plain = cadence(early_refresh=0)
    assert (refreshed(plain, 120), measured(plain, 40)) == ([0, 50, 100], [0, 10, 20, 30])


def test_intervals_of_one_step_leave_nothing_to_add() -> None:
    plan = cadence(1, 1)
    assert refreshed(plan, 5) == measured(plan, 5) == [0, 1, 2, 3, 4]


def test_each_slot_has_early_refreshes_until_its_own_regular_ones() -> None:
    plan = cadence(inverse_every=100, stagger=5)
    assert refreshed(plan, 220, slot=0) == [0, 1, 2, 4, 8, 16, 32, 64, 100, 200]
    assert refreshed(plan, 220, slot=1) == [0, 1, 2, 4, 8, 16, 20, 120]
    assert refreshed(plan, 220, slot=4) == [0, 1, 2, 4, 8, 16, 32, 64, 80, 180]


def test_every_refresh_has_a_measurement_and_an_early_one_no_lag() -> None:
    for options in ({}, {"stagger": 5}, {"stagger": 3, "early_refresh": 7}, {"early_refresh": 0, "stagger": 2}):
        plan = cadence(inverse_every=100, inverse_lag=6, **options)
        for step in range(400):
            assert plan.measures(step) or not plan.due(step), (options, step)
            assert plan.lag_after(step) == (0 if plan.starting(step) else 6)
