"""A model's inputs: a tensor, a tuple of them (`model(*inputs)`) or a dict of them (`model(**inputs)`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

from torch import Tensor, nn

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


def is_inputs(value: object) -> TypeGuard[Inputs | list[Tensor]]:
    """Whether a value is something that a model can be called with."""
    match value:
        case Tensor():
            return True
        case list() | tuple():
            return bool(value) and all(isinstance(part, Tensor) for part in value)
        case dict():
            return bool(value) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
        case _:
            return False


def arguments(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return inputs as positional and keyword arguments of a call."""
    match inputs:
        case tuple():
            return inputs, {}
        case dict():
            return (), inputs
        case _:
            return (inputs,), {}


def call(model: nn.Module, inputs: Inputs) -> object:
    """Call a model with its inputs."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def each(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Return the inputs with a function applied to each of their tensors."""
    match inputs:
        case tuple():
            return tuple(function(tensor) for tensor in inputs)
        case dict():
            return {name: function(tensor) for name, tensor in inputs.items()}
        case _:
            return function(inputs)


def tensors(inputs: Inputs) -> dict[str, Tensor]:
    """Return the tensors with the names by which messages call them."""
    match inputs:
        case tuple():
            return {f"input {place}": tensor for place, tensor in enumerate(inputs)}
        case dict():
            return {f"input {name}": tensor for name, tensor in inputs.items()}
        case _:
            return {"input": inputs}
