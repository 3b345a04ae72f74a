"""Conjugate gradients against dense solves, and where they stop."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kfac_dist.optimizers.second_order.batch_loss import Product
from kfac_dist.optimizers.second_order.conjugate_gradients import Rule, conjugate_gradients

N = 30


def multiply_by(matrix: Tensor):  # type: ignore[no-untyped-def]
    def multiply(vector: Tensor, shared: Sequence[Tensor] = ()) -> Product:
        result = matrix @ vector
        return Product(result, float(vector @ result), tuple(float(value) for value in shared))

    return multiply


def problem(condition: float = 1e3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), N, dtype=torch.float64)
    return basis * values @ basis.T, torch.randn(N, generator=generator, dtype=torch.float64)


def plain(vector: Tensor) -> Tensor:
    return vector


@pytest.mark.parametrize("started", [False, True])
def test_it_solves_what_a_dense_solver_solves(started: bool) -> None:
    matrix, gradient = problem()
    damped = matrix + 0.01 * torch.eye(N, dtype=torch.float64)
    expected = -torch.linalg.solve(damped, gradient)
    start = 0.5 * expected + 0.1 * gradient if started else None
    found = conjugate_gradients(multiply_by(matrix), plain, gradient, 0.01, Rule(200), start)
    torch.testing.assert_close(found.point, expected, rtol=1e-8, atol=1e-8)
    values = [float(0.5 * expected @ damped @ expected + gradient @ expected), found.values[-1]]
    assert values[1] == pytest.approx(values[0], rel=1e-9)  # the value that follows from scalars alone
    assert list(found.values) == sorted(found.values, reverse=True)
    assert found.products >= found.iterations + started
    assert not found.curved_down


def test_a_good_preconditioner_takes_one_iteration_and_a_diagonal_one_fewer() -> None:
    matrix, gradient = problem()
    matrix = matrix + torch.diag(torch.logspace(0, 4, N, dtype=torch.float64))
    damped = matrix + 0.01 * torch.eye(N, dtype=torch.float64)
    inverse, diagonal = torch.linalg.inv(damped), damped.diagonal()
    multiply, goal = multiply_by(matrix), float(-0.5 * gradient @ inverse @ gradient)
    rule = Rule(500, target=goal * (1 - 1e-6))
    counts = [
        conjugate_gradients(multiply, precondition, gradient, 0.01, rule, None).iterations
        for precondition in (lambda v: inverse @ v, lambda v: v / diagonal, plain)
    ]
    assert counts[0] == 1
    assert counts[1] < counts[2] / 2


def test_it_stops_where_martens_rule_says() -> None:
    matrix, gradient = problem(1e6)
    rule = Rule(500, tolerance=5e-3, window=4)
    found = conjugate_gradients(multiply_by(matrix), plain, gradient, 1e-6, rule, None)
    values, at = found.values, found.iterations
    assert 5 <= at < 500

    def progress(i: int) -> float:
        k = max(4, i // 10)
        return (values[i] - values[i - k]) / values[i] / k

    assert progress(at) < 5e-3
    assert all(progress(i) >= 5e-3 for i in range(5, at))
    assert conjugate_gradients(multiply_by(matrix), plain, gradient, 1e-6, Rule(3), None).iterations == 3


def test_a_start_that_leads_away_is_dropped_and_a_long_one_shortened() -> None:
    matrix, gradient = problem()
    identity = torch.eye(N, dtype=torch.float64)
    expected = -torch.linalg.solve(matrix + 0.1 * identity, gradient)
    away = conjugate_gradients(multiply_by(matrix), plain, gradient, 0.1, Rule(0), -expected)
    assert not away.point.any()
    assert away.values == (0.0,)
    long = conjugate_gradients(multiply_by(matrix), plain, gradient, 0.1, Rule(0), 4 * expected)
    torch.testing.assert_close(long.point, expected)


def test_curvature_that_is_not_positive_ends_it_at_the_last_good_iterate() -> None:
    matrix, gradient = problem()
    matrix = matrix - 0.2 * torch.eye(N, dtype=torch.float64)  # most eigenvalues are below zero
    found = conjugate_gradients(multiply_by(matrix), plain, gradient, 0.0, Rule(100), None)
    assert found.curved_down
    assert torch.isfinite(found.point).all()
    assert list(found.values) == sorted(found.values, reverse=True)
    assert float(gradient @ found.point) < 0
    # At once, without an iterate: the preconditioned gradient.
    for start in (None, gradient):
        downhill = conjugate_gradients(multiply_by(-matrix @ matrix), lambda v: v / 2, gradient, 0.0, Rule(100), start)
        torch.testing.assert_close(downhill.point, -gradient / 2)
        assert downhill.curved_down
        assert downhill.iterations == 1  # with its value, which whoever judges the step goes by
        value = -0.5 * downhill.point @ matrix @ matrix @ downhill.point + gradient @ downhill.point
        assert downhill.values == (0.0, pytest.approx(float(value)))


def test_nothing_to_solve_is_solved() -> None:
    matrix, gradient = problem()
    found = conjugate_gradients(multiply_by(matrix), plain, torch.zeros_like(gradient), 0.1, Rule(100), None)
    assert not found.point.any()
    assert found.iterations == 0
