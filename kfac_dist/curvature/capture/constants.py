"""Tensors of a forward pass that are the same for all samples: tables of positions, and all that is computed from them.

Such a tensor is the same for every sample of the batch, whatever its shape, and so are the outputs of the layers that
it passes through. One forward pass is traced, function by function:

    parameter, buffer, arange(T)  ──┐
                                    ├─ constant
    f(constant, constant)         ──┘
    f(constant, tokens), unknown  ──── not

Outputs of unknown origin (of a kernel, of a compiled function) count as different for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from kfac_dist.curvature.capture.call_mode import CallMode
from kfac_dist.curvature.capture.provenance import Provenance

# Functions that use only a tensor's shape, type or device, not its values.
_SHAPE_ALONE = ("expand_as", "view_as", "reshape_as", "type_as")
_NO_VALUE = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_tensor")
# Their contents come from elsewhere, perhaps from a kernel that no function shows.
_UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_WRITERS = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


class Constants(CallMode):
    """Traces a forward pass, and then knows the tensors that depend on no sample.

    Args:
        model: The model; its parameters and buffers are constant.
        inputs: The model's inputs.

    Attributes:
        provenance: Receives every function call, too.
    """

    def __init__(self, model: nn.Module, inputs: object = ()) -> None:
        super().__init__()
        self.provenance = Provenance(inputs)
        self._storages: dict[int, StorageWeakRef] = {}
        self._nodes: set[Any] = set()
        for tensor in (*model.buffers(), *_plain_tensors(model)):
            self._add(tensor)

    def __contains__(self, node: object) -> bool:
        """Whether a node of the graph makes a constant."""
        return node in self._nodes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch, and record its results."""
        result = func(*args, **(kwargs or {}))
        if not torch.compiler.is_dynamo_compiling() and not self.over:
            name = getattr(func, "__name__", "")
            self._note(name, [*args, *(kwargs or {}).values()], result)
            if name == "__get__":  # x.T and its like
                name = getattr(getattr(func, "__self__", None), "__name__", "")
            self.provenance.note(name, func, args, kwargs or {}, result)
        return result

    def _note(self, name: str, args: list[Any], result: Any) -> None:
        given = list(_tensors(args))
        if (name.endswith("_") and not name.endswith("__")) or name in _WRITERS:
            if given and not all(map(self._is_constant, given[1:])):
                self._remove(given[0])
            elif given and self._is_constant(given[0]):
                self._mark(given[0].grad_fn)
            return
        made = list(_tensors(result))
        if not made or name in _UNWRITTEN:
            return
        if name in _NO_VALUE:
            given = []
        elif name in _SHAPE_ALONE:
            given = given[:1]
        if all(map(self._is_constant, given)):
            for tensor in made:
                self._add(tensor)
                self._mark(tensor.grad_fn)

    def _is_constant(self, tensor: Tensor) -> bool:
        if isinstance(tensor, nn.Parameter):  # wherever an engine keeps its values just now
            return True
        key = _key(tensor)
        return key is not None and key in self._storages

    def _add(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key is not None and not isinstance(tensor, nn.Parameter):
            self._storages[key] = StorageWeakRef(tensor.untyped_storage())

    def _remove(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key is not None:
            self._storages.pop(key, None)

    def _mark(self, node: Any) -> None:
        todo = [node]
        while todo:
            node = todo.pop()
            if node is not None and node not in self._nodes:
                self._nodes.add(node)
                todo += [source for source, _ in node.next_functions]


def _key(tensor: Tensor) -> int | None:
    """Return the identity of a tensor's memory, which a weak reference keeps from being used again; None without."""
    try:
        return int(StorageWeakRef(tensor.untyped_storage()).cdata)
    except (NotImplementedError, RuntimeError):  # sparse and other tensors that have none
        return None


def _plain_tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor) and not value.requires_grad)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
