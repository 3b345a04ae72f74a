"""A rank's shards of a model and of its optimizer's state, of which checkpoints are made under every engine.

A holding is a run of elements of one flattened parameter: all of them (DDP), some rows (FSDP2) or any range (ZeRO). The
optimizer keeps its state under a tensor of its own choice, in which the parameter's run may be one of many:

    parameter blocks.0.weight  ├──── 0 … 4799 ────┼──────── 4800 … 9599 ────────┤
                                                   ╰ held here: start 4800
    optimizer.state[key]       ├─ another parameter's ─┼─ this one's, from `offset` on ─┼─ … ─┤
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class LocalShard:
    """One parameter's run of elements on this rank; never empty.

    Attributes:
        name: The parameter's name.
        shape: Its full shape.
        start: Element of the flattened parameter at which the run begins.
        values: The elements, writable: of the full shape if the run is all of them, else flat. In the precision that
            the optimizer steps.
        key: Key of the optimizer's state; None if it isn't trained.
        offset: Element of the flattened `key` at which the run begins.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    key: Tensor | None
    offset: int = 0

    @property
    def stop(self) -> int:
        """Element of the flattened parameter at which the run ends."""
        return self.start + self.values.numel()

    @property
    def whole(self) -> bool:
        """Whether the run is the whole parameter."""
        return self.values.numel() == math.prod(self.shape)

    def within(self, state: Tensor) -> Tensor:
        """Return the run's part of an elementwise state tensor, as a writable view: shaped like `values`."""
        local = local_part(state)
        if local.shape == self.values.shape:  # in any memory format
            return local
        flat = local.view(-1)
        return flat[self.offset : self.offset + self.values.numel()].view(self.values.shape)

    def is_elementwise(self, state: Tensor) -> bool:
        """Whether a state tensor has a value for each element of `key`, rather than one for all."""
        return self.key is not None and state.ndim > 0 and state.shape == self.key.shape


def local_part(tensor: Tensor) -> Tensor:
    """Return the memory on this rank of a tensor that may be distributed."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def holdings_of(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[LocalShard]:
    """Yield this rank's parts of parameters that are whole, or sharded by rows over a mesh's last dimension."""
    for name, parameter in parameters:
        key = parameter if parameter.requires_grad else None
        local = local_part(parameter.detach())
        start = 0
        if isinstance(parameter, DTensor):
            last = parameter.device_mesh.ndim - 1
            rows = -(-parameter.shape[0] // parameter.device_mesh.size(last))
            row = parameter.shape[1:].numel()
            start = min(rows * parameter.device_mesh.get_local_rank(last), parameter.shape[0]) * row
        shape = tuple(parameter.shape)
        if local.numel():
            whole = local.numel() == parameter.numel()
            yield LocalShard(name, shape, start, local if whole else local.view(-1), key)
