"""Gradients reach who preconditions them, and the results come back into `.grad`, in place.

Under a replicated engine every rank has every gradient, so only results travel, and only along the rows of the grid:

            column 0   column 1
    row 0    ●───────▶ ◀───────●       each rank preconditions its column's blocks, then hands them to its row:
    row 1    ●───────▶ ◀───────●       one broadcast a column, none when there is one column (placement replicated)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_dist.curvature.blocks import Block
from kfac_dist.curvature.precondition import Group
from kfac_dist.distributed.communicator import Communicator
from kfac_dist.distributed.segments import Segment, SegmentLayout, share_segments
from kfac_dist.engines.base import Engine
from kfac_dist.preconditioner.plan import Plan

LABEL = "gradients"


class Transport(ABC):
    """Moves gradients between where the engine keeps them and the groups that precondition them."""

    @abstractmethod
    def collect(self) -> None:
        """Fill the groups' `gradient` workspaces with the averaged gradients."""

    @abstractmethod
    def deliver(self, updates: Sequence[Tensor]) -> None:
        """Write the groups' preconditioned gradients into the engine's gradients, on every rank.

        Args:
            updates: One tensor a group, shaped like its `gradient`.
        """


class ReplicatedTransport(Transport):
    """Transport for engines whose gradients every rank holds whole.

    Args:
        engine: Where the gradients are.
        blocks: All blocks.
        groups: The groups of this rank's column.
        plan: Which column preconditions which block.
        row: The ranks that hand each other preconditioned gradients.
    """

    def __init__(
        self, engine: Engine, blocks: Sequence[Block], groups: Sequence[Group], plan: Plan, row: Communicator
    ) -> None:
        self._engine = engine
        self._blocks = {block.name: block for block in blocks}
        self._groups = groups
        self._row = row
        self._layout: SegmentLayout | None = None
        self._buffer: Tensor | None = None
        if row.size > 1:
            self._layout = SegmentLayout(
                [
                    Segment(name, torch.Size(block.matrix_shape).numel(), plan.blocks[name].column)
                    for name, block in self._blocks.items()
                ],
                row.size,
            )
            # Every rank may precondition nothing (more columns than blocks) and still receives everything.
            device = next(iter(blocks[0].parameters.values())).device
            self._buffer = torch.zeros(self._layout.numel, device=device)

    def collect(self) -> None:
        """See `Transport.collect`."""
        gradients = self._engine.gradients()
        into: list[Tensor] = []
        out: list[Tensor] = []
        for group in self._groups:
            for index, block in enumerate(group.blocks):
                matrix = group.matrix(group.gradient, index)
                found = _gradients_of(block, gradients)
                if found is None:
                    matrix.zero_()
                    continue
                for tensor, view in block.matrix_views(found, matrix):
                    into.append(view)
                    out.append(tensor)
        if into:
            torch._foreach_copy_(into, out)

    def deliver(self, updates: Sequence[Tensor]) -> None:
        """See `Transport.deliver`."""
        matrices = {
            block.name: group.matrix(update, index)
            for group, update in zip(self._groups, updates, strict=True)
            for index, block in enumerate(group.blocks)
        }
        if self._layout is not None and self._buffer is not None:
            matrices = self._share(matrices, self._layout, self._buffer)
        gradients = self._engine.gradients()
        into: list[Tensor] = []
        out: list[Tensor] = []
        for name, block in self._blocks.items():
            found = _gradients_of(block, gradients)
            for tensor, view in block.matrix_views(found, matrices[name]) if found is not None else ():
                into.append(tensor)
                out.append(view)
        if into:
            torch._foreach_copy_(into, out)

    def _share(self, own: dict[str, Tensor], layout: SegmentLayout, buffer: Tensor) -> dict[str, Tensor]:
        if own:
            torch._foreach_copy_([layout.view(buffer, name).view_as(m) for name, m in own.items()], list(own.values()))
        share_segments(self._row, buffer, layout, label=LABEL).wait()
        return {name: layout.view(buffer, name).view(block.matrix_shape) for name, block in self._blocks.items()}


def _gradients_of(block: Block, gradients: dict[str, Tensor]) -> list[Tensor] | None:
    """Return the block's gradients in matrix order; None if no rank used the layer in this step."""
    found = [gradients[name] for name in block.parameters if name in gradients]
    return found if len(found) == len(block.parameters) else None
