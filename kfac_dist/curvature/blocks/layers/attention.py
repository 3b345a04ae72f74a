"""`nn.MultiheadAttention`: four linear layers inside one module that calls none of them as a module.

    in_proj.q, .k, .v   rows of `in_proj_weight` [3E, E]; or `q_proj_weight`, `k_proj_weight`, `v_proj_weight`
    out_proj            `out_proj.weight`, which the module hands to a function

A `TorchFunctionMode` sees the calls that hooks on modules can't: it is entered before a forward pass that is measured,
sees every `F.linear` in it, and knows a projection by its weight, which is one of the module's parameters or rows of
one.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from kfac_dist.config.schema import Sharing
from kfac_dist.curvature.blocks.base import KroneckerBlock, dense, weight_and_bias_views
from kfac_dist.curvature.blocks.layer_calls import Handle, Recorder
from kfac_dist.curvature.blocks.rows import batch_first
from kfac_dist.curvature.capture.call_mode import CallMode
from kfac_dist.curvature.factors import Side
from kfac_dist.hooks import after_forward, before_forward


@dataclass(frozen=True)
class Projection:
    """One linear layer inside an attention module: rows `[start, stop)` of a weight and of its bias."""

    name: str
    weight: str
    bias: str
    start: int
    stop: int


def projections(module: nn.MultiheadAttention) -> tuple[Projection, ...]:
    """Return a module's projections, in the order in which a forward pass computes them."""
    width = module.embed_dim
    # The bias is one vector of 3E even where the weights are apart.
    separate = module.in_proj_weight is None
    return (
        *(
            Projection(f"in_proj.{key}", f"{key}_proj_weight" if separate else "in_proj_weight", "in_proj_bias", i, j)
            for key, i, j in (("q", 0, width), ("k", width, 2 * width), ("v", 2 * width, 3 * width))
        ),
        Projection("out_proj", "out_proj.weight", "out_proj.bias", 0, width),
    )


class AttentionBlock(KroneckerBlock):
    """A: [d_in(+1)]², G: [E]² of one projection.

    Args:
        name: The attention module's name; the block's own adds the projection's.
        module: The attention module.
        sharing: Treatment of positions.
        projection: The projection.
        calls: Sees the module's calls, for all of its blocks.
        bias: Whether the projection's bias is part of it.
    """

    def __init__(
        self,
        name: str,
        module: nn.MultiheadAttention,
        sharing: Sharing,
        projection: Projection,
        calls: _Calls,
        *,
        bias: bool = True,
    ) -> None:
        own = {key: p for key, p in module.named_parameters() if p.requires_grad}
        keys = [key for key in (projection.weight, projection.bias)[: 1 + bias] if key in own]
        prefix = f"{name}." if name else ""
        super().__init__(
            f"{prefix}{projection.name}", module, sharing, parameters={f"{prefix}{key}": own[key] for key in keys}
        )
        self.projection = projection
        self.has_bias = len(keys) > 1
        self._calls = calls
        inputs = own[projection.weight].shape[1] + self.has_bias
        outputs = projection.stop - projection.start
        self.factors = (dense(Side.A, inputs), dense(Side.G, outputs))
        self.matrix_shape = (1, outputs, inputs)

    @property
    def weight(self) -> Tensor:
        """The parameter of which this block has rows, as the module has it now."""
        return cast(Tensor, self.module.get_parameter(self.projection.weight))

    def own_tensors(self, source: nn.Module) -> dict[str, Tensor]:
        """See `Block.own_tensors`: some belong to a module inside."""
        keys = (self.projection.weight, self.projection.bias)
        return {name: source.get_parameter(key) for name, key in zip(self.parameters, keys, strict=False)}

    def watch(self, recorder: Recorder) -> list[Handle]:
        """See `Block.watch`."""
        return self._calls.watch(self, recorder)

    def input_rows(self, inputs: Tensor, batch_size: int | None) -> Tensor:
        """Return `[1, B, T, d_in]`."""
        return batch_first(inputs, batch_size).unsqueeze(0)

    def output_rows(self, grad: Tensor, batch_size: int | None) -> Tensor:
        """Return `[1, B, T, E]`."""
        return batch_first(grad, batch_size).unsqueeze(0)

    def rows(self, parameter: str) -> tuple[int, int] | None:
        """See `Block.rows`: the bias of the inner projections is one vector even where their weights are apart."""
        if self.projection.name == "out_proj" or (parameter.endswith("_proj_weight") and self._weight_is_own):
            return None
        return self.projection.start, self.projection.stop

    def parameter_views(self, matrix: Tensor) -> list[Tensor]:
        """See `Block.parameter_views`."""
        return weight_and_bias_views(self.own_shapes(), matrix)

    @property
    def _weight_is_own(self) -> bool:
        return self.projection.weight != "in_proj_weight"

    def columns_in(self, weight: Tensor) -> slice | None:
        """Return which columns of `F.linear(x, weight)` are this projection's, None if none are."""
        own = self.weight
        distance = weight.data_ptr() - own.data_ptr()
        if weight.shape[1:] != own.shape[1:] or not 0 <= distance < own.numel() * own.element_size():
            return None
        first = distance // (own.stride(0) * own.element_size())
        begin = (0 if self._weight_is_own else self.projection.start) - first
        width = self.projection.stop - self.projection.start
        return slice(begin, begin + width) if begin >= 0 and begin + width <= weight.shape[0] else None


def attention_blocks(
    name: str, module: nn.MultiheadAttention, sharing: Callable[[str], Sharing], *, bias: bool = True
) -> list[AttentionBlock]:
    """Return the blocks of one attention module whose weights are trained, all watching through one mode."""
    calls = _Calls(module)
    prefix = f"{name}." if name else ""
    return [
        AttentionBlock(name, module, sharing(f"{prefix}{projection.name}"), projection, calls, bias=bias)
        for projection in projections(module)
        if module.get_parameter(projection.weight).requires_grad
    ]


class _Calls:
    """Enters a mode around every forward pass of one attention module that is measured."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self._module = module
        self._watchers: list[tuple[AttentionBlock, Recorder]] = []
        self._modes: list[_SeesProjections] = []

    def watch(self, block: AttentionBlock, recorder: Recorder) -> list[Handle]:
        watcher = (block, recorder)
        self._watchers.append(watcher)
        if len(self._watchers) > 1:
            return [_Watcher(self._watchers, watcher)]
        return [
            before_forward(self._module, self._begins),
            after_forward(self._module, self._ended, always_call=True),
            _Watcher(self._watchers, watcher),
        ]

    def _begins(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        watchers = [(block, recorder) for block, recorder in self._watchers if recorder.watching]
        if watchers:
            if not torch.compiler.is_dynamo_compiling():
                self._modes = [mode for mode in self._modes if not mode.over]
            self._modes.append(_SeesProjections(watchers))
            self._modes[-1].begin()

    def _ended(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._modes:
            self._modes.pop().end()


class _Watcher:
    """Removes one block from the list of watching blocks."""

    def __init__(self, watchers: list[tuple[AttentionBlock, Recorder]], own: tuple[AttentionBlock, Recorder]) -> None:
        self._watchers, self._own = watchers, own

    def remove(self) -> None:
        if self._own in self._watchers:
            self._watchers.remove(self._own)


class _SeesProjections(CallMode):
    """Records the `F.linear` calls of one forward pass whose weights are projections."""

    def __init__(self, watchers: Sequence[tuple[AttentionBlock, Recorder]]) -> None:
        super().__init__()
        self._watchers = watchers
        self._batch = 1
        self._compute: Callable[..., Tensor] = F.linear

    @override
    def begin(self) -> None:
        """Enter the mode, and stand in for a replacement of `F.linear` that no mode sees: DeepSpeed's, under ZeRO-3."""
        super().begin()
        if isinstance(self._compute, types.FunctionType):
            F.linear = self._linear

    @override
    def undo(self) -> None:
        if F.linear == self._linear:
            F.linear = self._compute

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.multi_head_attention_forward:
            with self:
                return _undispatched(func)(*args, **(kwargs or {}))
        if func is F.linear:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_dynamo_compiling() and self.over:
            return self._compute(input, weight, bias)
        found = [(block, recorder, block.columns_in(weight)) for block, recorder in self._watchers]
        output: Tensor | None = None
        # Inside, tensors are [T, B, E] for either `batch_first`, and rows [T·B, E] before out_proj.
        self._batch = input.shape[1] if input.ndim == 3 else self._batch
        inputs = _samples_first(input, self._batch)
        try:
            output = self._compute(input, weight, bias)
        finally:  # activation checkpointing ends a forward pass that it repeats by an exception
            for block, recorder, columns in found:
                if columns is not None:
                    arrange = functools.partial(_own_gradient, columns=columns, batch=self._batch)
                    recorder.record(inputs, output, source=block.module, arrange=arrange)
        return output


def _samples_first(tensor: Tensor, batch: int) -> Tensor:
    """Return `[T, B, d]` or `[T·B, d]` as `[B, T, d]`."""
    return (tensor if tensor.ndim == 3 else tensor.unflatten(0, (-1, batch))).transpose(0, 1)


def _own_gradient(grad: Tensor, *, columns: slice, batch: int) -> Tensor:
    return _samples_first(grad[..., columns], batch)


def _undispatched(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a Python function of torch that runs its body where the original hands itself to a mode.

    A mode is off while it handles a call, and entering it again would hand the same call back to it. Seen from the
    copy, no argument has a torch function; the calls inside still reach the mode.
    """
    if not isinstance(function, types.FunctionType):  # replaced by another library: run it, unseen inside
        return function
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
