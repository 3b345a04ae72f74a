"""What makes the host wait for a device, found on a machine that has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Their results, or the shapes of their results, are values.
_READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """Lists the operations that make the host wait: for a value, or for a copy to or from the device.

    On a CPU nothing tells host from device, and only values are found. A model on `meta`, which stands for a device,
    shows the copies: tensors of both in one operation, unless it is an asynchronous copy (0-dim tensors are numbers).
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in _READS or (name in _INDEXED and any(_is_mask(index) for index in args[1])):
            self.found.append(name)
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor) and leaf.ndim]
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
        if waits and {tensor.is_meta for tensor in tensors} == {True, False}:
            self.found.append(f"{name} of host and device")
        return result


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)
