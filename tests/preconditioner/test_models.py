"""Whatever a model is made of, any number of ranks trains it alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.preconditioner.models import CLASSES, Case, train
from tests.preconditioner.workloads import GLOBAL_BATCH, relative

TOLERANCE = 1e-5


def up_and_down() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6 * 6 * 6, CLASSES),
    )


CASES: dict[str, Case] = {
    "transposed convolution": Case(up_and_down, lambda g: torch.randn(GLOBAL_BATCH, 2, 6, 6, generator=g)),
}


def train_all(names: list[str]) -> dict[str, dict[str, Tensor]]:
    return {name: train(CASES[name]) for name in names}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return run_ranks(1, train_all, list(CASES), process_group=False, timeout=120)[0]


@pytest.mark.parametrize("size", [1, 3])
def test_ranks_leave_the_parameters_alone(size: int, alone: dict[str, dict[str, Tensor]]) -> None:
    wrong = {}
    for results in run_ranks(size, train_all, list(CASES), timeout=120):
        for name, parameters in results.items():
            error = relative(parameters, alone[name])
            if not error < TOLERANCE:
                wrong[name] = error
    assert not wrong
