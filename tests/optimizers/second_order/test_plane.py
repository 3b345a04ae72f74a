"""α and μ against a dense solve, and the planes that are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_dist.optimizers.second_order.plane import minimise


def _problem(seed: int, n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n + 2, generator=generator, dtype=torch.float64)
    fisher = root @ root.T + 0.1 * torch.eye(n, dtype=torch.float64)
    directions = torch.randn(n, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1e-3])
    return fisher, directions, torch.randn(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_lowest_point_of_the_plane(seed: int) -> None:
    fisher, directions, gradient = _problem(seed)
    coefficients, value = minimise(directions.T @ fisher @ directions, directions.T @ gradient)
    expected = -torch.linalg.solve(directions.T @ fisher @ directions, directions.T @ gradient)
    torch.testing.assert_close(coefficients, expected)
    step = directions @ coefficients
    torch.testing.assert_close(value, 0.5 * step @ fisher @ step + gradient @ step)
    torch.testing.assert_close(value, 0.5 * gradient @ step)  # what a minimum has


def test_without_a_previous_step_it_is_the_line_search_along_the_proposal() -> None:
    fisher, directions, gradient = _problem(0)
    directions[:, 1] = 0
    coefficients, value = minimise(directions.T @ fisher @ directions, directions.T @ gradient)
    proposal = directions[:, 0]
    torch.testing.assert_close(coefficients[0], -(gradient @ proposal) / (proposal @ fisher @ proposal))
    assert coefficients[1] == 0
    assert value < 0


@pytest.mark.parametrize("factor", [1.0, -3.0, 1 + 1e-7])
def test_a_previous_step_along_the_proposal_adds_nothing(factor: float) -> None:
    fisher, directions, gradient = _problem(1)
    directions[:, 1] = factor * directions[:, 0]
    coefficients, value = minimise(directions.T @ fisher @ directions, directions.T @ gradient)
    directions[:, 1] = 0
    alone, lowest = minimise(directions.T @ fisher @ directions, directions.T @ gradient)
    torch.testing.assert_close(coefficients, alone)
    torch.testing.assert_close(value, lowest)


def test_no_proposal_leaves_the_previous_step_and_no_direction_no_step() -> None:
    coefficients, value = minimise(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([0.0, -3.0]))
    assert coefficients.tolist() == pytest.approx([0.0, 1.5])
    assert value == pytest.approx(-2.25)
    coefficients, value = minimise(torch.zeros(2, 2), torch.zeros(2))
    assert coefficients.tolist() == [0.0, 0.0]
    assert value == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_curvature_that_is_no_fishers_counts_as_no_direction(bad: float) -> None:
    coefficients, value = minimise(torch.tensor([[2.0, bad], [bad, bad]]), torch.tensor([-2.0, 1.0]))
    assert coefficients.tolist() == pytest.approx([1.0, 0.0])
    assert value == pytest.approx(-1.0)
