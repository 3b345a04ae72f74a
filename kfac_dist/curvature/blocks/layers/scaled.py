"""Modules of any class that scale their result element by element: recognised by their outputs.

    y = γ·f(x)   or   γ·f(x, gate),   with or without + β

Layer norms without a shift or with a weight a head (Cohere's), gated and grouped RMS norms (Mamba-2's), layer scales,
norms that don't normalise (MobileBERT's). For the Fisher they are a norm whose x̂ is f: what the module's own code
returns for γ = 1 and β = 0. Its code runs twice on measured steps.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from kfac_dist.compat.torch import break_graph
from kfac_dist.config.schema import Sharing
from kfac_dist.curvature.blocks.layer_calls import Handle, Recorder
from kfac_dist.curvature.blocks.layers.norm import NormBlock
from kfac_dist.curvature.blocks.rows import batch_first
from kfac_dist.errors import ModelError
from kfac_dist.hooks import after_forward

_ROWS = 3
_TOLERANCE = 1e-4
# Exceptions of other modules for rows that they don't expect.
_REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError)


class ScaledBlock(NormBlock):
    """F: one number for each element of γ, or a 2×2 matrix where there is a β."""

    def __init__(self, name: str, module: nn.Module, sharing: Sharing) -> None:
        super().__init__(name, module, sharing, parameters=_parameters(name, module))
        self._shape = next(iter(self.parameters.values())).shape

    def watch(self, recorder: Recorder) -> list[Handle]:
        """See `Block.watch`: a call's record holds f, not the input."""

        def ran(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if not recorder.watching:
                return None
            if torch.compiler.is_dynamo_compiling():
                break_graph("the layer is asked once more without its scale")
            with torch.no_grad():
                unscaled = type(module).forward(_with(module, torch.ones_like, torch.zeros_like), *args, **kwargs)
            return recorder.record(unscaled, output, source=module)

        return [after_forward(self.module, ran, with_kwargs=True, always_call=True)]

    def kept(self, inputs: Tensor) -> Tensor:
        """See `Block.kept`: f is K-FAC's own tensor."""
        return inputs

    def leading(self, output: Sequence[int]) -> int:
        """See `Block.leading`."""
        return max(len(output) - len(self._shape), 1)

    def normalized(self, inputs: Tensor) -> Tensor:
        """See `NormBlock.normalized`."""
        return inputs

    def positions(self, tensor: Tensor, batch_size: int | None) -> Tensor:
        """See `NormBlock.positions`."""
        dims = len(self._shape)
        if tensor.shape[-dims:] != self._shape:
            raise ModelError(
                f"layer {self.name} ({type(self.module).__name__}) returned {list(tensor.shape)}, which doesn't end in "
                f"the shape of its weight {list(self._shape)}: name it in kfac.curvature.exclude"
            )
        return batch_first(tensor, batch_size, feature_dims=dims).flatten(2)


def is_scaled(module: nn.Module) -> bool:
    """Whether a module has a γ of several values, perhaps a β, and nothing else, and returns γ·f + β for some f."""
    scale = _scale(module)
    if scale is None or any(True for _ in module.buffers()) or len(list(module.parameters())) != len(_own(module)):
        return False
    inputs = list(inspect.signature(type(module).forward).parameters.values())[1:]
    plain = all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in inputs)
    return plain and 1 <= len(inputs) <= 2 and _answers(module, scale, len(inputs))


@torch.no_grad()
def _answers(module: nn.Module, scale: Tensor, inputs: int) -> bool:
    """Run the module's code, in training mode, on fixed rows with a γ and a β of our own."""
    device = torch.device("cpu") if scale.is_meta else scale.device
    ramp = torch.arange(_ROWS * scale.numel(), device=device, dtype=torch.float32).view(_ROWS, *scale.shape)
    rows = [(0.7 * ramp).sin() + 0.3, (0.3 * ramp).cos()][:inputs]
    gamma, beta = 1.5 + ramp[0].cos(), ramp[0].sin()

    def run(factor: Tensor, shift: Tensor) -> Any:
        trial = _with(module, lambda _: factor, lambda _: shift)
        trial.training = True
        return type(module).forward(trial, *(row.clone() for row in rows))

    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            unit, again = (run(torch.ones_like(gamma), torch.zeros_like(beta)) for _ in range(2))
            found = run(gamma, beta)
    except _REFUSALS:
        return False
    if not all(isinstance(value, Tensor) and value.shape == rows[0].shape for value in (unit, again, found)):
        return False
    wanted = gamma * unit + (beta if len(_own(module)) > 1 else 0.0)
    return torch.equal(unit, again) and bool(unit.any()) and torch.allclose(found, wanted, atol=_TOLERANCE)


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {key: parameter for key, parameter in module._parameters.items() if parameter is not None}


def _scale(module: nn.Module) -> nn.Parameter | None:
    """Return γ: a weight beside a bias of its shape, or the only parameter, by any name."""
    own = _own(module)
    keys = set(own)
    scale = next(iter(own.values())) if len(keys) == 1 and keys != {"bias"} else own.get("weight")
    if scale is None or isinstance(scale, UninitializedParameter) or not scale.is_floating_point():
        return None
    if keys == {"weight", "bias"}:
        return scale if own["bias"].shape == scale.shape and scale.numel() > 1 else None
    return scale if len(keys) == 1 and scale.numel() > 1 else None


def _parameters(name: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """Return γ and β as far as they are trained, γ first."""
    scale = _scale(module)
    ordered = sorted(_own(module).items(), key=lambda item: item[1] is not scale)
    return {f"{name}.{key}" if name else key: parameter for key, parameter in ordered if parameter.requires_grad}


def _with(module: nn.Module, scale: Callable[[Tensor], Tensor], shift: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return the module with another γ and β; the module itself stays as it is."""
    trial, own = copy.copy(module), _scale(module)
    trial._parameters = {
        key: None if p is None else nn.Parameter((scale if p is own else shift)(p.detach()), requires_grad=False)
        for key, p in module._parameters.items()
    }
    return trial
