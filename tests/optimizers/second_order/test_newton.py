"""K-FAC Newton against dense algebra: the plane's lowest point, λ, γ; and steps that have to be left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kfac_dist.errors import ModelError
from kfac_dist.optimizers import build_stepper
from kfac_dist.optimizers.second_order.newton import NewtonStepper
from kfac_dist.optimizers.stepper import Problem
from kfac_dist.preconditioner.kfac import KFAC
from tests.optimizers.tiny import Case, dense

L2 = 0.01
Total = Callable[[Tensor, Tensor], Tensor]


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="sum")


def _case(total: Total = _cross_entropy) -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return Case(model, torch.randn(12, 4), torch.arange(12) % 3, total, 12)


def _stepper(case: Case, **newton: Any) -> NewtonStepper:
    config = {
        "solver": "newton",
        "newton": newton,
        "curvature": {"fisher": "type2", "likelihood": "categorical"},
        "inversion": {"inverse_every": 2, "damping": 0.1},
        "update": {"l2": L2},
    }
    stepper = build_stepper(KFAC(case.model, config), case.total)
    assert isinstance(stepper, NewtonStepper)
    return stepper


def _backward(case: Case, stepper: NewtonStepper) -> float:
    case.model.zero_grad()
    stepper.micro_batch(case.inputs, case.targets)
    outputs = case.model(case.inputs)
    stepper.kfac.fisher_backward(outputs)
    loss = case.total(outputs, case.targets) / case.terms
    loss.backward()
    return loss.item()


class _Model:
    """The quadratic model at the present parameters, and the loss, by dense algebra."""

    def __init__(self, case: Case, stepper: NewtonStepper, gradient: Tensor) -> None:
        parameters = stepper.space.parameters
        with torch.enable_grad():
            fisher = dense(case, dict(parameters)).detach()
        self.matrix = (fisher + stepper.damping * torch.eye(len(fisher))).double()
        self.gradient = gradient.double()

    def __call__(self, step: Tensor) -> float:
        step = step.double()
        return float(0.5 * step @ self.matrix @ step + self.gradient @ step)

    def lowest(self, *directions: Tensor) -> Tensor:
        plane = torch.stack(directions, dim=1).double()
        return -plane @ torch.linalg.solve(plane.T @ self.matrix @ plane, plane.T @ self.gradient)


def _loss(case: Case, parameters: Tensor) -> float:
    outputs = case.model(case.inputs).detach()
    return float(case.total(outputs, case.targets)) / case.terms + L2 / 2 * float(parameters @ parameters)


def test_the_step_is_the_lowest_point_of_the_dense_model_and_both_dampings_follow_their_rules() -> None:
    case = _case()
    stepper = _stepper(case, damping_every=1, gamma_every=4)
    find, seen = stepper.find, []

    def watched(problem: Problem) -> Tensor:
        model = _Model(case, stepper, problem.gradient)
        before, trust, gamma = stepper._last.clone(), stepper.trust.damping, stepper.search.gamma
        present = -stepper.precondition(problem.gradient)
        step = find(problem)
        seen.append((model, before, present, trust, gamma, step, -stepper.precondition(problem.gradient)))
        return step

    stepper.find = watched  # type: ignore[method-assign]
    point = stepper.space.point()
    for index in range(9):
        _backward(case, stepper)
        loss = _loss(case, point)
        assert stepper.step()
        model, before, present, trust, gamma, step, chosen = seen[-1]
        torch.testing.assert_close(stepper.space.point(), point + step)
        point = stepper.space.point()
        numbers = stepper.metrics()
        assert numbers["model"] == pytest.approx(model(step), rel=1e-3, abs=1e-7)
        expected = model.lowest(chosen, before) if index else model.lowest(chosen)
        torch.testing.assert_close(step.double(), expected, rtol=1e-2, atol=1e-4)
        if index and index % 4 == 0:  # three γ were tried, each with inverses of its own
            assert model(expected) <= model(model.lowest(present, before)) + 1e-7
            assert numbers["gamma"] / gamma in (pytest.approx(0.95**2), pytest.approx(1.0), pytest.approx(0.95**-2))
        else:
            assert torch.equal(chosen, present)
            assert numbers["gamma"] == gamma
        rho = (_loss(case, point) - loss) / model(step)
        assert numbers["rho"] == pytest.approx(rho, rel=2e-2)
        factor = 0.95 if rho > 0.75 else 1 / 0.95 if rho < 0.25 else 1.0
        assert numbers["lambda"] == pytest.approx(trust * factor)
    assert len({item[4] for item in seen}) > 1, "γ has moved"


def test_a_search_takes_the_gamma_whose_own_inverses_give_the_lowest_model() -> None:
    case = _case()
    stepper = _stepper(case, damping_every=0, gamma_every=2)
    for _ in range(2):
        _backward(case, stepper)
        assert stepper.step()
    _backward(case, stepper)
    kfac, last = stepper.kfac, stepper._last.clone()
    gradient = stepper.space.flatten(kfac.solver_access.engine.gradients()) + L2 * stepper.space.point()
    model, candidates = _Model(case, stepper, gradient), stepper.search.candidates()
    tried: list[tuple[float, Tensor]] = []
    kfac.solver_access.update_curvature()
    for gamma in candidates:
        kfac.solver_access.set_damping(gamma**2 - L2)
        kfac.solver_access.refresh_again()
        proposal = -stepper.precondition(gradient)
        tried.append((model(model.lowest(proposal, last)), proposal))
    kfac.solver_access.set_damping(candidates[0] ** 2 - L2)
    kfac.solver_access.refresh_again()
    kfac.solver_access.update_curvature = lambda: None  # type: ignore[method-assign]  # this step's statistics are taken already
    assert stepper.step()
    values = [value for value, _ in tried]
    best = values.index(min(values))
    assert stepper.search.gamma == candidates[best]
    torch.testing.assert_close(stepper._last.double(), model.lowest(tried[best][1], last), rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(-stepper.precondition(gradient), tried[best][1])


def test_a_step_that_is_skipped_searches_no_gamma() -> None:
    """Its statistics are dropped, so that no inverse could be solved from them."""
    case = _case()
    stepper = _stepper(case, damping_every=0, gamma_every=2)
    for _ in range(2):
        _backward(case, stepper)
        assert stepper.step()
    gamma = stepper.search.gamma
    _backward(case, stepper)
    next(case.model.parameters()).grad[0, 0] = math.inf
    assert not stepper.step()
    assert stepper.search.gamma == gamma
    _backward(case, stepper)
    assert stepper.step()


def test_products_may_be_taken_over_a_share_of_the_batch() -> None:
    case = _case()
    stepper = _stepper(case, products_fraction=0.25, momentum=False)
    _backward(case, stepper)
    assert stepper.step()
    case = _case()  # the parameters from before the step
    part = Case(case.model, case.inputs[::4], case.targets[::4], case.total, 3)
    again = _stepper(case, momentum=False)
    _backward(case, again)
    gradient = again.space.flatten(again.kfac.solver_access.engine.gradients()) + L2 * again.space.point()
    model = _Model(part, again, gradient)
    proposal = -(stepper._last / stepper.metrics()["alpha"])
    torch.testing.assert_close(stepper._last.double(), model.lowest(proposal), rtol=1e-3, atol=1e-5)
    assert stepper.metrics()["mu"] == 0


def test_a_share_of_a_batch_by_which_a_layer_normalises_is_refused() -> None:
    case = _case()
    case.model.insert(1, nn.BatchNorm1d(6))
    with pytest.raises(ModelError, match=r"newton\.products_fraction \(0\.25\) must be 1 with 1 \(BatchNorm1d\)"):
        _stepper(case, products_fraction=0.25)
    _stepper(case)
    _stepper(Case(case.model.eval(), case.inputs, case.targets, case.total, 12), products_fraction=0.25)


def _finite_below(bound: float) -> Total:
    def total(outputs: Tensor, targets: Tensor) -> Tensor:
        far = torch.where(outputs.detach().abs().max() > bound, torch.inf, 1.0)
        return _cross_entropy(outputs, targets) * far

    return total


def test_a_step_beyond_which_the_loss_is_not_finite_is_left_out_and_lambda_grows() -> None:
    case = _case()
    start = float(case.model(case.inputs).detach().abs().max())
    case = _case(_finite_below(1.05 * start))
    stepper = _stepper(case, damping_every=1)
    before = stepper.space.point()
    _backward(case, stepper)
    assert not stepper.step()
    assert torch.equal(stepper.space.point(), before)
    assert stepper.metrics()["lambda"] == pytest.approx(0.1 / 0.95)
    assert stepper.metrics()["rho"] == -math.inf
    assert not stepper._last.any()


def test_its_state_is_all_that_the_next_step_needs() -> None:
    case = _case()
    stepper = _stepper(case, damping_every=2, gamma_every=2)
    for _ in range(3):
        _backward(case, stepper)
        stepper.step()
    state, kfac, point = stepper.state_dict(), stepper.kfac.state_dict(), stepper.space.point()
    _backward(case, stepper)
    stepper.step()
    other = _case()
    again = _stepper(other, damping_every=2, gamma_every=2)
    for name, view in again.space.views(point).items():
        again.space.parameters[name].data.copy_(view)
    again.kfac.load_state_dict(kfac)
    again.load_state_dict(state)
    _backward(other, again)
    again.step()
    assert torch.equal(again.space.point(), stepper.space.point())
    assert again.metrics() == stepper.metrics()
