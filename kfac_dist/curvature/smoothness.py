"""Where a model's outputs are not twice differentiable in its parameters: which operation, in which module.

One forward pass is watched below autograd, where a module, a function of `torch.nn.functional`, a tensor's method and
the inside of a custom function all end as the same few operations. An operation that kinks concerns the parameters
that were used before it; a last layer behind the last ReLU is none of these.

What compares numbers can hide a kink (`x * (x > 0)`) or be harmless (a mask): that is reported as a doubt, and
`directional.mismatch` decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kfac_dist.inputs import Inputs, call

# The derivative jumps, or, of elu, the second one does.
_NAMES = (
    "relu relu6 leaky_relu rrelu rrelu_with_noise prelu _prelu_kernel threshold hardtanh hardsigmoid "
    "hardswish hardshrink softshrink elu celu selu clamp clamp_min clamp_max abs sign sgn heaviside round "
    "floor ceil trunc frac fmod remainder maximum minimum fmax fmin max min amax amin aminmax max_pool1d "
    "max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices max_pool1d_with_indices "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d "
    "fractional_max_pool3d sort topk kthvalue median nanmedian mode cummax cummin _cummax_helper "
    "_cummin_helper smooth_l1_loss huber_loss rnn_relu rnn_relu_cell "
)
_KINKS = frozenset(_NAMES.split())
_COMPARISONS = frozenset(("gt", "lt", "ge", "le", "eq", "ne", "argmax", "argmin", "_local_scalar_dense"))


@dataclass(frozen=True)
class Operation:
    """Something that was computed.

    Attributes:
        name: Of the operation, as torch calls it below autograd.
        module: Name of the module that did it; empty for the model itself.
        kind: The module's type.
        moment: Its number in the order of all operations.
    """

    name: str
    module: str
    kind: str
    moment: int

    def __str__(self) -> str:
        """Say what and where."""
        return (
            f"{self.name} in {self.module} ({self.kind})" if self.module else f"{self.name} in the model ({self.kind})"
        )


@dataclass(frozen=True)
class Course:
    """What happened in a forward pass, in order.

    Attributes:
        first_use: By parameter that was used, the moment of its first use.
        last_use: By parameter that was used, the moment of its last use.
        kinks: Operations that are not twice differentiable.
        doubts: Operations that may hide one.
        elements: Numbers that were computed, of all intermediate results together.
    """

    first_use: Mapping[str, int]
    last_use: Mapping[str, int]
    kinks: tuple[Operation, ...]
    doubts: tuple[Operation, ...]
    elements: int

    def kinks_after(self, names: list[str]) -> list[Operation]:
        """Return the kinks that the outputs, as a function of these parameters, may have."""
        return _after(self.kinks, self.first_use, names)

    def doubts_after(self, names: list[str]) -> list[Operation]:
        """Return the doubts about outputs as a function of these parameters."""
        return _after(self.doubts, self.first_use, names)


def observe(module: nn.Module, inputs: Inputs) -> Course:
    """Watch one forward pass.

    Args:
        module: The bare model, in the mode in which it is to be looked at.
        inputs: What the model takes, `[B, ...]`.
    """
    watch = _Watch(module)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation, of which nothing can be seen
    try:
        with watch.inside_modules(), torch.no_grad(), watch:
            call(module, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return Course(watch.first_use, watch.last_use, tuple(watch.kinks), tuple(watch.doubts), watch.elements)


class _Watch(TorchDispatchMode):
    """Notes what matters of each operation."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._module = module
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._stack: list[tuple[str, str]] = [("", type(module).__name__)]
        self._moment = 0
        self.elements = 0
        self.first_use: dict[str, int] = {}
        self.last_use: dict[str, int] = {}
        self.kinks: list[Operation] = []
        self.doubts: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        self._moment += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for name in (self._names[id(t)] for t in tensors if id(t) in self._names):
            self.first_use.setdefault(name, self._moment)
            self.last_use[name] = self._moment
        operation = func._schema.name.rpartition("::")[2].removesuffix("_")
        if any(t.is_floating_point() for t in tensors):
            found = Operation(operation, *self._stack[-1], self._moment)
            if operation in _KINKS:
                self.kinks.append(found)
            elif operation in _COMPARISONS:
                self.doubts.append(found)
        result = func(*args, **(kwargs or {}))
        self.elements += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    @contextmanager
    def inside_modules(self) -> Iterator[None]:
        """Know which module is running."""
        handles = []
        for name, module in self._module.named_modules():
            place = (name, type(module).__name__)
            handles.append(module.register_forward_pre_hook(lambda *_, place=place: self._stack.append(place)))
            handles.append(module.register_forward_hook(lambda *_: self._left(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _left(self) -> None:
        self._stack.pop()


def _after(operations: tuple[Operation, ...], first_use: Mapping[str, int], names: list[str]) -> list[Operation]:
    used = [first_use[name] for name in names if name in first_use]
    return [operation for operation in operations if used and operation.moment > min(used)]
