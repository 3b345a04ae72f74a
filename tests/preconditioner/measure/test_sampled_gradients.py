"""The diagonal Fisher by labels drawn from the model: what it is, and that it takes part in everything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_dist import KFAC
from kfac_dist.config.schema import Likelihood
from kfac_dist.curvature.fisher import label_gradient
from kfac_dist.doctor.fisher.diagonal_fisher import moments
from kfac_dist.doctor.fisher.directional import OutputFunction
from kfac_dist.engines.ddp import DDPEngine
from kfac_dist.errors import ConfigError
from kfac_dist.preconditioner.measure.sampled_gradients import SampledLabelGradients
from tests.harness import run_ranks

BATCH, DECAY, DAMPING, LR, SEED = 6, 0.8, 0.05, 0.1, 7


class Scaled(nn.Module):
    """A learned vector in front of a linear layer, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.unused = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(torch.tanh(x * self.scale))
        return outputs


def attach(model: nn.Module | DDPEngine, **curvature: Any) -> KFAC:
    config = {
        "curvature": {
            "fisher": "mc",
            "likelihood": "categorical",
            "factor_every": 2,
            "decay": DECAY,
            "uncovered": "diagonal_mc",
            "seed": SEED,
            **curvature,
        },
        "inversion": {"inverse_every": 2, "damping": DAMPING, "early_refresh": 0},
        "update": {"kl_clip": None},
    }
    module = model.module if isinstance(model, DDPEngine) else model
    return KFAC(model, config, optimizer=torch.optim.SGD(module.parameters(), lr=LR))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 4, generator=generator), torch.randint(3, (BATCH,), generator=generator)


def take(model: nn.Module, kfac: KFAC, step: int, parts: list[slice] | None = None) -> None:
    x, labels = batch(step)
    model.zero_grad()
    for part in parts or [slice(0, BATCH)]:
        count = len(x[part])
        kfac.micro_batch(first_sample=part.start, divisor=BATCH, terms=count, last=part.stop == BATCH)
        outputs = model(x[part])
        kfac.fisher_backward(outputs)
        (F.cross_entropy(outputs, labels[part], reduction="sum") / BATCH).backward()


@pytest.mark.parametrize("fisher", ["mc", "type2"])
def test_the_formula(fisher: str) -> None:
    kfac = attach(model := Scaled(), fisher=fisher)
    total, weight = torch.zeros(4), 0.0
    for step in range(5):
        take(model, kfac, step)
        gradient = model.scale.grad.clone()
        if step % 2 == 0:
            outputs = model(batch(step)[0])
            sampled = label_gradient(Likelihood.CATEGORICAL, outputs, seed=SEED, step=step, first_sample=0)
            [mean] = torch.autograd.grad(outputs, model.scale, sampled / BATCH)
            total = DECAY * total + (1 - DECAY) * BATCH * mean**2
            weight = DECAY * weight + (1 - DECAY)
        kfac.step()
        torch.testing.assert_close(model.scale.grad, gradient / (total / weight + DAMPING))
        assert model.unused.grad is None
    kfac.remove()


def test_its_mean_is_the_fisher_and_its_variance_twice_the_square() -> None:
    model, x = Scaled(), batch(0)[0].repeat(5, 1)
    sampled, found = SampledLabelGradients(model, ["scale"], torch.device("cpu"), torch.float32), []
    outputs = model(x)
    for step in range(3000):
        sampled.reset()
        labels = label_gradient(Likelihood.CATEGORICAL, outputs, seed=SEED, step=step, first_sample=0)
        sampled.add(outputs, labels, float(len(x)))
        found.append(sampled.total[:-1].square() / sampled.total[-1])
    [along] = OutputFunction(model, x).derivatives("scale", torch.arange(4), chunk=4)
    exact = moments(Likelihood.CATEGORICAL, along).fisher.mean(1).float()
    values = torch.stack(found)
    torch.testing.assert_close(values.mean(0), exact, rtol=0.1, atol=0)
    torch.testing.assert_close(values.var(0), 2 * exact.square(), rtol=0.25, atol=0)


def test_micro_batches_and_resumed_runs_are_the_same() -> None:
    models = [Scaled() for _ in range(3)]
    kfacs = [attach(model) for model in models]
    for step in range(3):
        take(models[0], kfacs[0], step)
        take(models[1], kfacs[1], step, [slice(0, 2), slice(2, BATCH)])
        for kfac in kfacs[:2]:
            kfac.step()
        torch.testing.assert_close(models[0].scale.grad, models[1].scale.grad)
    kfacs[2].load_state_dict(kfacs[0].state_dict())
    for step in range(3, 6):
        for model, kfac in zip(models[::2], kfacs[::2], strict=True):
            take(model, kfac, step)
            kfac.step()
        assert torch.equal(models[0].scale.grad, models[2].scale.grad)
    for kfac in kfacs:
        kfac.remove()


def test_what_is_not_finite_never_enters() -> None:
    kfac = attach(model := Scaled(), factor_every=1)
    take(model, kfac, 0)
    kfac.step()
    before = kfac.state_dict()["diagonal"]["sums"]["scale"].clone()
    take(model, kfac, 1)
    assert kfac._parts.uncovered.sampled is not None
    kfac._parts.uncovered.sampled.total[0] = torch.inf  # overflowed, in a step that is taken
    kfac.step()
    assert torch.equal(kfac.state_dict()["diagonal"]["sums"]["scale"], before)
    kfac.remove()


class Sharded(DDPEngine):
    """Says that it holds slices."""

    sharded = True


def test_engines_without_whole_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="diagonal_mc sends drawn labels back to whole parameters, which Sharded"):
        attach(Sharded(Scaled()))


def _train_on_ranks() -> dict[str, Tensor]:
    model, rank, size = Scaled(), dist.get_rank(), dist.get_world_size()
    del model.unused
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    kfac = KFAC(wrapped, attach_config(), optimizer=optimizer)
    bounds = [round(BATCH * share / size) for share in range(size + 1)]
    mine = slice(bounds[rank], bounds[rank + 1])
    for step in range(8):
        x, labels = batch(step)
        kfac.micro_batch(first_sample=mine.start, divisor=BATCH / size, terms=len(x[mine]))
        outputs = wrapped(x[mine])
        kfac.fisher_backward(outputs)
        optimizer.zero_grad()
        (F.cross_entropy(outputs, labels[mine], reduction="sum") * size / BATCH).backward()
        kfac.step()
        optimizer.step()
    kfac.remove()
    return {name: value.clone() for name, value in model.state_dict().items()}


def attach_config() -> dict[str, Any]:
    curvature = {"fisher": "mc", "likelihood": "categorical", "factor_every": 2, "uncovered": "diagonal_mc"}
    return {"curvature": curvature, "inversion": {"inverse_every": 2, "damping": DAMPING}, "update": {"kl_clip": None}}


def test_one_and_three_ranks_are_equal() -> None:
    [alone] = run_ranks(1, _train_on_ranks)
    for several in run_ranks(3, _train_on_ranks):
        for name, value in alone.items():
            torch.testing.assert_close(several[name], value, rtol=1e-5, atol=1e-6)
