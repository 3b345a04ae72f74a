"""The models whose steps are timed, with random data of their shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.tasks.models.autoencoder import autoencoder
from kfac_dist.tasks.models.byte_gpt import byte_gpt
from kfac_dist.tasks.models.resnet import resnet20


@dataclass(frozen=True)
class Workload:
    """A model, one batch of its data, and its loss."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    loss_terms: str = "sample"


def reconstruction(outputs: Tensor, inputs: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, inputs, reduction="sum") / len(inputs)


def first_class(outputs: Tensor, inputs: Tensor) -> Tensor:
    labels = torch.arange(len(outputs)) % outputs.shape[-1]
    return F.cross_entropy(outputs, labels)


def next_token(outputs: Tensor, inputs: Tensor) -> Tensor:
    return F.cross_entropy(outputs[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())


def deep_autoencoder() -> nn.Module:
    return autoencoder(dims=[784, 1000, 500, 250, 30])


def gpt() -> nn.Module:
    return byte_gpt(layers=6, width=384, heads=6, context=128)


WORKLOADS = {
    "autoencoder-b256": Workload(deep_autoencoder, lambda: torch.rand(256, 784), reconstruction),
    "autoencoder-b1000": Workload(deep_autoencoder, lambda: torch.rand(1000, 784), reconstruction),
    "resnet20-b128": Workload(resnet20, lambda: torch.randn(128, 3, 32, 32), first_class),
    "gpt-6x384-8x128": Workload(gpt, lambda: torch.randint(0, 256, (8, 128)), next_token, "token"),
}
