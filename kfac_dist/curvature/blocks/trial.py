"""Modules that derive from a covered type and have a `forward` of their own: do they compute what the block believes?

A masked or rescaled weight, an input that is normalised inside, token numbers that are shifted: nothing in a class's
name tells. So such a module's code is run once on random inputs, with random parameters of its own, and the gradient of
its parameters is compared with that of the block's rows, as the arbiter does later in training. A norm that turns its
input's dimensions first is right, if there is one in which its units lie; its block remembers which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from kfac_dist.compat.torch import parameters_of, with_parameters
from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.blocks.layer_calls import LayerCall
from kfac_dist.curvature.blocks.layers.norm import NormBlock
from kfac_dist.curvature.blocks.projection import Signs
from kfac_dist.errors import ModelError

# Larger modules are left to the arbiter.
_MOST_VALUES = 2**24
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE = 0.05
_SAMPLES, _POSITIONS = 3, 2
_METHODS = ("forward", "_conv_forward")


def refusal(block: Block, base: type[nn.Module]) -> str | None:
    """Return why a block is wrong for one of its modules; None if it is right, or unknown before training.

    Args:
        block: The block.
        base: The covered type from which its modules derive.
    """
    for module in block.modules:
        kind = type(module)
        if not isinstance(module, base) or all(getattr(kind, m, None) is getattr(base, m, None) for m in _METHODS):
            continue
        if sum(p.numel() for p in block.parameters.values()) <= _MOST_VALUES and _differs(block, module):
            return f"{kind.__name__}.forward computes something else than {_name(base)}"
    return None


def _differs(block: Block, module: nn.Module) -> bool:
    """Whether the module ran on some input of its type, and its gradient was never that of the block's rows."""
    ran, agreed = False, set[int]()
    devices = {parameter.device for parameter in block.parameters.values() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed devices that aren't restored
        trial = _twin(block, module)
        for inputs, dim in _inputs(module, next(trial.parameters(recurse=False))):
            if inputs.ndim in agreed or (agreed and not isinstance(block, NormBlock)):
                continue
            try:
                call, grads = _call(block, trial, inputs)
            except Exception:  # the user's code, which may need other inputs: the arbiter judges it in training
                continue
            ran = True
            if call is not None and _matches(block, call, grads, dim):
                agreed.add(inputs.ndim)
    return ran and not agreed


def _twin(block: Block, module: nn.Module) -> nn.Module:
    """Return a shallow copy with parameters and buffers that may be changed."""
    device = next((b.device for b in module.buffers(recurse=False) if not b.is_meta), None)

    def draw(parameter: Tensor) -> nn.Parameter:
        where = device or (torch.device("cpu") if parameter.is_meta else parameter.device)
        dtype = parameter.dtype if parameter.is_floating_point() else torch.get_default_dtype()
        return nn.Parameter(torch.randn(tuple(parameter.shape), dtype=dtype).to(where))

    drawn = {key: None if own is None else draw(own) for key, own in parameters_of(module).items()}
    return with_parameters(module, drawn, own_buffers=True)


def _inputs(module: nn.Module, like: Tensor) -> Iterator[tuple[Tensor, int | None]]:
    """Yield inputs that a module of this type may take, first as the type has them, then with dimensions turned.

    For a norm, each comes with the dimension of its units if that isn't the type's own; otherwise with None.
    """

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=like.dtype).to(like.device)

    def turned(units: int, dim: int, most: int = 5) -> Iterator[tuple[Tensor, int | None]]:
        """Yield inputs of 2 to `most` dimensions with the units in each place; no other size equals `units`."""
        other = _unlike(units)
        for dims in range(2, most + 1):
            places = [dims + dim if dim < 0 else dim, *range(1, dims)]
            for place in dict.fromkeys(places):
                shape = [_SAMPLES, *(other for _ in range(dims - 1))]
                shape[place] = units
                yield draw(*shape), None if place == places[0] else place

    match module:
        case nn.Embedding():
            yield torch.randint(0, module.num_embeddings, (_SAMPLES, _POSITIONS), device=like.device), None
        case nn.Linear():
            yield draw(_SAMPLES, _POSITIONS, module.in_features), None
            yield draw(_SAMPLES, module.in_features), None
            yield draw(_SAMPLES, module.in_features, _unlike(module.in_features)), None
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            sizes = [d * (k - 1) + 3 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
            yield draw(_SAMPLES, module.in_channels, *sizes), None
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            yield draw(_SAMPLES, module.in_channels, *(3 for _ in module.kernel_size)), None
        case nn.LayerNorm() | nn.RMSNorm() if len(module.normalized_shape) > 1:
            yield draw(_SAMPLES, _POSITIONS, *module.normalized_shape), None
        case nn.LayerNorm() | nn.RMSNorm():
            yield from turned(module.normalized_shape[0], -1)
        case nn.GroupNorm():
            # Channels last, torch 2.13's backward pass dies on CPUs where there are two spatial dimensions.
            yield from turned(module.num_channels, 1, most=3)
            side = _unlike(module.num_channels)
            yield draw(_SAMPLES, module.num_channels, side, side), None
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d():
            yield from turned(module.num_features, 1)


def _unlike(size: int) -> int:
    """Return a small size other than this one."""
    return 2 if size != 2 else 3


def _call(block: Block, trial: nn.Module, inputs: Tensor) -> tuple[LayerCall | None, dict[str, Tensor | None]]:
    """Run a module forward and back; returns the block's record of the call and its parameters' gradients."""
    output = type(trial).forward(trial, inputs)
    if not isinstance(output, Tensor):
        return None, {}
    grad = torch.randn_like(output)
    own = {name: tensor for name, tensor in block.own_tensors(trial).items() if tensor.requires_grad}
    grads = torch.autograd.grad(output, list(own.values()), grad, allow_unused=True)
    call = LayerCall(trial, output.shape)
    call.keep(inputs)
    call.take(grad)
    return call, dict(zip(own, grads, strict=True))


def _matches(block: Block, call: LayerCall, grads: Mapping[str, Tensor | None], dim: int | None) -> bool:
    """Whether the gradients are those of the block's rows; a norm's block remembers the dimension with which they are.

    Args:
        block: The block.
        call: A call of its module, with the gradient at the output.
        grads: Those of the block's trained parameters.
        dim: The units' dimension in the input; None where it is the type's own.
    """
    dims = call.inputs.ndim
    if isinstance(block, NormBlock) and dim is not None:
        block.unit_dims[dims] = dim
    found = _equal(block, call, grads)
    if isinstance(block, NormBlock) and dim is not None and not found:
        del block.unit_dims[dims]
    return found


@torch.no_grad()
def _equal(block: Block, call: LayerCall, grads: Mapping[str, Tensor | None]) -> bool:
    assert call.grad is not None
    signs = Signs(block.name, block.matrix_shape, call.inputs.device)
    try:
        rows, _ = block.project(call, len(call.inputs), signs)
    except (ModelError, RuntimeError, IndexError):  # other shapes than the block's
        return False
    found = torch.zeros_like(rows)
    for name, gradient in grads.items():
        if gradient is not None:
            found += block.project_gradient(name, gradient, signs)
    tolerance = _TOLERANCE.get(call.grad.dtype, _COARSE)
    return bool((rows - found).norm() <= tolerance * torch.maximum(rows.norm(), found.norm()))


def _name(base: type[nn.Module]) -> str:
    return f"nn.{base.__name__}" if base.__module__.startswith("torch.nn.") else base.__name__
