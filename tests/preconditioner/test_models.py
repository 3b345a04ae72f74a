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


class Attends(nn.Module):
    """Self-attention inside an encoder layer, then attention to another width."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.memory = nn.Linear(6, 4)
        self.cross = nn.MultiheadAttention(6, 3, kdim=4, vdim=4, batch_first=True, add_bias_kv=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.encoder(self.embedding(tokens))
        memory = self.memory(hidden[:, :3])
        return self.head(hidden + self.cross(hidden, memory, memory, need_weights=False)[0])


class Language(nn.Module):
    """A table that is embedding and head, two layers with one weight, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CLASSES, 6, padding_idx=1)
        self.first, self.second, self.twice = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, CLASSES)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(self.table(tokens)))))
        return self.head(self.twice(torch.sin(self.twice(hidden))))


CASES: dict[str, Case] = {
    "transposed convolution": Case(up_and_down, lambda g: torch.randn(GLOBAL_BATCH, 2, 6, 6, generator=g)),
    "attention": Case(Attends, lambda g: torch.randint(0, 7, (GLOBAL_BATCH, 4), generator=g), tokens=4),
    "attention, reduce": Case(
        Attends,
        lambda g: torch.randint(0, 7, (GLOBAL_BATCH, 4), generator=g),
        tokens=4,
        curvature={"sharing": "reduce", "fisher": "mc"},
    ),
    "tied": Case(Language, lambda g: torch.randint(0, CLASSES, (GLOBAL_BATCH, 4), generator=g), tokens=4),
    "tied, sampled": Case(
        Language,
        lambda g: torch.randint(0, CLASSES, (GLOBAL_BATCH, 4), generator=g),
        tokens=4,
        curvature={"sample_fraction": 0.5, "fisher": "type2"},
    ),
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
