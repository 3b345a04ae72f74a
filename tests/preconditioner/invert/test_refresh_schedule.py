"""The schedule: a pure function of the step."""

from __future__ import annotations

from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.preconditioner.invert.refresh_schedule import RefreshSchedule


def schedule(factor_every: int = 10, inverse_every: int = 50, parts: int = 1, **inversion: int) -> RefreshSchedule:
    config = {
        "curvature": {"factor_every": factor_every, "stagger": parts},
        "inversion": {"inverse_every": inverse_every, **inversion},
    }
    return RefreshSchedule.of(parse_kfac(config))


def measured(plan: RefreshSchedule, steps: int) -> list[int]:
    return [step for step in range(steps) if plan.measures(step)]


def refreshed(plan: RefreshSchedule, steps: int, slot: int = 0) -> list[int]:
    return [step for step in range(steps) if slot in plan.due(step)]


def test_early_refreshes_double_until_the_regular_ones_begin() -> None:
    plan = schedule()
    assert refreshed(plan, 160) == [0, 1, 2, 4, 8, 16, 32, 50, 100, 150]
    assert measured(plan, 80) == [0, 1, 2, 4, 8, 10, 16, 20, 30, 32, 40, 50, 60, 70]


def test_they_begin_where_they_are_told() -> None:
    assert refreshed(schedule(early_refresh=3), 120) == [0, 3, 6, 12, 24, 48, 50, 100]
    assert refreshed(schedule(early_refresh=50), 120) == [0, 50, 100]
    plain = schedule(early_refresh=0)
    assert (refreshed(plain, 120), measured(plain, 40)) == ([0, 50, 100], [0, 10, 20, 30])


def test_intervals_of_one_step_leave_nothing_to_add() -> None:
    plan = schedule(1, 1)
    assert refreshed(plan, 5) == measured(plan, 5) == [0, 1, 2, 3, 4]


def test_each_slot_has_early_refreshes_until_its_own_regular_ones() -> None:
    plan = schedule(inverse_every=100, stagger=5)
    assert refreshed(plan, 220, slot=0) == [0, 1, 2, 4, 8, 16, 32, 64, 100, 200]
    assert refreshed(plan, 220, slot=1) == [0, 1, 2, 4, 8, 16, 20, 120]
    assert refreshed(plan, 220, slot=4) == [0, 1, 2, 4, 8, 16, 32, 64, 80, 180]


def test_every_refresh_has_a_measurement_and_an_early_one_no_lag() -> None:
    turns = {"parts": 5, "stagger": 15}
    for options in ({}, {"stagger": 5}, {"stagger": 3, "early_refresh": 7}, {"early_refresh": 0, "stagger": 2}, turns):
        plan = schedule(inverse_every=100, inverse_lag=6, **options)
        for step in range(400):
            assert set(plan.due(step)) <= set(plan.measured(step)), (options, step)
            assert plan.measures(step) == bool(plan.measured(step))
            assert plan.lag_after(step) == (0 if plan.starting(step) else 6)


def test_layers_take_turns_in_being_measured_and_refresh_in_their_own() -> None:
    plan = schedule(inverse_every=30, parts=5, stagger=15, early_refresh=0)
    turns = {step: plan.measured(step) for step in range(30, 42)}
    assert turns[30] == (0, 1, 2)
    assert turns[32] == (3, 4, 5)
    assert turns[38] == (12, 13, 14)
    assert turns[31] == turns[33] == ()
    assert turns[40] == turns[30]
    due = {step: plan.due(step) for step in range(30, 60) if plan.due(step)}
    assert [due[step] for step in (30, 32, 34, 36, 38, 40, 42)] == [(0,), (3,), (6,), (9,), (12,), (1,), (4,)]
    assert sorted(slot for slots in due.values() for slot in slots) == list(range(15))


def test_every_slot_is_measured_once_in_factor_every_steps_and_refreshed_once_in_inverse_every() -> None:
    for parts, slots in ((1, 10), (3, 6), (10, 100), (7, 70)):
        plan = schedule(inverse_every=100, parts=parts, stagger=slots)
        measured = [slot for step in range(100, 110) for slot in plan.measured(step)]
        due = [slot for step in range(100, 200) for slot in plan.due(step)]
        assert sorted(measured) == sorted(due) == list(range(slots))


def test_a_ramped_decay_counts_a_layers_own_measurements() -> None:
    plan = schedule(parts=5, stagger=5)
    assert [plan.decay(step, 0.95) for step in (0, 2, 8, 10, 12)] == [0, 1 / 2, 1 / 2, 1 / 2, 1 - 1 / 3]
    plain = schedule()
    assert [plain.decay(step, 0.95) for step in (0, 10, 20)] == [0, 1 / 2, 1 - 1 / 3]
