"""Orthogonal steps: Muon with p = q = 0, dense algebra in float64, ranks, engines, resume, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kfac_dist import KFAC
from kfac_dist.config.schema import Iteration, Length, UpdateConfig
from kfac_dist.curvature.factors import Side
from kfac_dist.engines.ddp import DDPEngine
from kfac_dist.errors import CheckpointError, ConfigError
from kfac_dist.preconditioner.memory import rank_bytes
from kfac_dist.preconditioner.precondition.transforms.orthogonal import coefficients, msign, step_length
from kfac_dist.preconditioner.precondition.transforms.whitening import inverse_power
from tests.harness import run_ranks
from tests.preconditioner.slices import SlicedEngine
from tests.preconditioner.test_invariance import TOLERANCE
from tests.preconditioner.workloads import Run, relative, wrap

MUON = {"power_a": 0.0, "power_g": 0.0, "dtype": "bfloat16"}
LR, RATIO = 0.05, 0.2


def options(orthogonal: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    return {
        "curvature": {"factor_every": 2, "decay": 0.8, "likelihood": "categorical"},
        "inversion": {"inverse_every": 4},
        "update": {
            "direction": "orthogonal",
            "orthogonal": orthogonal or {},
            "first_order": {"lr_ratio": RATIO, "weight_decay": 0.1},
        },
        **sections,
    }


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Embedding(20, 12), nn.Linear(12, 30), nn.Tanh(), nn.LayerNorm(30), nn.Linear(30, 30, bias=False)),
        *(nn.Tanh(), nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 5)),
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 20, (16,), generator=generator), torch.randint(0, 5, (16,), generator=generator)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with PyTorch 2.9")
@pytest.mark.parametrize(("length", "theirs"), [("spectral", "original"), ("rms", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_without_powers_it_is_muon_and_adamw(length: str, theirs: str, nesterov: bool) -> None:
    """Over 20 steps, under a schedule of the learning rate; in float64, as bfloat16 magnifies a last bit."""
    ours, other = network().double(), network().double()
    hidden = [other[1].weight, other[4].weight, other[6].weight]
    rest = [p for p in other.parameters() if all(p is not weight for weight in hidden)]
    muon = torch.optim.Muon(hidden, lr=LR, momentum=0.9, nesterov=nesterov, weight_decay=0.05, adjust_lr_fn=theirs)
    adamw = torch.optim.AdamW(rest, lr=RATIO * LR, betas=(0.9, 0.95), weight_decay=0.1)
    orthogonal = {**MUON, "momentum": 0.9, "nesterov": nesterov, "length": length, "weight_decay": 0.05}
    sgd = torch.optim.SGD(ours.parameters(), lr=LR)
    kfac = KFAC(ours, options(orthogonal, curvature={"factor_every": 2, "factor_dtype": "float64"}), optimizer=sgd)
    assert [block.name for block in kfac.coverage.blocks] == ["1", "4", "6"]
    for step in range(20):
        inputs, labels = batch(step)
        for group, rate in ((sgd, LR), (muon, LR), (adamw, RATIO * LR)):
            group.param_groups[0]["lr"] = rate * (1 - step / 40)
        for model in (ours, other):
            model.zero_grad()
            cross_entropy(model(inputs), labels).backward()
        kfac.step()
        for optimizer in (sgd, muon, adamw):
            optimizer.step()
    metrics = kfac.metrics()
    assert metrics["refreshes"] == 0
    for (name, found), wanted in zip(ours.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=name)
    kfac.remove()


def root(factor: Tensor, power: float, damping: float) -> Tensor:
    """(M + ε tr M/n)^(−p) by dense algebra, up to its scale."""
    values, vectors = torch.linalg.eigh(factor)
    damped = values + damping * values.mean()
    return vectors @ torch.diag(damped**-power) @ vectors.mT


def polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


@pytest.mark.parametrize(("p", "q"), [(0.5, 0.5), (1.0, 0.0), (0.0, 0.5), (0.3, 1.0)])
def test_a_step_is_the_polar_factor_of_the_whitened_momentum(p: float, q: float) -> None:
    """In float64, beside an SVD and roots of the factors that `state_dict` shows."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    orthogonal = {"power_a": p, "power_g": q, "damping": 0.02, "iteration": "polar_express", "iterations": 30}
    config = options({**orthogonal, "momentum": 0.9, "nesterov": True})
    config["curvature"] = {"factor_every": 1, "factor_dtype": "float64", "likelihood": "categorical"}
    config["inversion"] = {"inverse_every": 1}
    kfac = KFAC(model, config, optimizer=torch.optim.SGD(model.parameters(), lr=LR))
    averages = {"0": torch.zeros(4, 6).double(), "2": torch.zeros(7, 4).double()}
    for step in range(3):
        model.zero_grad()
        inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        cross_entropy(model(inputs), torch.arange(32) % 5).backward()
        gradients = {name: model[int(name)].weight.grad.clone() for name in averages}
        kfac.step()
        units = kfac.state_dict()["units"]
        for name, gradient in gradients.items():
            averages[name] = 0.9 * averages[name] + 0.1 * gradient
            whitened = 0.1 * gradient + 0.9 * averages[name]
            for side, power in ((Side.A, p), (Side.G, q)):
                if not power:
                    continue
                unit = units[f"{name}/{side}/0"]
                upper = (unit["sum"][0] / unit["scalars"][0]).triu()
                factor = root(upper + upper.triu(1).mT, power, 0.02)
                whitened = whitened @ factor if side is Side.A else factor @ whitened
            d_out, d_in = whitened.shape
            wanted = polar(whitened) * math.sqrt(max(1, d_out / d_in))
            torch.testing.assert_close(model[int(name)].weight.grad, wanted, rtol=1e-7, atol=1e-8)
    assert kfac.metrics()["refreshes"] == 3
    kfac.remove()


@pytest.mark.parametrize("shape", [(3, 4, 9), (2, 9, 4), (1, 5, 5)])
def test_polar_express_comes_to_the_polar_factor(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    polynomials = coefficients(Iteration.POLAR_EXPRESS, 20)
    found = msign(matrices, polynomials, torch.float64, 1.01)
    torch.testing.assert_close(found, torch.stack([polar(one) for one in matrices]), rtol=1e-8, atol=1e-8)
    values = torch.linalg.svdvals(msign(matrices, coefficients(Iteration.MUON, 5), torch.float64))
    assert bool(((values > 0.6) & (values < 1.3)).all())
    assert not msign(torch.zeros(shape), polynomials, torch.float32).any()


def test_roots_have_a_mean_of_one_and_know_what_was_never_solved() -> None:
    values = torch.tensor([[4.0, 1.0, 0.0, 3.0], [-1.0] * 4, [0.0] * 4])
    found = inverse_power(values, 0.5, 0.01)
    wanted = (values[0] + 0.01 * 2.0) ** -0.5
    torch.testing.assert_close(found[0], wanted / wanted.mean())
    assert torch.equal(found[1:], torch.ones(2, 4))


def test_without_an_iteration_a_step_has_the_polar_factors_norm() -> None:
    model = network()
    kfac = KFAC(model, options({"iteration": "none"}), optimizer=torch.optim.SGD(model.parameters(), lr=LR))
    inputs, labels = batch(0)
    cross_entropy(model(inputs), labels).backward()
    kfac.step()
    for place, (d_out, d_in) in ((1, (30, 12)), (6, (8, 30))):
        norm = float(model[place].weight.grad.norm())
        assert norm == pytest.approx(math.sqrt(min(d_out, d_in) * max(1, d_out / d_in)), rel=1e-4)
    kfac.remove()


@pytest.mark.parametrize(("length", "wanted"), [(Length.SPECTRAL, 2.0), (Length.RMS, 0.2 * 4), (Length.NONE, 1.0)])
def test_lengths(length: Length, wanted: float) -> None:
    assert step_length(length, 16, 4) == wanted
    assert step_length(length, 4, 16) == (1.0 if length is Length.SPECTRAL else wanted)


class OrthogonalRun(Run):
    """A run in float64 that plain SGD steps, under an engine that may hold slices."""

    def __init__(self, name: str, config: dict[str, Any], weights: tuple[int, ...] = ()) -> None:
        super().__init__(name, {"enabled": True})
        self.kfac.remove()
        self.model.double()
        self.wrapped = wrap(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        self.engine = SlicedEngine(self.wrapped, self.size, weights) if weights else None
        self.kfac = KFAC(self.engine or self.wrapped, config, optimizer=self.optimizer)

    def step(self, step: int) -> float:
        loss = self.gradients(step, lambda inputs: inputs.double() if inputs.is_floating_point() else inputs)
        self.kfac.step()
        if self.engine is not None:
            self.engine.complete()
        self.optimizer.step()
        return loss


def settings(placement: str, name: str) -> dict[str, Any]:
    iteration = {"iteration": "polar_express", "iterations": 8, "head": name == "conv"}
    config = options(iteration, distribution={"placement": placement})
    return {**config, "curvature": {**config["curvature"], "factor_dtype": "float64"}}


def train(name: str, placement: str, weights: tuple[int, ...] = ()) -> tuple[dict[str, Tensor], list[str]]:
    run = OrthogonalRun(name, settings(placement, name), weights)
    found = run.train(8)
    covered = [block.name for block in run.kfac.coverage.blocks]
    run.close()
    return found, covered


COVERED = {"conv": ["stem", "grouped", "head"], "token": ["hidden"], "mlp": ["0", "2"]}


@pytest.mark.parametrize("name", COVERED)
def test_ranks_and_engines_leave_it_alone(name: str) -> None:
    [(wanted, covered)] = run_ranks(1, train, name, "auto")
    assert covered == COVERED[name]
    cases: list[tuple[int, tuple[Any, ...]]] = [(2, ("replicated",)), (3, ("owner",)), (2, ("auto", (3, 1)))]
    for size, case in cases:
        for found, _ in run_ranks(size, train, name, *case):
            assert relative(found, wanted) < TOLERANCE, (size, case)


def momentum_bytes() -> list[tuple[int, int]]:
    """What the plan counts beyond natural steps, and what is kept."""
    run = OrthogonalRun("conv", settings("owner", "conv"))
    monitor, config = run.kfac.monitor, run.kfac.solver_access.config
    natural = config.model_copy(update={"update": UpdateConfig()})
    counted, without = (rank_bytes(monitor.plan, one, sharded=False) for one in (config, natural))
    held = run.kfac.sharded_state_dict()["transforms"]
    kept = sum(value.numel() * value.itemsize for own in held.values() for value in own.values())
    run.close()
    return [(counted[run.rank].gradients - without[run.rank].gradients, kept)]


def test_the_plan_counts_the_momentum() -> None:
    """A rank keeps that of its own layers."""
    ranks = run_ranks(2, momentum_bytes)
    assert all(counted == kept for [(counted, kept)] in ranks)
    assert sum(kept for [(_, kept)] in ranks) == 8 * (6 * 18 + 4 * 27 + 4 * 16)


def resumed(
    state: dict[str, Any] | None, steps: range, parameters: dict[str, Any], weights: tuple[int, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    run = OrthogonalRun("token", settings("auto", "token"), weights)
    if state is not None:
        run.kfac.load_state_dict(state)
        run.model.load_state_dict(parameters)
    for step in steps:
        run.step(step)
    found = run.kfac.state_dict(), run.model.state_dict()
    run.close()
    return found


def test_a_run_goes_on_bit_for_bit() -> None:
    """And on one rank, without slices, up to rounding."""
    whole, *_ = run_ranks(2, resumed, None, range(8), {}, (3, 1))
    half, *_ = run_ranks(2, resumed, None, range(5), {}, (3, 1))
    again, *_ = run_ranks(2, resumed, half[0], range(5, 8), half[1], (3, 1))
    assert {"means", "squares", "steps"} == set(half[0]["first_order"])
    assert "embedding.weight" in half[0]["first_order"]["means"]
    for name, value in whole[1].items():
        assert torch.equal(again[1][name], value), name
    [alone] = run_ranks(1, resumed, half[0], range(5, 8), half[1], ())
    assert relative(alone[1], whole[1]) < TOLERANCE


def test_a_skipped_step_leaves_no_trace() -> None:
    model = network()
    kfac = KFAC(model, options(MUON), optimizer=torch.optim.SGD(model.parameters(), lr=LR))
    for step, broken in ((0, False), (1, True)):
        before = kfac.state_dict()
        model.zero_grad()
        inputs, labels = batch(step)
        cross_entropy(model(inputs), labels).backward()
        if broken:
            model[3].bias.grad[2] = math.nan
        kfac.step()
        after = kfac.state_dict()
        for name, value in before["first_order"]["means"].items():
            assert torch.equal(after["first_order"]["means"][name], value) == broken
        assert int(after["first_order"]["steps"]) == 1
        for block, own in before["transforms"].items():
            for key, value in own.items():
                assert torch.equal(after["transforms"][block][key], value) == broken
    kfac.remove()


class ScaledEngine(DDPEngine):
    """Gradients that carry a loss scale, as an engine's do in float16."""

    gradient_scale = 1.0


@pytest.mark.parametrize("iteration", ["muon", "none"])
def test_a_loss_scale_that_changes_leaves_it_alone(iteration: str) -> None:
    found = []
    for scales in ((1.0, 1.0, 1.0), (256.0, 64.0, 128.0)):
        model = network().double()
        engine = ScaledEngine(model)
        orthogonal = {"iteration": iteration, "weight_decay": 0.1}
        curvature = {"factor_every": 2, "likelihood": "categorical", "factor_dtype": "float64"}
        kfac = KFAC(engine, options(orthogonal, curvature=curvature), optimizer=torch.optim.SGD(model.parameters(), LR))
        for step, scale in enumerate(scales):
            model.zero_grad()
            inputs, labels = batch(step)
            cross_entropy(model(inputs), labels).backward()
            engine.gradient_scale = scale
            torch._foreach_mul_([p.grad for p in model.parameters()], scale)
            kfac.step()
        found.append([p.grad / scales[-1] for p in model.parameters()])
        kfac.remove()
    for wanted, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, wanted, rtol=1e-9, atol=1e-12)


def test_the_layers_that_take_it() -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    kfac = KFAC(model, options({"exclude": ["4"], "head": True}), optimizer=sgd)
    assert [block.name for block in kfac.coverage.blocks] == ["1", "6", "8"]
    assert kfac.coverage.uncovered["4.weight"] == "matched by '4' of kfac.update.orthogonal.exclude"
    assert kfac.coverage.uncovered["0.weight"] == "no weight matrix"
    assert {"1.bias", "3.weight", "3.bias"} <= set(kfac.coverage.uncovered)
    kfac.remove()
    attention = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 3))
    sgd = torch.optim.SGD(attention.parameters(), lr=LR)
    kfac = KFAC(attention, options(), optimizer=sgd)
    names = ["0.in_proj.q", "0.in_proj.k", "0.in_proj.v", "0.out_proj"]
    assert [block.name for block in kfac.coverage.blocks] == names
    assert set(kfac.coverage.uncovered) == {"0.in_proj_bias", "0.out_proj.bias", "1.weight", "1.bias"}
    kfac.remove()
    kfac = KFAC(attention, options({"exclude": ["*.q"]}), optimizer=sgd)
    assert [block.name for block in kfac.coverage.blocks] == ["0.out_proj"]
    assert kfac.coverage.uncovered["0.in_proj_weight"] == "matched by '*.q' of kfac.update.orthogonal.exclude"
    kfac.remove()


class Tied(nn.Module):
    """A head with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.hidden = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(self.embedding(tokens)))


def test_a_tied_head_is_none_of_the_last_layers() -> None:
    model = Tied()
    kfac = KFAC(model, options(), optimizer=torch.optim.SGD(model.parameters(), lr=LR))
    assert [block.name for block in kfac.coverage.blocks] == ["hidden"]
    kfac.remove()


def refused(update: dict[str, Any], **sections: Any) -> str:
    model = network()
    with pytest.raises(ConfigError) as error:
        KFAC(model, {"update": update, **sections}, optimizer=torch.optim.SGD(model.parameters(), lr=LR))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_go_together_is_refused() -> None:
    direction = {"direction": "orthogonal"}
    assert "orthogonal has no effect while direction is natural" in refused({"orthogonal": {}})
    assert "first_order has no effect while direction is natural" in refused({"first_order": {}})
    assert "kl_clip (0.1) sets the length of natural steps" in refused({**direction, "kl_clip": 0.1})
    assert "graft (sign) sets the length of natural steps" in refused({**direction, "graft": "sign"})
    assert "inversion.solver (cholesky) must be eigen" in refused(direction, inversion={"solver": "cholesky"})
    assert "solver (cg) must be direct" in refused(direction, solver="cg")
    assert "uncovered (diagonal) must be plain" in refused(direction, curvature={"uncovered": "diagonal"})
    assert "orthogonal.power_g (0.5) whitens" in refused(direction, curvature={"fisher": "input_only"})
    model = network()
    for optimizer in (
        torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9),
        torch.optim.AdamW(model.parameters(), lr=LR),
    ):
        with pytest.raises(
            ConfigError, match=r"orthogonal has its own momentum, and the optimizer has (momentum|betas)"
        ):
            KFAC(model, options(), optimizer=optimizer)
    natural = KFAC(model, {"update": {"kl_clip": None}})
    state = natural.state_dict()
    natural.remove()
    kfac = KFAC(model, options(), optimizer=torch.optim.SGD(model.parameters(), lr=LR))
    with pytest.raises(CheckpointError):
        kfac.load_state_dict(state)
    kfac.remove()
