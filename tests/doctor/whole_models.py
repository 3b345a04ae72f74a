"""Models as people bring them, with data that fits, for the doctor to examine: what a user's own module would hold."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kfac_dist.tasks import DataSplits
from tests.preconditioner.models import IGNORED

SAMPLES, TEST = 12, 4


def tokens(*, vocabulary: int, length: int, classes: int, labels: str = "token") -> DataSplits:
    """Sequences with a label each, or with one a position, of which the first sample's last is ignored."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, vocabulary, (SAMPLES + TEST, length), generator=generator)
    shape = (SAMPLES + TEST, *([length] if labels == "token" else []))
    targets = torch.randint(0, classes, shape, generator=generator)
    if labels == "token":
        targets[0, -1] = IGNORED
    return _splits(words, targets)


def images(*, size: int, classes: int, labels: str = "sample") -> DataSplits:
    """Images of two channels with a label each, or with one a pixel."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(SAMPLES + TEST, 2, size, size, generator=generator)
    shape = (SAMPLES + TEST, *([size * size] if labels == "token" else []))
    return _splits(pixels, torch.randint(0, classes, shape, generator=generator))


def _splits(inputs: torch.Tensor, targets: torch.Tensor) -> DataSplits:
    return DataSplits(
        TensorDataset(inputs[:SAMPLES], targets[:SAMPLES]), TensorDataset(inputs[SAMPLES:], targets[SAMPLES:])
    )


class Gate(nn.Module):
    """A ReLU that no operation's name gives away."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x > 0)


class Masked(nn.Module):
    """An autoencoder of six values with a hidden kink."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.masked, self.last = nn.Linear(6, 8), Gate(), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.masked(self.first(x)))
        return outputs


class _Cube(torch.autograd.Function):
    """A function of which torch has a backward and no forward mode."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 3 * x**2 * gradient  # type: ignore[no-any-return]


class Opaque(Masked):
    """An autoencoder with such a function."""

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.last(_Cube.apply(self.first(x)))
        return outputs


class SharedNorms(nn.Module):
    """Token logits through a norm that two heads share, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.heads, self.head_norm = nn.Embedding(7, 6), nn.Linear(6, 6), nn.RMSNorm(3)
        self.norm, self.twice, self.head = nn.RMSNorm(6), nn.LayerNorm(6), nn.Linear(6, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.heads(self.norm(self.words(tokens)))
        hidden = self.twice(self.head_norm(hidden.unflatten(-1, (2, 3))).flatten(-2))
        outputs: Tensor = self.head(self.twice(torch.tanh(hidden)))
        return outputs


class Routed(nn.Module):
    """Scales divided by their own sizes: no gradient reaches `router`, but in floats its rounding does."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.first, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        with torch.no_grad():
            self.router.weight.mul_(1e-4)
            self.router.bias.fill_(1e-5)

    def forward(self, x: Tensor) -> Tensor:
        sizes = self.router(x)
        outputs: Tensor = self.last(torch.tanh(self.first(x)) * (sizes * sizes.square().rsqrt()))
        return outputs


class UsedByHand(nn.Module):
    """An embedding whose weight is also the head's, by hand, and a layer of which only the weight is used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle, self.spare = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.middle(self.embedding(tokens)).tanh()
        return F.linear(F.linear(hidden, self.spare.weight), self.embedding.weight)


class Certain(nn.Module):
    """Class probabilities of which one is 1 to the last digit of a double."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 8), nn.Linear(8, 5)
        with torch.no_grad():
            self.last.bias.copy_(torch.arange(5) * 60.0)

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.last(torch.tanh(self.first(images.mean((-1, -2)))))
        return outputs


class Conditioned(nn.Module):
    """Token logits of which one row, the same for every sequence and position, scales the hidden values."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.scale, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)
        self.register_buffer("condition", torch.linspace(-1, 1, 6)[None])

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] == 1:
            raise ValueError("a model of one fixed length")
        outputs: Tensor = self.head(self.words(tokens) * (1 + self.scale(self.condition)))
        return outputs


class _OfItsBatch(torch.autograd.Function):
    """The identity, with a gradient that is wrong for batches, as that of a kernel for some memory formats is."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * len(grad) ** 0.5


class OfItsBatch(nn.Module):
    """A model whose gradient depends on how many samples come together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 8), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.last(torch.tanh(_OfItsBatch.apply(self.first(images.mean((-1, -2))))))
        return outputs
