"""The published shapes that a GPU is timed with, and small ones of the same kinds to try the program on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import ResNet50
from kfac_dist.tasks.models.bert import bert
from kfac_dist.tasks.models.byte_gpt import byte_gpt


@dataclass(frozen=True)
class GPUWorkload:
    """A model, one batch of random data of its shape, its loss, and its first-order optimizer.

    Attributes:
        shape: Shape of the problem, in words.
        build: The model, on the CPU.
        inputs: One batch.
        loss: Mean loss of outputs and inputs.
        optimizer: The bare optimizer.
        curvature: Options of `kfac.curvature` besides intervals.
    """

    shape: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    curvature: dict[str, Any] = field(default_factory=dict)


def first_class(outputs: Tensor, inputs: Tensor) -> Tensor:
    labels = torch.arange(len(outputs), device=outputs.device) % outputs.shape[-1]
    return F.cross_entropy(outputs.float(), labels)


def next_token(outputs: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(outputs[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def same_token(outputs: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1).float(), tokens.flatten())


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-6)


def gpt2(layers: int, width: int, heads: int, context: int, vocabulary: int) -> nn.Module:
    """Return GPT-2 with its head's weight tied to its table of tokens, as published."""
    model = byte_gpt(layers, width, heads, context, vocabulary)
    model.head.weight = model.tokens.weight
    return model


# The tables' own factors would have as many rows as there are tokens.
_NO_TABLES = {"exclude": ["head", "tokens"], "loss_terms": "token"}

LARGE = {
    "resnet50": GPUWorkload(
        "ResNet-50, 64 images of 224×224",
        ResNet50,
        lambda: torch.randn(64, 3, 224, 224),
        first_class,
        sgd,
    ),
    "bert-large": GPUWorkload(
        "BERT-large, 16 sequences of 512 tokens",
        lambda: bert(24, 1024, 16, 512, 30522, tied=True),
        lambda: torch.randint(0, 30522, (16, 512)),
        same_token,
        adamw,
        _NO_TABLES,
    ),
    "gpt2-124m": GPUWorkload(
        "GPT-2 124M, 16 sequences of 1024 tokens",
        lambda: gpt2(12, 768, 12, 1024, 50257),
        lambda: torch.randint(0, 50257, (16, 1024)),
        next_token,
        adamw,
        _NO_TABLES,
    ),
}

SMALL = {
    "resnet50": GPUWorkload(
        "ResNet of 50 layers, an eighth as wide, 4 images of 64×64",
        lambda: ResNet50(classes=10, width=8),
        lambda: torch.randn(4, 3, 64, 64),
        first_class,
        sgd,
    ),
    "bert-large": GPUWorkload(
        "BERT of 2 layers, 64 wide, 4 sequences of 32 tokens",
        lambda: bert(2, 64, 4, 32, 256, tied=True),
        lambda: torch.randint(0, 256, (4, 32)),
        same_token,
        adamw,
        _NO_TABLES,
    ),
    "gpt2-124m": GPUWorkload(
        "GPT-2 of 2 layers, 64 wide, 4 sequences of 32 tokens",
        lambda: gpt2(2, 64, 4, 32, 256),
        lambda: torch.randint(0, 256, (4, 32)),
        next_token,
        adamw,
        _NO_TABLES,
    ),
}
