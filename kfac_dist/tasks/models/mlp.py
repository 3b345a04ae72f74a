"""A multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from kfac_dist.tasks.models.autoencoder import ACTIVATIONS


def mlp(dims: Sequence[int], activation: Literal["tanh", "sigmoid", "relu", "gelu"] = "tanh") -> nn.Sequential:
    """Build linear layers with a non-linearity between them; the outputs are linear.

    Maps `[batch, dims[0]]` to `[batch, dims[-1]]`. Weights begin as Glorot's, biases as zero.

    Args:
        dims: Widths from the input to the outputs, such as `[64, 64, 32, 10]`.
        activation: Non-linearity of the hidden layers.

    Raises:
        ValueError: Fewer than two widths, or a name that isn't one of those above.
    """
    if len(dims) < 2 or min(dims) < 1:
        raise ValueError(f"dims needs at least an input and an output width, all positive; found {list(dims)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    layers = nn.Sequential()
    for index, (inputs, outputs) in enumerate(pairwise(dims), 1):
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers.add_module(f"linear{index}", linear)
        if index < len(dims) - 1:
            layers.add_module(f"{activation}{index}", ACTIVATIONS[activation]())
    return layers
