"""The rules of λ and γ, number by number."""

from __future__ import annotations

import math

import pytest

from kfac_dist.optimizers.second_order.levenberg_marquardt import Bounds, GammaSearch, LevenbergMarquardt

WIDE = Bounds(1e-9, 1e9)


@pytest.mark.parametrize(
    ("change", "rate"),
    [
        (-1.0, 0.95**5),  # ρ = 1: the model is right
        (-0.76, 0.95**5),
        (-0.75, 1.0),
        (-0.25, 1.0),
        (-0.24, 0.95**-5),
        (2.0, 0.95**-5),  # the loss rose
        (math.nan, 0.95**-5),
        (math.inf, 0.95**-5),
    ],
)
def test_the_damping_follows_the_reduction_ratio(change: float, rate: float) -> None:
    rule = LevenbergMarquardt(3.0, 5, WIDE)
    rho = rule.judge(change, -1.0)
    assert rule.damping == pytest.approx(3 * rate)
    assert rho == (pytest.approx(-change) if math.isfinite(change) else -math.inf)


@pytest.mark.parametrize("predicted", [0.0, math.nan, 1.0])
def test_a_model_that_predicts_no_descent_says_nothing(predicted: float) -> None:
    rule = LevenbergMarquardt(3.0, 5, WIDE)
    assert math.isnan(rule.judge(-1.0, predicted))
    assert rule.damping == 3.0


@pytest.mark.parametrize("predicted", [-1.0, 0.0, math.nan])
def test_a_model_that_curves_down_is_damped_however_well_it_foretells(predicted: float) -> None:
    rule = LevenbergMarquardt(3.0, 5, WIDE)
    rule.judge(-1.0, predicted, curved_down=True)
    assert rule.damping == pytest.approx(3 * 0.95**-5)


def test_the_damping_stays_within_its_bounds() -> None:
    rule = LevenbergMarquardt(1.0, 5, Bounds(0.9, 1.1))
    rule.judge(-1.0, -1.0)
    assert rule.damping == 0.9
    rule.judge(1.0, -1.0)
    rule.judge(1.0, -1.0)
    assert rule.damping == 1.1


def test_both_rules_keep_their_intervals() -> None:
    rule, search = LevenbergMarquardt(1.0, 5, WIDE), GammaSearch(1.0, 0.0, 20, WIDE)
    assert [step for step in range(21) if rule.due(step)] == [4, 9, 14, 19]
    assert [step for step in range(61) if search.due(step)] == [20, 40, 60]


def test_gamma_begins_at_the_root_of_the_damping_and_takes_the_best_of_three() -> None:
    search = GammaSearch(3.0, 1.0, 20, WIDE)
    assert search.gamma == 2.0
    rate = 0.95**10
    candidates = search.candidates()
    assert candidates == pytest.approx((2.0, 2 * rate, 2 / rate))
    assert search.choose(candidates, (-1.0, -3.0, -2.0)) == 1
    assert search.gamma == pytest.approx(2 * rate)
    assert search.choose(search.candidates(), (-1.0, -1.0, -1.0)) == 0, "without a reason to move it stays"
    assert search.choose(search.candidates(), (math.nan, -math.inf, math.nan)) == 0
    assert search.gamma == pytest.approx(2 * rate)


def test_bounds_leave_fewer_candidates() -> None:
    search = GammaSearch(1.0, 0.0, 20, Bounds(1.0, 100.0))
    assert search.candidates() == pytest.approx((1.0, 1 / 0.95**10))


def test_their_state_is_theirs() -> None:
    rule, search = LevenbergMarquardt(1.0, 5, WIDE), GammaSearch(1.0, 0.0, 20, WIDE)
    rule.judge(-1.0, -1.0)
    search.choose(search.candidates(), (0.0, 0.0, -1.0))
    again, other = LevenbergMarquardt(7.0, 5, WIDE), GammaSearch(7.0, 0.0, 20, WIDE)
    again.load_state_dict(rule.state_dict())
    other.load_state_dict(search.state_dict())
    assert (again.damping, other.gamma) == (rule.damping, search.gamma)
