"""First and second derivatives of a model's outputs along directions in its parameters, exactly.

    slope = d/ds h(θ + s v)|₀,    bend = d²/ds² h(θ + s v)|₀

both in one forward pass over the whole batch (forward mode inside forward mode), for many directions at once. That is
what the second derivative ∂²_iih of every output takes: along a coordinate, its bend.

Torch's nested forward mode silently returns wrong second derivatives of a few operations, of layer and batch
normalisation among them (pytorch#198017). Here those are written out, and `mismatch` compares what came out with an
integral, independently of which operations a model is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from kfac_dist.inputs import Inputs, arguments

Direction = Mapping[str, Tensor]
# Outputs, slopes, bends.
_Triple = tuple[Tensor, Tensor, Tensor]

# A step along a test direction, as a share of each parameter's own size.
STEP = 0.2
# Parameters that are all zero, such as biases at first, are moved as if their entries had this size.
SMALLEST = 0.05
# Of a smooth function more nodes soon make quadrature exact; a jump stays, however many there are.
NODES = (16, 64)
SETTLED = 1e-3
# Below this share of the first derivative, a change of it is rounding.
FLAT = 1e-4


@dataclass(frozen=True)
class Derivatives:
    """Outputs, and their derivatives along n directions.

    Attributes:
        outputs: `[B, ...]`.
        slopes: `[n, B, ...]`.
        bends: `[n, B, ...]`.
    """

    outputs: Tensor
    slopes: Tensor
    bends: Tensor


class OutputFunction:
    """A model's outputs for fixed inputs as a function of its parameters.

    Args:
        module: The bare model, in the mode in which it is to be looked at.
        inputs: The model's inputs, `[B, ...]`.
    """

    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        self.module = module
        self.inputs = inputs
        self.parameters = {name: p.detach() for name, p in module.named_parameters()}
        self._vectorised = True

    def along(self, direction: Direction, s: Tensor) -> Tensor:
        """Return `h(θ + s v)` with v zero in the parameters that `direction` doesn't name."""
        moved = {name: self.parameters[name] + s * v for name, v in direction.items()}
        outputs: Tensor = functional_call(self.module, {**self.parameters, **moved}, *arguments(self.inputs))
        return outputs

    def derivatives(self, name: str, indices: Tensor, *, chunk: int) -> Iterator[Derivatives]:
        """Yield slopes and bends along coordinates of one parameter.

        Args:
            name: The parameter.
            indices: `[n]`, into the flattened parameter.
            chunk: Coordinates at a time.

        Raises:
            RuntimeError: Torch can't differentiate the model in this way.
        """
        parameter = self.parameters[name]

        def one(index: Tensor) -> _Triple:
            unit = torch.zeros_like(parameter).flatten().scatter(0, index[None], 1.0).view_as(parameter)
            return self._bend({name: unit}, torch.zeros((), dtype=parameter.dtype, device=parameter.device))

        with written_out():
            for part in indices.split(chunk):
                yield Derivatives(*self._each(one, part))

    def slope(self, direction: Direction, at: float = 0.0) -> Tensor:
        """Return d/ds h(θ + s v) at s."""
        with written_out():
            s = next(iter(direction.values())).new_tensor(at)
            slope: Tensor = _jvp(lambda s: self.along(direction, s), s)[1]
        return slope

    def bend(self, direction: Direction, at: float = 0.0) -> Tensor:
        """Return d²/ds² h(θ + s v) at s."""
        with written_out():
            return self._bend(direction, next(iter(direction.values())).new_tensor(at))[2]

    def _bend(self, direction: Direction, s: Tensor) -> _Triple:
        (outputs, slope), (_, bend) = _jvp(lambda s: _jvp(lambda s: self.along(direction, s), s), s)
        return outputs, slope, bend

    def _each(self, function: Callable[[Tensor], _Triple], indices: Tensor) -> _Triple:
        """Apply a function to every index, all at once where the model's operations allow that."""
        if self._vectorised:
            try:
                outputs, slopes, bends = vmap(function, randomness="same")(indices)
                return outputs[0], slopes, bends
            except (RuntimeError, NotImplementedError):  # such as a recurrent layer's, which writes in place
                self._vectorised = False
        several = [function(index) for index in indices]
        return several[0][0], torch.stack([one[1] for one in several]), torch.stack([one[2] for one in several])


def _jvp(function: Callable[[Tensor], Any], s: Tensor) -> tuple[Any, Any]:
    """Return the value of a function of a number, and its derivative."""
    value, derivative = jvp(function, (s,), (torch.ones_like(s),))  # type: ignore[misc]  # typed as if it had more
    return value, derivative


def random_direction(parameters: Mapping[str, Tensor], size: float, seed: int = 0) -> dict[str, Tensor]:
    """Return a normally distributed direction, as long in each parameter as `size` times the parameter itself."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: size
        * max(float(p.square().mean().sqrt()), SMALLEST)
        * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        for name, p in parameters.items()
    }


def mismatch(outputs: OutputFunction, names: Sequence[str]) -> float:
    """Return the mismatch of the second derivative and the change of the first, along a random segment; 0 to 1.

    Of outputs that are twice differentiable, `h'(1) − h'(0) = ∫₀¹ h''(s) ds`. At a kink h' jumps and h'' says nothing
    of it: the share of the change that the integral misses doesn't depend on knowing the operation that kinks. A wrong
    second derivative shows, too.

    Args:
        outputs: The model.
        names: The parameters to move.
    """
    direction = random_direction({name: outputs.parameters[name] for name in names}, STEP)
    first = outputs.slope(direction)
    change = (outputs.slope(direction, 1.0) - first).double()
    missed = 0.0
    for count in NODES:
        nodes, weights = _gauss_legendre(count)
        terms = (w * outputs.bend(direction, node).double() for node, w in zip(nodes, weights, strict=True))
        integral = sum(terms, start=torch.zeros_like(change))
        size = max(float(change.norm()), float(integral.norm()))
        if size <= FLAT * float(first.norm()):
            return 0.0
        missed = min(float((change - integral).norm()) / size, 1.0)
        if missed <= SETTLED:
            break
    return missed


def curvedness(outputs: OutputFunction, names: Sequence[str]) -> float:
    """Return how far outputs are from affine in these parameters: ‖h(θ+v) − h(θ) − h'v‖ / ‖h'v‖ for a long random v.

    Zero up to rounding means affine: the second derivative is zero for any parameters and data.
    """
    direction = random_direction({name: outputs.parameters[name] for name in names}, 1.0)
    slope = outputs.slope(direction).double()
    at = next(iter(direction.values())).new_tensor
    with torch.no_grad():
        moved = outputs.along(direction, at(1.0)).double() - outputs.along(direction, at(0.0)).double()
    return float((moved - slope).norm()) / max(float(slope.norm()), 1e-30)


@lru_cache
def _gauss_legendre(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    nodes, weights = numpy.polynomial.legendre.leggauss(count)
    return tuple((nodes + 1) / 2), tuple(weights / 2)


@contextmanager
def written_out() -> Iterator[None]:
    """Compute with operations whose forward-mode derivatives are right, or there at all, to the second order."""
    # Fused attention and oneDNN's recurrent layers have no forward mode.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    [fused, *_] = torch.backends.mkldnn.set_flags(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _WrittenOut():
            yield
    finally:
        torch.backends.mkldnn.set_flags(fused)
        torch.backends.mha.set_fastpath_enabled(fast)


class _WrittenOut(TorchFunctionMode):
    """Replaces normalisations by the formula that they stand for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        replacement = _WRITTEN_OUT.get(func)
        return (replacement or func)(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    return _affine(_normalised(input, dims, eps), weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    shape = (1, -1, *(1,) * (input.ndim - 2))
    if training or running_mean is None or running_var is None:
        normal = _normalised(input, (0, *range(2, input.ndim)), eps)
    else:
        normal = (input - running_mean.view(shape)) / (running_var.view(shape) + eps).sqrt()
    return _affine(normal, weight, bias, shape)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    normal = _normalised(input, tuple(range(2, input.ndim)), eps)
    return _affine(normal, weight, bias, (1, -1, *(1,) * (input.ndim - 2)))


def _normalised(values: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = values - values.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


def _affine(values: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...] | None = None) -> Tensor:
    if weight is not None:
        values = values * (weight if shape is None else weight.view(shape))
    if bias is not None:
        values = values + (bias if shape is None else bias.view(shape))
    return values


_WRITTEN_OUT: dict[Any, Callable[..., Tensor]] = {
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    functional.batch_norm: _batch_norm,
    torch.batch_norm: _batch_norm,
    functional.instance_norm: _instance_norm,
    torch.instance_norm: _instance_norm,
}
