"""Modules that derive from a covered type and have a `forward` of their own: do they compute what the block believes?

A masked or rescaled weight, an input that is normalised inside, token numbers that are shifted: nothing in a class's
name tells. So such a module's code is run once on random inputs, with random parameters of its own, and the gradient of
its parameters is compared with that of the block's rows, as the arbiter does later in training.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kfac_dist.compat.torch import parameters_of, with_parameters
from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.blocks.layer_calls import Use
from kfac_dist.curvature.blocks.projection import Signs

# Larger modules are left to the arbiter.
_MOST_VALUES = 2**24
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE = 0.05
_SAMPLES, _POSITIONS = 3, 2
_METHODS = ("forward", "_conv_forward")


def refusal(block: Block, base: type[nn.Module]) -> str | None:
    """Say why a block is wrong for one of its modules; None if it is right, or can't be told before training.

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
    ran = False
    devices = {parameter.device for parameter in block.parameters.values() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed devices that aren't restored
        trial = _twin(block, module)
        for inputs in _inputs(module, next(trial.parameters(recurse=False))):
            try:
                agrees = _agrees(block, trial, inputs)
            except Exception:  # the user's code, which may need other inputs: the arbiter judges it in training
                continue
            if agrees:
                return False
            ran = True
    return ran


def _twin(block: Block, module: nn.Module) -> nn.Module:
    """Return a shallow copy with parameters and buffers that may be changed."""
    device = next((b.device for b in module.buffers(recurse=False) if not b.is_meta), None)

    def draw(parameter: Tensor) -> nn.Parameter:
        where = device or (torch.device("cpu") if parameter.is_meta else parameter.device)
        dtype = parameter.dtype if parameter.is_floating_point() else torch.get_default_dtype()
        return nn.Parameter(torch.randn(tuple(parameter.shape), dtype=dtype).to(where))

    drawn = {key: None if own is None else draw(own) for key, own in parameters_of(module).items()}
    return with_parameters(module, drawn, own_buffers=True)


def _inputs(module: nn.Module, like: Tensor) -> Iterator[Tensor]:
    """Yield inputs that a module of this type takes."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=like.dtype).to(like.device)

    match module:
        case nn.Embedding():
            yield torch.randint(0, module.num_embeddings, (_SAMPLES, _POSITIONS), device=like.device)
        case nn.Linear():
            yield draw(_SAMPLES, _POSITIONS, module.in_features)
            yield draw(_SAMPLES, module.in_features)
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            sizes = [d * (k - 1) + 3 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
            yield draw(_SAMPLES, module.in_channels, *sizes)
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            yield draw(_SAMPLES, module.in_channels, *(3 for _ in module.kernel_size))
        case nn.LayerNorm() | nn.RMSNorm():
            yield draw(_SAMPLES, _POSITIONS, *module.normalized_shape)
            if len(module.normalized_shape) == 1:
                yield draw(_SAMPLES, module.normalized_shape[0], 3, 3)
        case nn.GroupNorm():
            yield draw(_SAMPLES, module.num_channels, 3)
            yield draw(_SAMPLES, module.num_channels, 3, 3)
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d():
            for spatial in range(4):
                yield draw(_SAMPLES, module.num_features, *([3] * spatial))


def _agrees(block: Block, trial: nn.Module, inputs: Tensor) -> bool:
    output = type(trial).forward(trial, inputs)
    if not isinstance(output, Tensor):
        return False
    grad = torch.randn_like(output)
    own = {name: tensor for name, tensor in block.own_tensors(trial).items() if tensor.requires_grad}
    grads = torch.autograd.grad(output, list(own.values()), grad, allow_unused=True)
    with torch.no_grad():
        use = Use(trial, output.shape)
        use.keep(inputs)
        use.take(grad)
        signs = Signs(block.name, block.matrix_shape, inputs.device)
        rows, _ = block.project(use, len(inputs), signs)
        found = torch.zeros_like(rows)
        for name, gradient in zip(own, grads, strict=True):
            if gradient is not None:
                found += block.project_gradient(name, gradient, signs)
    tolerance = _TOLERANCE.get(grad.dtype, _COARSE)
    return bool((rows - found).norm() <= tolerance * torch.maximum(rows.norm(), found.norm()))


def _name(base: type[nn.Module]) -> str:
    return f"nn.{base.__name__}" if base.__module__.startswith("torch.nn.") else base.__name__
