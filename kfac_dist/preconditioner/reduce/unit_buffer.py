"""Units on the wire: one flat buffer in which everything that has the same owner is contiguous.

Matrices are sent whole or as packed triangles, in fp64, fp32 or bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kfac_dist.curvature.factors import Unit
from kfac_dist.distributed.movement.owner_buffer import Segment, SegmentLayout
from kfac_dist.distributed.movement.packing import pack_symmetric, triangle_numel, unpack_symmetric
from kfac_dist.precision import widened


class UnitBuffer:
    """The place of every unit's values in a flat buffer ordered by owner.

    Args:
        units: The units sent.
        owners: Rank within the communicator that each unit comes from or goes to.
        size: Ranks of the communicator.
        numel: Values of a unit when it isn't packed.
        packed: Whether a unit travels as triangles of its `[batch, n, n]`; only the upper half has to be valid.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        owners: Sequence[int],
        size: int,
        *,
        numel: Callable[[Unit], int],
        packed: Callable[[Unit], bool],
    ) -> None:
        self.units = tuple(units)
        self._packed = {unit.name: packed(unit) for unit in units}
        self.layout = SegmentLayout(
            [
                Segment(unit.name, unit.batch * triangle_numel(unit.dim) if packed(unit) else numel(unit), owner)
                for unit, owner in zip(units, owners, strict=True)
            ],
            size,
        )

    def buffer(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer for everything, to be summed."""
        return torch.empty(self.layout.numel, dtype=dtype, device=device)

    def sharing_buffer(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer for everything, to be shared."""
        return torch.empty(self.layout.sharing_numel, dtype=dtype, device=device)

    def put(self, buffer: Tensor, unit: Unit, values: Tensor) -> None:
        """Write a unit's values into the buffer."""
        place = self.layout.view(buffer, unit.name)
        if self._packed[unit.name]:
            # The packed layout reads the lower triangle, which is the upper one of the transpose.
            pack_symmetric(values.view(unit.shape).mT, place)
        else:
            place.copy_(values.flatten())

    def get(self, place: Tensor, unit: Unit) -> Tensor:
        """Return a unit's flat values, of fp32 at least, from its place in a buffer."""
        if not self._packed[unit.name]:
            return widened(place)
        return unpack_symmetric(widened(place).view(unit.batch, -1), unit.dim).flatten()
