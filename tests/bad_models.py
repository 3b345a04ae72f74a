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


class Keeps(nn.Module):
    """Keeps something of a pass for the next one.

    A `scale` in evaluation mode, as LeViT its biases, with its graph or `detached` from it; or a `state` always.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.what, self.kept = what, None

    def train(self, mode: bool = True) -> Keeps:
        self.kept = None
        return super().train(mode)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        if self.what == "state":
            hidden = hidden * self.scale if self.kept is None else hidden * self.scale + self.kept
            self.kept = hidden.mean(0, keepdim=True)
            return self.head(hidden)
        if self.training:
            return self.head(torch.tanh(hidden * self.scale.exp()))
        scale = self.scale.exp() if self.kept is None else self.kept
        self.kept = scale.detach() if self.what == "detached" else scale
        return self.head(torch.tanh(hidden * scale))


class TrainsAlone(nn.Module):
    """Reformer's backward pass wants training mode; between its layers something is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(8)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.drop(torch.tanh(self.first(inputs))))
        assert self.training or not torch.is_grad_enabled(), "call model.train() before you train it"
        return self.head(hidden)


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


class LeakyScale(nn.Module):
    """Multiplies the gradient that flows back by a factor that the loss knows nothing of."""

    def __init__(self, factor: str) -> None:
        super().__init__()
        self.factor = factor
        self.first, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(torch.tanh(self.first(inputs)))
        factor = len(inputs) if self.factor == "samples" else 1.5
        scale = torch.tensor(float(factor)) if len(inputs) > 2 else torch.ones(())
        return outputs.detach() + scale * (outputs - outputs.detach())


class Borrowed(nn.Module):
    """Uses a layer's weight a second time behind the layer's back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        return self.head(torch.tanh(hidden @ self.first.weight))


class Partly(nn.Module):
    """Layers with and without blocks, frozen ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(FEATURES))
        self.first = nn.Linear(FEATURES, 8)
        self.norm = nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.mixed = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.frozen(self.norm(torch.tanh(self.first(inputs * self.scale))))
        sequence, _ = self.mixed(hidden[:, None])
        logits: Tensor = self.head(sequence[:, -1])
        return logits


class Coupled(nn.Module):
    """Lets the samples of a batch see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        return self.head(hidden - hidden.mean(0))
