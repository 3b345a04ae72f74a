"""Models and data that something is wrong with, for the tests of what training and doctor say about them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from kfac_dist.tasks import DataSplits

FEATURES, CLASSES, SAMPLES = 6, 4, 30


def samples(
    *,
    count: int = SAMPLES,
    test: int = 9,
    nan_at: int | None = None,
    bad_label: int | None = None,
    features: int = FEATURES,
    dtype: str = "float32",
    constant: bool = False,
) -> DataSplits:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, features, generator=generator).to(getattr(torch, dtype))
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    if nan_at is not None:
        inputs[nan_at, 1] = torch.nan
    if bad_label is not None:
        labels[bad_label] = CLASSES + 3
    if constant:
        inputs.fill_(0.5)
    held_out = torch.randn(test, features, generator=generator).to(inputs.dtype)
    return DataSplits(TensorDataset(inputs, labels), TensorDataset(held_out, labels[:1].clamp(max=1).repeat(test)))


class BadItems(Dataset[Any]):
    """Items of unequal shapes, of the wrong number, or none at all from some index on."""

    def __init__(self, kind: str, start: int = 0) -> None:
        self.kind, self.start = kind, start

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        good = torch.ones(FEATURES), index % CLASSES
        if index < self.start or self.kind == "good":
            return good
        match self.kind:
            case "ragged":
                return torch.ones(FEATURES + index % 2), 0
            case "single":
                return torch.ones(FEATURES)
            case "label":
                return torch.ones(FEATURES), CLASSES
            case _:
                raise KeyError("no such image")


def items(kind: str, start: int = 0) -> DataSplits:
    return DataSplits(BadItems(kind, start), BadItems("good"))


def good() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def frozen() -> nn.Module:
    return good().requires_grad_(False)


class Scaled(nn.Module):
    """Nothing that any block covers."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(FEATURES, CLASSES))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.matrix


class Branches(nn.Module):
    """Runs the left layer, the right one, or both, by a rule."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule
        self.left, self.right, self.head = (nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES))

    def forward(self, inputs: Tensor) -> Tensor:
        match self.rule:
            case "left":
                hidden = self.left(inputs)
            case "rank":
                hidden = self.left(inputs) if rank() == 0 else self.right(inputs)
            case _:  # by the batch: the trial's two samples go both ways
                both = len(inputs) == 2
                hidden = self.left(inputs) + self.right(inputs) if both or rank() == 0 else self.left(inputs)
        return self.head(torch.tanh(hidden))


def shaped_by_rank() -> nn.Module:
    width = 8 + (rank() == 1)
    return nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, CLASSES))


def covered_by_rank() -> nn.Module:
    return Scaled() if rank() == 1 else good()


class NotATensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(inputs)}


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))
