"""The diagonal Fisher of what no block covers: the formula, step by step, and that it takes part in everything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_dist import KFAC
from kfac_dist.engines.base import BackwardPass
from kfac_dist.engines.ddp import DDPEngine
from kfac_dist.errors import CheckpointError
from tests.harness import run_ranks

BATCH, DECAY, DAMPING, LR = 6, 0.8, 0.05, 0.1


class Scaled(nn.Module):
    """Two learned vectors, one of which no forward pass may use, a frozen one, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.unused = nn.Parameter(torch.rand(2, 4)), nn.Parameter(torch.rand(3))
        self.frozen = nn.Parameter(torch.rand(4), requires_grad=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x * self.scale.prod(0) + self.frozen))


def attach(
    model: nn.Module | DDPEngine, *, uncovered: str = "diagonal", kl_clip: float | None = None, **curvature: Any
) -> KFAC:
    config = {
        "curvature": {"factor_every": 2, "decay": DECAY, "uncovered": uncovered, **curvature},
        "inversion": {"inverse_every": 2, "damping": DAMPING, "early_refresh": 0},
        "update": {"kl_clip": kl_clip},
    }
    module = model.module if isinstance(model, DDPEngine) else model
    return KFAC(model, config, optimizer=torch.optim.SGD(module.parameters(), lr=LR))


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x, labels = torch.randn(BATCH, 4, generator=generator), torch.randint(3, (BATCH,), generator=generator)
    model.zero_grad()
    F.cross_entropy(model(x), labels).backward()


def test_the_formula() -> None:
    kfac = attach(model := Scaled())
    total, weight = torch.zeros(2, 4), 0.0
    for step in range(5):
        backward(model, step)
        gradient, pointer = model.scale.grad.clone(), model.scale.grad.data_ptr()
        if step % 2 == 0:
            total = DECAY * total + (1 - DECAY) * BATCH * gradient**2
            weight = DECAY * weight + (1 - DECAY)
        kfac.step()
        torch.testing.assert_close(model.scale.grad, gradient / (total / weight + DAMPING))
        assert model.scale.grad.data_ptr() == pointer
        assert model.unused.grad is None
    kfac.remove()


def test_plain_leaves_them_alone() -> None:
    kfac = attach(model := Scaled(), uncovered="plain")
    backward(model, 0)
    gradient = model.scale.grad.clone()
    kfac.step()
    assert torch.equal(model.scale.grad, gradient)
    kfac.remove()


def test_it_takes_part_in_the_trust_region() -> None:
    free, clipped = Scaled(), Scaled()
    kfacs = [attach(free), attach(clipped, kl_clip=1e-4)]
    for model, kfac in zip((free, clipped), kfacs, strict=True):
        backward(model, 0)
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        kfac.step()
        kfac.remove()
    after = {name: p.grad for name, p in free.named_parameters() if p.grad is not None}
    product = sum(float((after[name] * before[name]).sum()) for name in before)
    scale = (1e-4 / (LR**2 * product)) ** 0.5
    assert scale < 1
    for name, p in clipped.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, scale * after[name], rtol=1e-4, atol=1e-7)


def test_accumulation_counts_the_whole_window() -> None:
    """The same as one batch: n is what the summed gradient was divided by."""
    whole, parts = Scaled(), Scaled()
    kfacs = [attach(whole), attach(parts)]
    backward(whole, 0)
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(BATCH, 4, generator=generator), torch.randint(3, (BATCH,), generator=generator)
    for first, last in ((0, 2), (2, 6)):
        kfacs[1].micro_batch(first_sample=first, divisor=BATCH, terms=last - first, last=last == BATCH)
        (F.cross_entropy(parts(x[first:last]), labels[first:last], reduction="sum") / BATCH).backward()
    for kfac in kfacs:
        kfac.step()
        kfac.remove()
    torch.testing.assert_close(parts.scale.grad, whole.scale.grad)


class Halving(DDPEngine):
    """Divides the loss of each of two micro-batches by two, as DeepSpeed does."""

    def backward_pass(self) -> BackwardPass:
        return BackwardPass(scale=0.5, last=False)


@pytest.mark.parametrize("described", [False, True])
def test_micro_batches_by_which_the_engine_divides_are_counted(described: bool) -> None:
    whole, parts = Scaled(), Scaled()
    kfacs = [attach(whole), attach(Halving(parts))]
    backward(whole, 0)
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(BATCH, 4, generator=generator), torch.randint(3, (BATCH,), generator=generator)
    for part in (slice(0, 3), slice(3, 6)):
        if described:
            kfacs[1].micro_batch(first_sample=part.start, divisor=3, terms=3, last=part.stop == BATCH)
        (F.cross_entropy(parts(x[part]), labels[part]) / 2).backward()
    for kfac in kfacs:
        kfac.step()
        kfac.remove()
    torch.testing.assert_close(parts.scale.grad, whole.scale.grad)
    torch.testing.assert_close(parts.head.weight.grad, whole.head.weight.grad)


def test_tokens_are_counted_by_the_layer_nearest_to_the_loss() -> None:
    class Tokens(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, None].expand(-1, 5, -1)) * torch.arange(1, 6)[:, None]

    kfac = attach(model := Tokens(), loss_terms="token")
    x = torch.randn(BATCH, 4)
    outputs = model(x)
    F.cross_entropy(outputs.flatten(0, 1), torch.zeros(BATCH * 5, dtype=torch.long)).backward()
    gradient = model.scale.grad.clone()
    kfac.step()
    torch.testing.assert_close(model.scale.grad, gradient / (BATCH * 5 * gradient**2 + DAMPING))
    kfac.remove()


def test_a_step_that_is_not_taken_leaves_it_as_it_was() -> None:
    kfac = attach(model := Scaled())
    for step in range(2):
        backward(model, step)
        kfac.step()
    before = {name: value.clone() for name, value in kfac.state_dict()["diagonal"]["sums"].items()}
    backward(model, 2)
    model.scale.grad[0, 0] = float("inf")
    kfac.step()
    after = kfac.state_dict()["diagonal"]
    assert all(torch.equal(after["sums"][name], value) for name, value in before.items())
    assert float(after["weight"]) == pytest.approx(1 - DECAY)
    kfac.remove()


def test_checkpoints_hold_it() -> None:
    models = [Scaled(), Scaled()]
    kfacs = [attach(model) for model in models]
    for step in range(3):
        backward(models[0], step)
        kfacs[0].step()
    kfacs[1].load_state_dict(kfacs[0].state_dict())
    for step in range(3, 6):
        for model, kfac in zip(models, kfacs, strict=True):
            backward(model, step)
            kfac.step()
        assert torch.equal(models[0].scale.grad, models[1].scale.grad)
    plain = attach(Scaled(), uncovered="plain")
    with pytest.raises(CheckpointError, match=r"no diagonal Fisher of shape \[2, 4\] for 'scale'.*uncovered: plain"):
        kfacs[1].load_state_dict(plain.state_dict())
    plain.load_state_dict(kfacs[0].state_dict())
    for kfac in (*kfacs, plain):
        kfac.remove()


def of_two_ranks() -> dict[str, Any]:
    model = Scaled()
    kfac = KFAC(
        DistributedDataParallel(model, find_unused_parameters=True),
        {"curvature": {"uncovered": "diagonal"}, "distribution": {"placement": "owner"}, "update": {"kl_clip": None}},
    )
    state = kfac.state_dict()["diagonal"]
    kfac.remove()
    return state


def test_owners_of_whole_gradients_save_it() -> None:
    for state in run_ranks(2, of_two_ranks):
        assert state["sums"]["scale"].shape == (2, 4)
