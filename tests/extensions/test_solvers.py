"""The registered solver of `examples/extensions/solver.py` beside Cholesky, and solvers that fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from examples.extensions import solver as solver_example
from kfac_dist.config.schema import Solver
from kfac_dist.curvature.factors import FactorKind, Side, Unit
from kfac_dist.curvature.inverses.solvers import Task, solve
from kfac_dist.extensions import register_solver
from tests.extensions.parts import ONE_AND_TWO, OPTIONS, linear_model, options_with, trained
from tests.harness import run_ranks

assert solver_example.conjugate_gradients  # registered by its import


def solved() -> tuple[list[Tensor], list[Tensor]]:
    wanted, _ = trained(linear_model(), OPTIONS)
    found, _ = trained(linear_model(), options_with("inversion", solver="conjugate_gradients"))
    return wanted, found


@ONE_AND_TWO
def test_the_solver_takes_the_step_of_cholesky(ranks: int) -> None:
    for wanted, found in run_ranks(ranks, solved):
        for theirs, ours in zip(wanted, found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
            assert not torch.equal(ours, theirs)


SEEN: list[tuple[Tensor, Tensor]] = []


def kept_and_cholesky(matrices: Tensor, previous: Tensor) -> Tensor:
    SEEN.append((matrices.clone(), previous.clone()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrices))
    matrices.zero_()
    return inverse


def wrong_shape(matrices: Tensor, previous: Tensor) -> Tensor:
    return matrices[0]


def negative(matrices: Tensor, previous: Tensor) -> Tensor:
    return -torch.linalg.inv(matrices)


def not_finite(matrices: Tensor, previous: Tensor) -> Tensor:
    return torch.linalg.inv(matrices) / 0


def raising(matrices: Tensor, previous: Tensor) -> Tensor:
    raise ZeroDivisionError("no")


register_solver("kept", kept_and_cholesky, api_version=1)
for bad in (wrong_shape, negative, not_finite, raising):
    register_solver(f"bad_{bad.__name__}", bad, api_version=1)


def test_a_solver_gets_damped_factors_and_its_last_inverses() -> None:
    SEEN.clear()
    found, _ = trained(linear_model(), options_with("inversion", solver="kept"), steps=3)
    wanted, _ = trained(linear_model(), OPTIONS, steps=3)
    for theirs, ours in zip(wanted, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    shapes = [tuple(matrices.shape) for matrices, _ in SEEN]
    assert sorted(set(shapes)) == [(1, 3, 3), (1, 7, 7), (2, 6, 6)]
    assert all(
        torch.equal(previous, torch.eye(previous.shape[-1]).double().expand_as(previous)) for _, previous in SEEN[:3]
    )
    for (matrices, _), (_, previous) in zip(SEEN[:3], SEEN[3:6], strict=True):
        assert torch.equal(matrices, matrices.mT)
        torch.testing.assert_close(previous @ matrices, torch.eye(matrices.shape[-1]).double().expand_as(matrices))


@pytest.mark.parametrize(
    ("solver", "said"),
    [
        ("bad_wrong_shape", "returned [3, 3] where [1, 3, 3] was due"),
        ("bad_negative", "returned no positive definite matrix"),
        ("bad_not_finite", "returned no positive definite matrix"),
        ("bad_raising", "raises ZeroDivisionError: no"),
    ],
)
def test_cholesky_inverts_and_says_why_where_a_solver_fails(solver: str, said: str) -> None:
    factor = torch.tensor([[4.0, 1, 0], [1, 3, 0], [0, 0, 2]]).double()
    unit = Unit("layer", Side.A, 0, 0, 3, 1, FactorKind.DENSE)
    raised: dict[str, str] = {}
    task = Task(unit, factor[None], 0.5, None, dtype=torch.float64)
    (payload,), failures = solve([task], Solver(solver), raised=raised)
    assert payload is not None
    torch.testing.assert_close(payload.view(3, 3), torch.linalg.inv(factor + 0.5 * torch.eye(3).double()))
    assert failures == 0
    assert raised == {"layer/A/0": f"inverted by cholesky, since {solver} {said}"}
