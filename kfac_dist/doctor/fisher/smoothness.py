"""Points where a model's outputs are not twice differentiable in its parameters: the operation, and its module.

One forward pass is watched below autograd, where a module, a function of `torch.nn.functional`, a tensor's method and
the inside of a custom function all end as the same few operations. An operation that kinks concerns the parameters
that its input was computed from; a last layer behind the last ReLU is none of these, nor is a branch beside it. What
was computed from what is noted by memory, so that views and operations in place are followed.

What compares numbers can hide a kink (`x * (x > 0)`) or be harmless (a mask): that is reported as a doubt, and
`directional.mismatch` decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from kfac_dist.compat.torch import TorchDispatchMode, schema_of, tree_leaves
from kfac_dist.hooks import after_forward, before_forward
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
# They take a tensor's shape, not its values.
_MADE_ALIKE = (
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like "
    "new_empty new_empty_strided new_zeros new_ones new_full"
)
_SHAPES = frozenset(_MADE_ALIKE.split())


@dataclass(frozen=True)
class Operation:
    """Something that was computed.

    Attributes:
        name: Of the operation, as torch calls it below autograd.
        module: Name of the module that did it; empty for the model itself.
        kind: The module's type.
        parameters: Names of those that its input was computed from.
    """

    name: str
    module: str
    kind: str
    parameters: frozenset[str]

    def __str__(self) -> str:
        """Describe the operation and its place."""
        return (
            f"{self.name} in {self.module} ({self.kind})" if self.module else f"{self.name} in the model ({self.kind})"
        )


@dataclass(frozen=True)
class Course:
    """The course of a forward pass, in order.

    Attributes:
        last_use: By parameter that was used, the moment of its last use.
        kinks: Operations that are not twice differentiable.
        doubts: Operations that may hide one.
        elements: Numbers that were computed, of all intermediate results together.
    """

    last_use: Mapping[str, int]
    kinks: tuple[Operation, ...]
    doubts: tuple[Operation, ...]
    elements: int

    def kinks_of(self, names: Iterable[str]) -> list[Operation]:
        """Return the kinks that the outputs, as a function of these parameters, may have."""
        return [kink for kink in self.kinks if not kink.parameters.isdisjoint(names)]

    def doubts_of(self, names: Iterable[str]) -> list[Operation]:
        """Return the doubts about outputs as a function of these parameters."""
        return [doubt for doubt in self.doubts if not doubt.parameters.isdisjoint(names)]


def observe(module: nn.Module, inputs: Inputs) -> Course:
    """Watch one forward pass.

    Args:
        module: The bare model, in the mode in which it is to be looked at.
        inputs: The model's inputs, `[B, ...]`.
    """
    watch = _Watch(module)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation, of which nothing can be seen
    try:
        with watch.inside_modules(), torch.no_grad(), watch:
            call(module, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return Course(watch.last_use, tuple(watch.kinks), tuple(watch.doubts), watch.elements)


class _Origins:
    """From which parameters memory was computed.

    Each entry holds on to what its key is the address of, though not to the memory itself: no address is used again.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[StorageWeakRef | Tensor, frozenset[str]]] = {}

    def of(self, tensors: Iterable[Tensor]) -> frozenset[str]:
        """Return the names of the parameters that any of these was computed from."""
        found = (self._found.get(self._place(tensor)[0]) for tensor in tensors)
        return frozenset().union(*(names for _, names in filter(None, found)))

    def add(self, tensors: Iterable[Tensor], names: frozenset[str]) -> None:
        """Note that these were computed from parameters, too."""
        for tensor in tensors if names else ():
            key, owner = self._place(tensor)
            self._found[key] = owner, names | self.of([tensor])

    @staticmethod
    def _place(tensor: Tensor) -> tuple[int, StorageWeakRef | Tensor]:
        if tensor.layout is not torch.strided:  # sparse: no storage of its own
            return id(tensor), tensor
        storage = StorageWeakRef(tensor.untyped_storage())
        return storage.cdata, storage


class _Watch(TorchDispatchMode):
    """Records each operation's kinks and dependencies."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._module = module
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._origins = _Origins()
        for name, parameter in module.named_parameters():
            self._origins.add([parameter], frozenset([name]))
        self._stack: list[tuple[str, str]] = [("", type(module).__name__)]
        self._moment = 0
        self.elements = 0
        self.last_use: dict[str, int] = {}
        self.kinks: list[Operation] = []
        self.doubts: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        self._moment += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for name in (self._names[id(t)] for t in tensors if id(t) in self._names):
            self.last_use[name] = self._moment
        operation = schema_of(func).name.rpartition("::")[2].removesuffix("_")
        origins = frozenset() if operation in _SHAPES else self._origins.of(tensors)
        if any(t.is_floating_point() for t in tensors):
            found = Operation(operation, *self._stack[-1], origins)
            if operation in _KINKS:
                self.kinks.append(found)
            elif operation in _COMPARISONS:
                self.doubts.append(found)
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._origins.add([*made, *_written(func, args, kwargs or {})], origins)
        self.elements += sum(tensor.numel() for tensor in made)
        return result

    @contextmanager
    def inside_modules(self) -> Iterator[None]:
        """Know which module is running."""
        handles = []
        for name, module in self._module.named_modules():
            place = (name, type(module).__name__)
            handles.append(before_forward(module, lambda *_, place=place: self._stack.append(place)))
            handles.append(after_forward(module, lambda *_: self._left(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _left(self) -> None:
        self._stack.pop()


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that an operation writes into."""
    for place, argument in enumerate(schema_of(func).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
