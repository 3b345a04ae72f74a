"""The deep autoencoder on which K-FAC was introduced (Hinton & Salakhutdinov 2006; Martens & Grosse 2015 §13)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "relu": nn.ReLU, "gelu": nn.GELU}

SPARSE_FAN_IN = 15


def autoencoder(
    dims: Sequence[int],
    activation: Literal["tanh", "sigmoid", "relu", "gelu"] = "tanh",
    initialization: Literal["glorot", "sparse"] = "glorot",
    initial_scale: float = 1.0,
) -> nn.Sequential:
    """Build an encoder with the given widths and its mirror image as decoder; the code and the output are linear.

    Maps `[batch, dims[0]]` to logits of the same shape.

    Args:
        dims: Widths from the input to the code, such as `[64, 100, 50, 25, 8]`.
        activation: Non-linearity of the hidden layers.
        initialization: `glorot` keeps the variance of activations and gradients; `sparse` gives every unit 15 incoming
            unit-normal weights (Martens 2010), as the experiments of Martens & Grosse did.
        initial_scale: Factor of the initial weights: a start that is bad on purpose.

    Raises:
        ValueError: Fewer than two widths, a scale that isn't positive, or a name that isn't one of those above.
    """
    if len(dims) < 2 or min(dims) < 1:
        raise ValueError(f"dims needs at least an input and a code width, all positive; found {list(dims)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if initialization not in ("glorot", "sparse"):
        raise ValueError(f"initialization {initialization!r} is not one of glorot, sparse")
    if not initial_scale > 0:
        raise ValueError(f"initial_scale is {initial_scale}, expected a number > 0")
    widths = [*dims, *reversed(dims[:-1])]
    code, output = len(dims) - 2, len(widths) - 2
    layers = nn.Sequential()
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        linear = nn.Linear(inputs, outputs)
        if initialization == "sparse":
            _sparse(linear.weight)
        else:
            nn.init.xavier_uniform_(linear.weight)
        with torch.no_grad():
            linear.weight.mul_(initial_scale)
        nn.init.zeros_(linear.bias)
        layers.add_module(f"linear{index + 1}", linear)
        if index not in (code, output):
            layers.add_module(f"{activation}{index + 1}", ACTIVATIONS[activation]())
    return layers


@torch.no_grad()
def _sparse(weight: torch.Tensor) -> None:
    fan_in = weight.shape[1]
    kept = min(SPARSE_FAN_IN, fan_in)
    columns = torch.rand_like(weight).topk(kept, dim=1).indices
    weight.zero_().scatter_(1, columns, torch.randn(weight.shape[0], kept))
