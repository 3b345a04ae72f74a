"""Small models, runs and options that the tests of extensions share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from kfac_dist import KFAC
from tests.training.runs import launched

RATE = 0.1
OPTIONS = {
    "curvature": {"likelihood": "categorical", "factor_dtype": "float64", "factor_every": 1},
    "inversion": {"inverse_every": 2, "damping": 0.05},
    "update": {"kl_clip": 0.01, "kl_clip_lr": RATE},
}
ONE_AND_TWO = pytest.mark.parametrize("ranks", [1, 2])


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's share of batches of 8."""
    generator = torch.Generator().manual_seed(1)
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return [
        (
            torch.randn(8, 5, generator=generator, dtype=torch.float64)[rank::size],
            torch.randint(0, 3, (8,), generator=generator)[rank::size],
        )
        for _ in range(count)
    ]


def linear_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def trained(model: nn.Module, options: dict[str, Any], steps: int = 5) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Parameters after some steps, and the factors by unit."""
    wrapped = DistributedDataParallel(model) if dist.is_initialized() and dist.get_world_size() > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    kfac = KFAC(wrapped, options)
    assert kfac.coverage.uncovered == {}
    for inputs, labels in batches(steps):
        cross_entropy(wrapped(inputs), labels).backward()
        kfac.step()
        optimizer.step()
        optimizer.zero_grad()
    units = kfac.state_dict()["units"]
    factors = {name.removesuffix("/0"): unit["sum"] for name, unit in units.items()}
    assert kfac.coverage.mismatched == {}
    kfac.remove()
    return [p.detach().clone() for p in model.parameters()], factors


class OwnLayer(nn.Module):
    """Has no block."""


RUN = """
extensions: [{extension}]
run: {{name: try}}
model: {model}
data: digits
loss: {{name: cross_entropy}}
optimizer: {{name: sgd, lr: 0.1}}
train: {{steps: 2, batch_size: 8}}
"""


def run_file(directory: Path, extension: str, model: str = "{name: mlp, args: {dims: [64, 10]}}") -> Path:
    path = directory / "run.yaml"
    path.write_text(RUN.format(extension=extension, model=model))
    return path


def as_launched() -> None:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))


def options_with(section: str, **values: Any) -> dict[str, Any]:
    return {**OPTIONS, section: {**OPTIONS.get(section, {}), **values}}
