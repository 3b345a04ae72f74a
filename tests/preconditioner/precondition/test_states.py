"""State of transforms: one for each block, the same under every placement, left alone by a skipped step, resumed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.extensions.transform import HeavyBall
from kfac_dist import KFAC
from kfac_dist.errors import CheckpointError, ConfigError
from kfac_dist.extensions import Stack, Stage, State, Transform, register_transform
from tests.harness import run_ranks
from tests.preconditioner.slices import SlicedEngine
from tests.preconditioner.test_invariance import TOLERANCE, configuration
from tests.preconditioner.workloads import Run, relative

CHOSEN = {"transforms": {"heavy_ball": {"decay": 0.5}, "delayed": {}}}


class Delayed(Transform):
    """Adds half of the last update to this one's; keeps a count, and what it was given itself."""

    stage = Stage.UPDATE

    def initial(self, gradient: Tensor) -> dict[str, Tensor]:
        return {"last": torch.zeros_like(gradient), "count": torch.zeros(len(gradient))}

    def apply(self, update: Tensor, stack: Stack, state: State) -> Tensor:
        old, state["last"] = state["last"], update
        state["count"] = state["count"] + 1
        return update + 0.5 * old


class Swapped(Transform):
    """Returns and hands on its own memory."""

    stage = Stage.LENGTH

    def initial(self, gradient: Tensor) -> dict[str, Tensor]:
        return {"one": torch.zeros_like(gradient), "two": torch.ones_like(gradient)}

    def apply(self, update: Tensor, stack: Stack, state: State) -> Tensor:
        state["one"], state["two"] = state["two"], state["one"]
        return state["two"]


class Misshapen(Transform):
    """Keeps a tensor without a row for each matrix, or assigns one."""

    def __init__(self, first: int, then: int) -> None:
        self._first, self._then = first, then

    def initial(self, gradient: Tensor) -> dict[str, Tensor]:
        return {"values": gradient.new_zeros(len(gradient) + self._first, 2)}

    def apply(self, update: Tensor, stack: Stack, state: State) -> Tensor:
        state["values"] = update.new_zeros(len(update), 2 + self._then)
        return update


class Fixed(HeavyBall):
    """Says that it is linear, and has a state."""

    linear = True


register_transform("delayed", Delayed, api_version=1)
register_transform("swapped", Swapped, api_version=1)
register_transform("misshapen", Misshapen, api_version=1)
register_transform("fixed", Fixed, api_version=1)
assert HeavyBall


def options(placement: str = "auto", **more: Any) -> dict[str, Any]:
    return {**configuration(placement=placement, **more), "update": {"kl_clip": 0.01, **CHOSEN}}


def train(name: str, config: dict[str, Any]) -> dict[str, Tensor]:
    run = Run(name, config)
    found = run.train(6)
    kept = run.kfac.state_dict()["transforms"]
    run.close()
    return {**found, **{f"{block}/{key}": value for block, own in kept.items() for key, value in own.items()}}


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_and_placements_leave_it_alone(size: int) -> None:
    [wanted] = run_ranks(1, train, "conv", options())
    assert set(wanted) > {"grouped/heavy_ball.momentum", "head/delayed.last", "norm/delayed.count"}
    assert wanted["grouped/heavy_ball.momentum"].shape == (2, 2, 27)
    assert torch.equal(wanted["grouped/delayed.count"], torch.full((2,), 6.0))
    for placement in ("replicated", "owner"):
        for found in run_ranks(size, train, "conv", options(placement)):
            assert set(found) == set(wanted)
            assert relative(found, wanted) < TOLERANCE


def train_sliced(config: dict[str, Any]) -> dict[str, Tensor]:
    run = Run("mlp", config)
    run.kfac.remove()
    engine = SlicedEngine(run.wrapped, run.size, (3, 1)[: run.size])
    run.kfac = KFAC(engine, config, optimizer=run.optimizer)
    for step in range(6):
        run.gradients(step)
        run.kfac.step()
        engine.complete()
        run.optimizer.step()
    kept = run.kfac.state_dict()["transforms"]
    run.close()
    return {**run.parameters(), **{f"{b}/{key}": value for b, own in kept.items() for key, value in own.items()}}


def test_slices_of_gradients_leave_it_alone() -> None:
    [wanted] = run_ranks(1, train, "mlp", options())
    for found in run_ranks(2, train_sliced, options(buckets=2)):
        assert relative(found, wanted) < TOLERANCE


def resumed(state: dict[str, Any] | None, steps: range, parameters: dict[str, Any] | None, placement: str) -> Any:
    run = Run("conv", options(placement))
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    if state is not None:
        run.kfac.load_state_dict(state)
        run.model.load_state_dict(parameters or {})
    for step in steps:
        run.step(step)
    found = run.kfac.state_dict(), run.model.state_dict()
    run.close()
    return found


def test_a_run_goes_on_with_it() -> None:
    """Bit for bit on as many ranks; up to rounding from two ranks to one."""
    whole, *_ = run_ranks(2, resumed, None, range(6), None, "owner")
    half, *_ = run_ranks(2, resumed, None, range(3), None, "owner")
    again, *_ = run_ranks(2, resumed, half[0], range(3, 6), half[1], "owner")
    for name, value in whole[1].items():
        assert torch.equal(again[1][name], value), name
    [alone] = run_ranks(1, resumed, half[0], range(3, 6), half[1], "auto")
    assert relative(alone[1], whole[1]) < TOLERANCE


def simple(transforms: dict[str, Any], **update: Any) -> tuple[nn.Module, KFAC]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, KFAC(model, {"update": {"kl_clip": None, "transforms": transforms, **update}})


def backward(model: nn.Module) -> None:
    model.zero_grad()
    cross_entropy(model(torch.randn(8, 6)), torch.randint(3, (8,))).backward()


def test_a_skipped_step_leaves_it_alone() -> None:
    model, kfac = simple({"heavy_ball": {}, "delayed": {}})
    backward(model)
    kfac.step()
    before = kfac.state_dict()["transforms"]
    assert all(bool(value.any()) for own in before.values() for value in own.values())
    backward(model)
    model[2].weight.grad[1, 2] = math.inf
    kfac.step()
    after = kfac.state_dict()["transforms"]
    for block, own in before.items():
        for key, value in own.items():
            assert torch.equal(after[block][key], value)
    kfac.remove()


def test_a_transform_may_hand_on_its_own_memory() -> None:
    model, kfac = simple({"swapped": {}})
    for wanted in (0.0, 1.0, 0.0):
        backward(model)
        kfac.step()
        assert all(torch.equal(p.grad, torch.full_like(p, wanted)) for p in model.parameters() if p.grad is not None)
        kept = kfac.state_dict()["transforms"]["2"]
        assert torch.equal(kept["swapped.one"], torch.full((1, 3, 6), 1 - wanted))
        assert torch.equal(kept["swapped.two"], torch.full((1, 3, 6), wanted))
    kfac.remove()


def test_the_trust_region_measures_what_the_inverse_was_given() -> None:
    """⟨Δ, M⟩: with M the momentum, Δ = F⁻¹M; the collected gradient alone would be another number."""
    model, kfac = simple({"heavy_ball": {"decay": 0.9}}, kl_clip=1e-6, kl_clip_lr=1.0)
    for _ in range(3):
        backward(model)
        kfac.step()
    momenta = kfac.state_dict()["transforms"]
    after = {name: torch.cat([model[int(name)].weight.grad, model[int(name)].bias.grad[:, None]], 1) for name in "02"}
    product = sum(float((after[name] * momenta[name]["heavy_ball.momentum"][0]).sum()) for name in "02")
    # One ν is a factor of what was delivered, the other of the step's own divergence.
    assert product * kfac.metrics()["kl_scale"] == pytest.approx(1e-6, rel=1e-4)
    kfac.remove()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'misshapen': its state 'values' has shape \[2, 2\]; expected 1 rows"):
        simple({"misshapen": {"first": 1, "then": 0}})
    model, kfac = simple({"misshapen": {"first": 0, "then": 1}})
    backward(model)
    with pytest.raises(ConfigError, match=r"'misshapen' assigned 'values' of shape \[1, 3\] to its state; `initial`"):
        kfac.step()
    kfac.remove()
    with pytest.raises(ConfigError, match=r"transforms.fixed: it says that it is linear, and has a state"):
        simple({"fixed": {}})
    with pytest.raises(ConfigError, match=r"transforms.misshapen: missing a required argument: 'then'"):
        simple({"misshapen": {"first": 0}})
    chain = {"inversion": {"structure": "block_tridiagonal", "solver": "eigen"}}
    with pytest.raises(ConfigError, match=r"transforms.delayed takes layers one by one, and kfac.inversion.structure"):
        KFAC(nn.Sequential(nn.Linear(3, 2)), {**chain, "update": {"kl_clip": None, **CHOSEN}})
    with pytest.raises(ConfigError, match=r"transforms.heavy_ball has no effect while kfac.solver is cg"):
        KFAC(nn.Sequential(nn.Linear(3, 2)), {"solver": "cg", "update": CHOSEN})


def test_a_chain_has_the_momentum_of_each_layer() -> None:
    chain = {"inversion": {"structure": "block_tridiagonal", "solver": "eigen", "early_refresh": 0}}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    kfac = KFAC(model, {**chain, "update": {"kl_clip": None, "transforms": {"heavy_ball": {"decay": 0.5}}}})
    wanted = torch.zeros(3, 6)
    for _ in range(3):
        backward(model)
        wanted = 0.5 * wanted + torch.cat([model[2].weight.grad, model[2].bias.grad[:, None]], 1)
        kfac.step()
    torch.testing.assert_close(kfac.state_dict()["transforms"]["2"]["heavy_ball.momentum"][0], wanted)
    kfac.remove()


def test_a_state_without_it_is_refused() -> None:
    _, plain = simple({})
    state = plain.state_dict()
    assert "transforms" not in state
    plain.remove()
    _, kfac = simple({"heavy_ball": {}})
    with pytest.raises(CheckpointError, match=r"has none of 'heavy_ball.momentum' for layer '0', where \[1, 5, 7\]"):
        kfac.load_state_dict(state)
    kfac.remove()
