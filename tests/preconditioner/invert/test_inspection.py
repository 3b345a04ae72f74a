"""Spectra that refreshes are asked for: of the factors that were inverted, by those who inverted them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from kfac_dist import KFAC
from kfac_dist.preconditioner.invert.inspection import QUANTILES, RefreshReading
from tests.harness import run_ranks

CONFIG = {
    "curvature": {"factor_every": 1},
    "inversion": {"inverse_every": 2, "early_refresh": 0, "damping": 0.04},
    "update": {"kl_clip": None},
}


def trained(steps: int, **inversion: object) -> tuple[KFAC, list[str]]:
    """Train with one reading asked for, and say when the clock stood."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    kfac = KFAC(model, {**CONFIG, "inversion": {**CONFIG["inversion"], **inversion}})
    stood = []

    @contextmanager
    def outside() -> Iterator[None]:
        stood.append("stopped")
        yield
        stood.append("started")

    kfac.monitor.inspect(outside)
    for _ in range(steps):
        model(torch.randn(8, 6)).square().sum(-1).mean().backward()
        kfac.step()
        model.zero_grad()
    return kfac, stood


def readings() -> list[RefreshReading]:
    kfac, _ = trained(3)
    found = kfac.monitor.inspection()
    kfac.remove()
    return found


def test_a_reading_has_the_spectrum_of_what_was_inverted() -> None:
    kfac, stood = trained(1)
    (reading,) = kfac.monitor.inspection()
    assert stood == ["stopped", "started"]
    assert reading.step == 0
    assert reading.seconds > 0
    assert {factor.unit for factor in reading.factors} == {unit.name for unit in kfac.monitor.plan.units}
    state = kfac.state_dict()["units"]
    for factor in reading.factors:
        stored = state[factor.unit]
        matrix = (stored["sum"] / stored["scalars"][0])[0]
        matrix = matrix.triu() + matrix.triu(1).mT
        values = torch.linalg.eigvalsh(matrix)
        assert factor.spectrum[0] == pytest.approx(values[0].item(), abs=1e-6)
        assert factor.spectrum[-1] == pytest.approx(values[-1].item(), rel=1e-5)
        assert len(factor.spectrum) == len(QUANTILES)
        assert factor.trace == pytest.approx(values.mean().item(), rel=1e-5)
        assert factor.condition == pytest.approx(
            ((values[-1] + factor.damping) / (values[0].clamp(min=0) + factor.damping)).item(), rel=1e-4
        )


def test_each_factor_is_read_once_for_each_time_that_one_asks() -> None:
    kfac, _ = trained(6)
    assert [reading.step for reading in kfac.monitor.inspection()] == [0]
    assert kfac.monitor.inspection() == []


def test_staggered_factors_are_read_when_they_are_due() -> None:
    kfac, _ = trained(9, inverse_every=2, stagger=2)
    found = kfac.monitor.inspection()
    units = [factor.unit for reading in found for factor in reading.factors]
    assert sorted(units) == sorted(unit.name for unit in kfac.monitor.plan.units)


def test_every_rank_tells_of_what_it_owns() -> None:
    (alone,) = run_ranks(1, readings)
    both = run_ranks(2, readings)
    assert both[0] == both[1]
    owners = {factor.unit: factor.rank for reading in both[0] for factor in reading.factors}
    assert set(owners.values()) == {0, 1}
    assert sorted(owners) == sorted(factor.unit for reading in alone for factor in reading.factors)
