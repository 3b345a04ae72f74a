"""The package computes what the reference does, which one process can read beside the papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_dist import KFAC
from kfac_dist.reference import ReferenceKFAC, damped_inverses
from tests.harness import run_ranks

STEPS = 12
CLASSES = 4
LR = 0.2


class MLP(nn.Module):
    """Linear layers with and without a bias, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 7)
        self.twice = nn.Linear(7, 7)
        self.last = nn.Linear(7, CLASSES, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(hidden)))))


class ConvNet(nn.Module):
    """Strides, paddings, a dilation, a bias or none; the norm's gradients stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 3, padding=(1, 2))
        self.norm = nn.BatchNorm2d(5)
        self.stride = nn.Conv2d(5, 4, (3, 2), stride=(2, 1), bias=False)
        self.dilated = nn.Conv2d(4, 4, 2, padding=1, dilation=2)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.stride(torch.tanh(self.norm(self.stem(inputs)))))
        return self.head(torch.tanh(self.dilated(hidden)).mean((2, 3)))


def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, CLASSES))


# Name → the model, the shape of one of its inputs, and the options of the reference.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "mlp": (MLP, (8,), {}),
    "clipped": (MLP, (8,), {"kl_clip": 1e-3, "lr": LR}),
    "conv": (ConvNet, (2, 6, 5), {"damping": 0.1}),
    "conv reduce": (ConvNet, (2, 6, 5), {"damping": 0.1, "sharing": "reduce", "kl_clip": 1e-3, "lr": LR}),
    "tokens": (tokens, (3, 6), {}),
    "tokens reduce": (tokens, (3, 6), {"sharing": "reduce"}),
}
OPTIONS = {"damping": 0.03, "decay": 0.8, "factor_every": 2, "inverse_every": 4}


def configuration(options: dict[str, Any]) -> dict[str, Any]:
    """The package's words for the reference's options; no norm gets a block."""
    return {
        "curvature": {
            "decay": options["decay"],
            "factor_every": options["factor_every"],
            "sharing": options.get("sharing", "expand"),
            "loss_terms": "token" if options["per_token"] else "sample",
            "exclude": ["norm"],
        },
        "inversion": {"damping": options["damping"], "inverse_every": options["inverse_every"], "early_refresh": 0},
        "update": {"kl_clip": options.get("kl_clip")},
    }


def batch(shape: tuple[int, ...], step: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels; batches differ in size, so that averages have to weigh them."""
    generator = torch.Generator().manual_seed(step)
    samples = 12 if step % 3 else 8
    inputs = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    labels_shape = (samples, shape[0]) if len(shape) == 2 else (samples,)
    return inputs, torch.randint(0, CLASSES, labels_shape, generator=generator)


def mean_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def errors(case: str) -> list[float]:
    """Largest relative difference of the preconditioned gradients, by step; the reference sees the whole batch."""
    build, shape, own = CASES[case]
    options = {**OPTIONS, **own}
    torch.manual_seed(3)
    whole = build().double()
    whole.eval()  # in training a norm's means are those of a rank's own samples
    torch.manual_seed(3)
    ours: nn.Module = build().double().eval()
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    wrapped = DistributedDataParallel(ours) if size > 1 else ours
    optimizers = [torch.optim.SGD(model.parameters(), LR) for model in (whole, ours)]
    reference = ReferenceKFAC(whole, **options)
    kfac = KFAC(wrapped, configuration({**options, "per_token": len(shape) == 2}), optimizer=optimizers[1])
    found = []
    for step in range(STEPS):
        inputs, labels = batch(shape, step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        mean_loss(whole(inputs), labels).backward()
        reference.step(terms=labels.numel())
        mean_loss(wrapped(inputs.tensor_split(size)[rank]), labels.tensor_split(size)[rank]).backward()
        kfac.step()
        found.append(
            max(
                float((p.grad - q.grad).abs().max() / q.grad.abs().max())
                for p, q in zip(ours.parameters(), whole.parameters(), strict=True)
            )
        )
        for optimizer in optimizers:
            optimizer.step()
    assert (kfac.metrics()["kl_scale"] < 1) == ("kl_clip" in own)
    kfac.remove()
    return found


def all_errors() -> dict[str, list[float]]:
    return {case: errors(case) for case in CASES}


@pytest.mark.parametrize("size", [1, 2])
def test_package_is_held_to_the_reference(size: int) -> None:
    for found in run_ranks(size, all_errors):
        assert {case: len(steps) for case, steps in found.items()} == dict.fromkeys(CASES, STEPS)
        assert {case: max(steps) for case, steps in found.items() if max(steps) > 1e-9} == {}


def test_reference_shares_the_damping_out() -> None:
    a, g = torch.diag(torch.tensor([4.0, 12.0])), torch.tensor([[2.0]])  # π = √(8 / 2) = 2
    inverse_a, inverse_g = damped_inverses(a, g, 0.25)
    torch.testing.assert_close(inverse_a, torch.diag(torch.tensor([1 / 5, 1 / 13])))
    torch.testing.assert_close(inverse_g, torch.tensor([[1 / 2.25]]))


@pytest.mark.parametrize("empty", ["a", "g"])
def test_reference_shares_nothing_where_a_trace_is_zero(empty: str) -> None:
    factors = {"a": torch.eye(2), "g": torch.eye(3), empty: torch.zeros(2, 2)}
    inverses = dict(zip("ag", damped_inverses(factors["a"], factors["g"], 0.25), strict=True))
    torch.testing.assert_close(inverses[empty], 2 * torch.eye(2))


@pytest.mark.parametrize("options", [{"groups": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "circular"}])
def test_reference_refuses_other_convolutions(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one group and a number of zeros as padding"):
        ReferenceKFAC(nn.Sequential(nn.Conv2d(4, 4, 3, **options)))
