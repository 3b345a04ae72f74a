"""Schedules are pure functions of the step: their corners, their ends and their continuity."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.config.schedules import value_at
from kfac_dist.config.schema import Schedule
from kfac_dist.errors import ConfigError

DECAYS = ("linear", "cosine", "exponential")


def test_constant_ignores_the_length_of_the_run() -> None:
    assert [value_at(Schedule(value=0.3), step, None) for step in (0, 7, 10**9)] == [0.3] * 3


def test_warm_up_wastes_no_step_and_ends_at_the_value() -> None:
    schedule = Schedule(value=1.0, warmup_steps=4)
    assert [value_at(schedule, step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_warm_up_may_come_down_from_above() -> None:
    schedule = Schedule(value=0.1, warmup_steps=9, warmup_from=1.1)
    assert value_at(schedule, 0) == pytest.approx(1.0)
    assert value_at(schedule, 9) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", DECAYS)
def test_decay_starts_at_the_value_and_ends_at_final_by_the_end_of_the_run(kind: str) -> None:
    schedule = Schedule(value=2.0, kind=kind, final=0.5, warmup_steps=10)
    assert value_at(schedule, 10, 110) == pytest.approx(2.0)
    assert value_at(schedule, 110, 110) == pytest.approx(0.5)
    assert value_at(schedule, 10_000, 110) == pytest.approx(0.5)


def test_middle_of_each_decay() -> None:
    middle = {kind: value_at(Schedule(value=4.0, kind=kind, final=1.0, steps=10), 5, 99) for kind in DECAYS}
    assert middle == pytest.approx({"linear": 2.5, "cosine": 2.5, "exponential": 2.0})


def test_a_decay_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cosine schedule from 1\.0 to 0\.1 has no end: set its steps"):
        value_at(Schedule(value=1.0, kind="cosine", final=0.1), 3, None)


def test_a_run_shorter_than_its_warm_up_still_has_a_value() -> None:
    schedule = Schedule(value=1.0, kind="linear", final=0.0, warmup_steps=100)
    assert 0 < value_at(schedule, 4, 5) < 1
    assert value_at(schedule, 100, 5) == 0.0


@given(
    kind=st.sampled_from(DECAYS),
    start=st.floats(1e-4, 10),
    final=st.floats(1e-4, 10),
    warmup=st.integers(0, 20),
    step=st.integers(0, 200),
)
def test_a_value_never_leaves_the_range_of_its_ends(
    kind: str, start: float, final: float, warmup: int, step: int
) -> None:
    schedule = Schedule(value=start, kind=kind, final=final, warmup_steps=warmup)
    low, high = min(start, final), max(start, final)
    value = value_at(schedule, step, 100)
    assert (0 if step < warmup else low) * (1 - 1e-9) <= value <= high * (1 + 1e-9)
