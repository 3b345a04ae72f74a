"""Whole steps of K-FAC CG: against dense solves, with what surrounds the solve, and alike on any number of ranks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from kfac_dist import KFAC
from kfac_dist.config.schema import Config
from kfac_dist.errors import CheckpointError, ConfigError, ModelError
from kfac_dist.optimizers import Stepper, build_stepper
from kfac_dist.optimizers.second_order import cg as cg_module
from kfac_dist.training import train
from kfac_dist.training.records.metrics import read_metrics
from tests.harness import run_ranks
from tests.optimizers.tiny import Case, dense
from tests.training.runs import final_model, launched, losses, small_config

DAMPING = 0.05
EVERY_STEP = {"curvature": {"factor_every": 1, "likelihood": "bernoulli"}, "inversion": {"inverse_every": 1}}
EXACT = {"max_iterations": 200, "tolerance": 1e-9, "damping": DAMPING}


def total(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 4))


def batch(samples: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(samples, 4, generator=generator), torch.rand(samples, 4, generator=generator)


def stepper_on(model: nn.Module, cg: dict[str, Any], **sections: dict[str, Any]) -> Stepper:
    return build_stepper(KFAC(model, {**EVERY_STEP, **sections, "solver": "cg", "cg": cg}), total)


def take_steps(model: nn.Module, stepper: Stepper, steps: int, parts: int = 1) -> list[bool]:
    inputs, targets = batch()
    taken = []
    for _ in range(steps):
        model.zero_grad()
        for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            stepper.kfac.micro_batch(divisor=len(inputs), last=False)
            stepper.micro_batch(x, y)
            (total(model(x), y) / len(inputs)).backward()
        taken.append(stepper.step())
    return taken


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_a_step_solves_the_dense_system(parts: int, l2: float) -> None:
    model = net()
    inputs, targets = batch()
    case = Case(model, inputs, targets, total, len(inputs))
    parameters = dict(model.named_parameters())
    before = torch.cat([p.detach().flatten() for p in parameters.values()])
    matrix = dense(case, parameters) + (DAMPING + l2) * torch.eye(len(before))
    loss = total(model(inputs), targets) / len(inputs)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))]) + l2 * before
    stepper = stepper_on(model, EXACT, update={"l2": l2})
    assert take_steps(model, stepper, 1, parts) == [True]
    after = torch.cat([p.detach().flatten() for p in parameters.values()])
    expected = -torch.linalg.solve(matrix.double(), gradient.double()).float()
    torch.testing.assert_close(after - before, expected, rtol=2e-3, atol=2e-4)
    assert stepper.metrics()["iterations"] < len(before)


def test_the_preconditioner_saves_iterations() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 8))
    inputs = torch.randn(200, 12) * torch.logspace(0.5, -1.5, 12)
    targets = torch.rand(200, 8)
    inversion = {"inverse_every": 1, "damping": 1e-3}
    cg = {"max_iterations": 12, "compare_every": 2}
    curvature = {"factor_every": 1, "fisher": "type2", "likelihood": "bernoulli"}
    stepper = stepper_on(model, cg, inversion=inversion, curvature=curvature)
    seen = []
    for _ in range(3):
        model.zero_grad()
        stepper.micro_batch(inputs, targets)
        outputs = model(inputs)
        stepper.kfac.fisher_backward(outputs)
        (total(outputs, targets) / 200).backward()
        assert stepper.step()
        seen.append(stepper.metrics())
    assert [numbers["compared"] for numbers in seen] == [12, 12, seen[2]["iterations"]]
    assert seen[0]["plain"] == seen[1]["plain"], "the second step wasn't compared"
    assert all(numbers["plain"] > 2 * numbers["compared"] for numbers in seen)
    assert seen[2]["iterations_total"] == sum(numbers["iterations"] for numbers in seen)


def test_a_comparison_that_ends_before_it_came_as_far_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cg_module, "COMPARED_ITERATIONS", 3)
    model = net()
    cg = {**EXACT, "damping": 1e-4, "compare_every": 2}
    stepper = stepper_on(model, cg)
    take_steps(model, stepper, 1)
    numbers = stepper.metrics()
    assert numbers["compared"] > 3
    assert numbers["plain_above"] == 3
    assert "plain" not in numbers
    monkeypatch.setattr(cg_module, "COMPARED_ITERATIONS", 500)
    stepper.options = stepper.options.model_copy(update={"max_iterations": 2})
    take_steps(model, stepper, 2)  # the second of them is compared, and gets there
    numbers = stepper.metrics()
    assert numbers["compared"] == 2
    assert 1 <= numbers["plain"] < 500
    assert "plain_above" not in numbers


def test_steps_that_raise_the_loss_are_halved_or_left_out_and_lambda_follows() -> None:
    inputs, targets = batch()

    def fall(cg: dict[str, Any]) -> tuple[float, dict[str, float]]:
        model = net()
        with torch.no_grad():
            before = total(model(inputs), targets)
        stepper = stepper_on(model, {**EXACT, "damping": 1e-4, "adapt_every": 1, **cg})
        take_steps(model, stepper, 1)
        with torch.no_grad():
            return float(before - total(model(inputs), targets)), stepper.metrics()

    far, numbers = fall({"lr": 1.9})
    assert far < 0
    assert numbers["scale"] == 1.9
    assert numbers["rho"] < 0.25  # the model can't foretell a loss that rises
    near, numbers = fall({"lr": 1.9, "backtracking": 8})
    assert near > 0
    assert 1.9 / 2**8 <= numbers["scale"] < 1.9
    none, numbers = fall({"lr": 4000.0, "backtracking": 1})
    assert none == 0
    assert numbers["scale"] == 0
    model = net()
    stepper = stepper_on(model, {**EXACT, "lr": 1.9, "damping": 1e-4, "adapt_every": 1})
    take_steps(model, stepper, 2)
    assert stepper.metrics()["damping"] == pytest.approx(1e-4 / 0.95)  # of the second step, after one adaptation


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_where_the_model_curves_down_lambda_grows(lr: float) -> None:
    def saddle(outputs: Tensor, targets: Tensor) -> Tensor:
        return (-0.5 * outputs.square() + 0.01 * (outputs - targets).pow(4)).sum()

    model, (inputs, targets) = net(), batch()
    cg = {"adapt_every": 1, "lr": lr, "max_iterations": 10}
    stepper = build_stepper(KFAC(model, {**EVERY_STEP, "solver": "cg", "cg": cg}), saddle)
    dampings = []
    for _ in range(3):
        model.zero_grad()
        stepper.micro_batch(inputs, targets)
        before = saddle(model(inputs), targets) / len(inputs)
        before.backward()
        gradient = stepper.space.flatten(stepper.kfac.solver_access.engine.gradients())
        assert stepper.step()
        numbers, step = stepper.metrics(), -stepper.space.flatten(stepper.kfac.solver_access.engine.gradients())
        assert numbers["curved_down"]
        # ρ compares the loss with M(lr·d), which follows from the slope and M(d).
        slope = float(gradient @ step) / lr
        assert max(slope, numbers["model"]) < 0
        with torch.no_grad():
            change = float(saddle(model(inputs), targets) / len(inputs) - before)
        predicted = lr * slope + lr**2 * (numbers["model"] - slope)
        assert numbers["rho"] == pytest.approx(change / predicted, rel=1e-3)
        dampings.append(numbers["damping"])
    assert dampings[1:] == [pytest.approx(dampings[0] / 0.95**k) for k in (1, 2)]


def test_the_next_step_starts_where_the_last_one_ended_and_resumes_there() -> None:
    cg = {"max_iterations": 3, "lr": 0.3, "warm_start": 1.0, "adapt_every": 1}  # much is left of what was solved
    whole, model = net(), net()
    stepper = stepper_on(whole, cg)
    take_steps(whole, stepper, 2)
    cold = net()
    take_steps(cold, stepper_on(cold, cg | {"warm_start": 0.0}), 2)
    assert not torch.equal(whole[0].weight, cold[0].weight)
    state = {"solver": stepper.state_dict(), "kfac": stepper.kfac.state_dict()}
    model.load_state_dict(whole.state_dict())
    resumed = stepper_on(model, cg)
    resumed.kfac.load_state_dict(state["kfac"])
    resumed.load_state_dict(state["solver"])
    take_steps(whole, stepper, 2)
    take_steps(model, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    with pytest.raises(CheckpointError, match=r"no \[6, 4\] for '0\.weight'"):
        resumed.load_state_dict({**state["solver"], "last": {}})


def test_loops_are_told_what_is_missing() -> None:
    model = net()
    kfac = KFAC(model, {**EVERY_STEP, "solver": "cg"})
    with pytest.raises(ConfigError, match=r"build_stepper\(kfac, loss\)\.step\(\)"):
        kfac.step()
    with pytest.raises(ModelError, match=r"call micro_batch\(inputs, targets\) before forward"):
        build_stepper(kfac, total).step()
    with pytest.raises(ConfigError, match="solver is direct"):
        build_stepper(KFAC(net(), {"update": {"kl_clip": None}}), total)


# ---- ranks

RUNS = {
    "replicated": {"distribution": {"placement": "replicated"}},
    "owner": {"distribution": {"placement": "owner"}, "curvature": {"uncovered": "diagonal", "fisher": "mc"}},
}


def run_of(directory: Path | str, name: str, **sections: Any) -> Config:
    kfac = {
        "solver": "cg",
        "curvature": {"factor_every": 2} | RUNS[name].get("curvature", {}),
        "inversion": {"inverse_every": 4, "damping": 0.1},
        "distribution": RUNS[name]["distribution"],
        "cg": {"max_iterations": 6, "backtracking": 2, "adapt_every": 2, "compare_every": 3},
    }
    sections = {"train": {"steps": 5, "accumulate": 2}} | sections
    return small_config(f"{directory}/{name}", optimizer=None, kfac=kfac, **sections)


def _train_and_skip(directory: str) -> list[Any]:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    for name in RUNS:
        train(run_of(directory, name), quiet=True)
    model = DistributedDataParallel(net())
    stepper = stepper_on(model, EXACT)
    taken = take_steps(model, stepper, 1)
    before = [p.clone() for p in model.parameters()]
    inputs, targets = batch()
    if dist.get_rank() == 1:
        inputs = inputs * float("nan")
    model.zero_grad()
    stepper.micro_batch(inputs, targets)
    (total(model(inputs), targets) / len(inputs)).backward()
    taken.append(stepper.step())
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    taken += take_steps(model, stepper, 1)
    return [taken, same, [p.detach() for p in model.parameters()]]


def test_three_ranks_train_as_one_and_skip_together(tmp_path: Path) -> None:
    ranks = run_ranks(3, _train_and_skip, str(tmp_path / "3"))
    for name in RUNS:
        train(run_of(tmp_path / "1", name), quiet=True)
        assert losses(tmp_path / f"1/{name}/small") == pytest.approx(losses(tmp_path / f"3/{name}/small"), rel=1e-4)
        one, three = (final_model(tmp_path / f"{world}/{name}/small") for world in (1, 3))
        torch.testing.assert_close(three, one, rtol=1e-3, atol=1e-4)
    alone = net()
    take_steps(alone, stepper_on(alone, EXACT), 2)
    for taken, same, parameters in ranks:
        assert taken == [True, False, True]
        assert same
        torch.testing.assert_close(parameters, [p.detach() for p in alone.parameters()], rtol=1e-3, atol=1e-4)


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    sections = {
        "model": {"name": "tests.training.runs:DropoutNet", "args": {}},
        "train": {"steps": 10, "log_every": 2},
        "checkpoint": {"every": 5, "keep": 3},
    }
    train(run_of(tmp_path / "whole", "replicated", **sections), quiet=True)
    whole, resumed = tmp_path / "whole/replicated/small", tmp_path / "resumed/replicated/small"
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints/step-00000005", resumed / "checkpoints/step-00000005")
    shutil.copy(whole / "metrics.jsonl", resumed)
    sections["checkpoint"]["resume"] = "auto"
    train(run_of(tmp_path / "resumed", "replicated", **sections), quiet=True)
    assert losses(resumed) == losses(whole)
    expected = final_model(whole)
    assert all(torch.equal(value, expected[name]) for name, value in final_model(resumed).items())
    record = read_metrics(resumed / "metrics.jsonl")[-2]
    assert record["solver/iterations"] > 0
    assert record["lr"] == 1.0


def test_a_run_that_began_with_direct_steps_goes_on_with_solved_ones(tmp_path: Path) -> None:
    train(small_config(tmp_path, kfac=True, train={"steps": 4}), quiet=True)
    begun = str(tmp_path / "small/checkpoints/step-00000004")
    train(run_of(tmp_path, "replicated", checkpoint={"resume": begun}), quiet=True)
    assert set(losses(tmp_path / "replicated/small")) == {5}


def test_what_was_told_of_a_discarded_batch_is_forgotten() -> None:
    moved = []
    for discards in (False, True):
        model = net()
        stepper = stepper_on(model, EXACT)
        if discards:
            stepper.micro_batch(*batch(5))
            total(model(batch(5)[0]), batch(5)[1]).backward()
            stepper.kfac.discard()
        take_steps(model, stepper, 1)
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        stepper.kfac.remove()
    assert torch.equal(*moved)
