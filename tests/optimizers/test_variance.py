"""The relative variance of elements, tallied."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_dist.optimizers.dissected import MSVAG
from kfac_dist.optimizers.variance import RelativeVariance, shared_beta, tally_of


def test_the_tally_finds_the_ratio_of_variance_and_squared_mean() -> None:
    """s = 4 and m² = 1 for all, but for averages over as many steps as the limit needs."""
    beta, steps = 0.9, 1000
    rho = (1 - beta) / (1 + beta)
    mean = torch.ones(50)
    found = RelativeVariance.of(tally_of(mean, 1 + 4 * (1 - rho) * torch.ones(50), beta, steps))
    assert found is not None
    assert found.median == pytest.approx(4, rel=0.06)
    assert found.mean == pytest.approx(4, rel=1e-5)
    assert found.noisy == 1


def test_parts_of_a_parameter_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.zeros(4001))
    optimizer = MSVAG([parameter], lr=0.1)
    signal = torch.linspace(0, 3, 4001)
    for _ in range(30):
        parameter.grad = signal + torch.randn(4001, generator=generator)
        optimizer.step()
    state = optimizer.state[parameter]
    mean, square, steps = state["exp_avg"], state["exp_avg_sq"], int(state["step"])
    parts = sum(tally_of(mean[i : i + 700], square[i : i + 700], 0.9, steps) for i in range(0, 4001, 700))
    whole = tally_of(mean, square, 0.9, steps)
    torch.testing.assert_close(parts, whole)
    found = RelativeVariance.of(whole)
    assert found is not None
    assert found.median == pytest.approx(1 / 1.5**2, rel=0.15)
    assert found.noisy == pytest.approx(1 / 3, abs=0.05)


def test_what_never_had_a_gradient_does_not_count() -> None:
    assert RelativeVariance.of(tally_of(torch.zeros(5), torch.zeros(5), 0.9, 3)) is None
    found = RelativeVariance.of(tally_of(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), 0.9, 100))
    assert found == RelativeVariance(median=pytest.approx(1e-6, rel=0.1), mean=pytest.approx(1e-6), noisy=0.0)


def test_pure_noise_counts_as_the_limit() -> None:
    found = RelativeVariance.of(tally_of(torch.zeros(3), torch.ones(3), 0.9, 100))
    assert found == RelativeVariance(median=pytest.approx(1e6, rel=0.1), mean=1e6, noisy=1.0)


def test_one_beta_is_needed() -> None:
    assert shared_beta({"beta": 0.8}) == 0.8
    assert shared_beta({"betas": (0.9, 0.9)}) == 0.9
    assert shared_beta({"betas": (0.9, 0.999)}) is None
    assert shared_beta({"momentum": 0.9}) is None
