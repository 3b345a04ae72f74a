"""Transport of gradients to the ranks that precondition them, and of the results into the gradients' own memory.

    collect    start sending gradients
    arriving   receive a few groups at a time: they are preconditioned while others are under way
    send       start sending results
    deliver    receive, scale and write them in place of the gradients

Under a replicated engine every rank has every gradient, so only results travel, and only along the rows of the grid:

            column 0   column 1
    row 0    ●───────▶ ◀───────●       each rank preconditions its column's blocks, then hands them to its row:
    row 1    ●───────▶ ◀───────●       a few collectives, none when there is one column (placement replicated)

Under a sharded engine a row is the ranks that together hold each gradient once, and an exchange along the row takes a
block's slices to its column and back. There are as many exchanges as `distribution.buckets`, however many layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.curvature.blocks import Block
from kfac_dist.curvature.blocks.base import part_of
from kfac_dist.curvature.inverses.precondition import Group
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.movement.exchange import Exchange, Part, plan_exchange
from kfac_dist.distributed.movement.gradient_layout import GradientLayout
from kfac_dist.distributed.movement.owner_buffer import Segment, SegmentLayout, share_segments
from kfac_dist.distributed.movement.runs import as_rows
from kfac_dist.engines.base import Engine
from kfac_dist.preconditioner.plan import Plan

LABEL = "gradients"


class Transport(ABC):
    """Moves gradients between where the engine keeps them and the groups that precondition them."""

    @abstractmethod
    def collect(self, gradients: dict[str, Tensor]) -> None:
        """Start to send gradients to the ranks that precondition them.

        Args:
            gradients: By parameter name, each as the engine holds its gradient.
        """

    @abstractmethod
    def arriving(self) -> Iterator[Sequence[Group]]:
        """Yield the groups of this rank, some at a time, once their `gradient` workspaces are full."""

    @abstractmethod
    def send(self, groups: Sequence[Group], updates: Sequence[Tensor]) -> None:
        """Send the results of the groups that `arriving` yielded last; collective.

        Args:
            groups: The groups.
            updates: Their preconditioned gradients, one tensor a group, shaped like its `gradient`.
        """

    @abstractmethod
    def deliver(self, gradients: dict[str, Tensor], scale: Tensor | None) -> None:
        """Write the preconditioned gradients over the collected ones, on every rank.

        Args:
            gradients: The collected gradients.
            scale: 0-dim factor for all of them.
        """


class ParameterViews:
    """Views of gradient matrices in the shapes of the parameters, made once: a copy each way is one call.

    Args:
        blocks: Blocks; those without a matrix are left out.
        matrices: The memory of each block's gradient matrix, by name; it must stay where it is.
    """

    def __init__(self, blocks: Sequence[Block], matrices: Mapping[str, Tensor]) -> None:
        # Parameters that one view takes whole, in the order of the views; of others (rows of a fused weight, groups
        # that lie apart) the parts are cut out of each step's gradient.
        self._whole: dict[str, Tensor] = {}
        self._cut: dict[str, list[tuple[tuple[int, int] | None, Tensor]]] = {}
        for block in blocks:
            if block.name not in matrices:
                continue
            views = block.parameter_views(matrices[block.name])
            for (name, shape), view in zip(block.shapes.items(), views, strict=True):
                if tuple(view.shape) == shape:
                    self._whole[name] = view
                else:
                    self._cut.setdefault(name, []).append((block.rows(name), view))
        self._views = list(self._whole.values())

    def fill(self, gradients: Mapping[str, Tensor]) -> None:
        """Copy gradients into the matrices; one that is missing counts as zero."""
        parts, views = self._pairs(gradients)
        if len(views) < len(self._whole) + sum(map(len, self._cut.values())):
            missing = [view for name, view in self._whole.items() if name not in gradients]
            missing += [view for name, own in self._cut.items() if name not in gradients for _, view in own]
            torch._foreach_zero_(missing)
        if parts:
            torch._foreach_copy_(views, parts)

    def empty_into(self, gradients: Mapping[str, Tensor]) -> None:
        """Copy the matrices over the existing gradients."""
        parts, views = self._pairs(gradients)
        if parts:
            torch._foreach_copy_(parts, views)

    def _pairs(self, gradients: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the gradients, or parts of them, and the views that hold the same values."""
        if self._whole.keys() <= gradients.keys():
            parts, views = list(map(gradients.__getitem__, self._whole)), self._views
        else:
            known = [name for name in self._whole if name in gradients]
            parts, views = [gradients[name] for name in known], [self._whole[name] for name in known]
        if self._cut:
            views = list(views)
        for name, own in self._cut.items():
            gradient = gradients.get(name)
            if gradient is not None:
                parts += [part_of(gradient, rows, view) for rows, view in own]
                views += [view for _, view in own]
        return parts, views


class ReplicatedTransport(Transport):
    """Transport for engines whose gradients every rank holds whole.

    Args:
        blocks: All blocks.
        groups: The groups of this rank's column.
        plan: The plan, with the column of each block.
        row: The ranks that hand each other preconditioned gradients.
        dtype: Precision of these.
    """

    def __init__(
        self, blocks: Sequence[Block], groups: Sequence[Group], plan: Plan, row: Communicator, dtype: torch.dtype
    ) -> None:
        self._groups = groups
        self._row = row
        self._layout: SegmentLayout | None = None
        self._updates: list[Tensor] = []
        own = {
            block.name: group.matrix(group.gradient, index)
            for group in groups
            for index, block in enumerate(group.blocks)
        }
        self._collected = self._delivered = ParameterViews(blocks, own)
        if row.size > 1:
            self._layout = layout = update_layout(plan)
            # Every rank may precondition nothing (more columns than blocks) and still receives everything.
            device = next(iter(blocks[0].parameters.values())).device
            self._buffer = torch.zeros(layout.sharing_numel, device=device, dtype=dtype)
            sent = {block.name: layout.view(self._buffer, block.name).view(block.matrix_shape) for block in blocks}
            self._delivered = ParameterViews(blocks, sent)
            self._sent = [sent[name] for name in own]
            self._own = list(own.values())

    def collect(self, gradients: dict[str, Tensor]) -> None:
        """See `Transport.collect`."""
        self._collected.fill(gradients)

    def arriving(self) -> Iterator[Sequence[Group]]:
        """See `Transport.arriving`: everything is here."""
        yield self._groups

    def send(self, groups: Sequence[Group], updates: Sequence[Tensor]) -> None:
        """See `Transport.send`: nothing leaves before it has its scale."""
        self._updates = list(updates)

    def deliver(self, gradients: dict[str, Tensor], scale: Tensor | None) -> None:
        """See `Transport.deliver`."""
        updates, self._updates = self._updates, []
        # Into the workspaces, whose views are kept: the plain gradients there are no longer needed.
        for group, update in zip(self._groups, updates, strict=True):
            if scale is None:
                group.gradient.copy_(update)
            else:
                torch.mul(update, scale, out=group.gradient)
        if self._layout is not None:
            if self._own:
                torch._foreach_copy_(self._sent, self._own)
            share_segments(self._row, self._buffer, self._layout, label=LABEL).wait()
        self._delivered.empty_into(gradients)


@dataclass
class _Bucket:
    """One exchange, and the groups of this rank that need its gradients.

    Attributes:
        exchange: Carries it, into and out of the groups' workspaces.
        groups: The groups.
        staged: Pairs (part, workspace) whose elements can't be exchanged in place, so that parts are apart.
    """

    exchange: Exchange
    groups: Sequence[Group]
    staged: Sequence[tuple[Tensor, Tensor]]


class ShardedTransport(Transport):
    """Transport for engines whose ranks hold slices.

    On CUDA the exchanges run on the stream of their process group, in parallel with the preconditioning of received
    groups.

    Args:
        engine: The engine, which holds the gradients.
        blocks: All blocks.
        buckets: The groups of this rank's column, bucket by bucket.
        names: The blocks of each bucket, over all columns; the same on every rank.
        plan: The plan, with the column of each block.
        row: The ranks that together hold each gradient once; the position in it is the column.
        device: Device of the preconditioning.
        dtype: In which precision.
    """

    def __init__(
        self,
        engine: Engine,
        blocks: Sequence[Block],
        buckets: Sequence[Sequence[Group]],
        names: Sequence[Sequence[str]],
        plan: Plan,
        row: Communicator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        layout = engine.layout(dict.fromkeys(name for block in blocks for name in block.parameters))
        by_name = {block.name: block for block in blocks}
        # Gradients in bf16 are rounded to it anyway when the results come back; half precision would overflow.
        wire = torch.bfloat16 if engine.gradient_dtype is torch.bfloat16 else dtype
        self._buckets = []
        for groups, inside in zip(buckets, names, strict=True):
            parts = {name: exchange_parts(by_name[name], layout, plan) for name in inside}
            places, staged = _places(groups, parts)
            exchange_plan = plan_exchange(layout, [part for own in parts.values() for part in own], row.rank)
            exchange = Exchange(row, exchange_plan, places, device=device, wire_dtype=wire, label=LABEL)
            self._buckets.append(_Bucket(exchange, groups, staged))
        self._current: _Bucket | None = None

    def collect(self, gradients: dict[str, Tensor]) -> None:
        """See `Transport.collect`."""
        for bucket in self._buckets:
            bucket.exchange.to_owners(gradients)

    def arriving(self) -> Iterator[Sequence[Group]]:
        """See `Transport.arriving`: bucket by bucket."""
        for bucket in self._buckets:
            self._current = bucket
            bucket.exchange.assembled()
            if bucket.staged:
                torch._foreach_copy_([place for _, place in bucket.staged], [part for part, _ in bucket.staged])
            yield bucket.groups

    def send(self, groups: Sequence[Group], updates: Sequence[Tensor]) -> None:
        """See `Transport.send`: results leave from where the gradients were."""
        bucket = self._current
        assert bucket is not None
        if groups:
            torch._foreach_copy_([group.gradient for group in groups], list(updates))
        if bucket.staged:
            torch._foreach_copy_([part for part, _ in bucket.staged], [place for _, place in bucket.staged])
        bucket.exchange.to_shards()

    def deliver(self, gradients: dict[str, Tensor], scale: Tensor | None) -> None:
        """See `Transport.deliver`."""
        for bucket in self._buckets:
            bucket.exchange.delivered(gradients, scale)


def update_layout(plan: Plan) -> SegmentLayout:
    """Return how preconditioned gradients lie in the buffer that a row of ranks shares: by column."""
    return SegmentLayout(
        [Segment(name, torch.Size(block.matrix_shape).numel(), block.column) for name, block in plan.blocks.items()],
        plan.grid.columns,
    )


def exchange_parts(block: Block, layout: GradientLayout, plan: Plan) -> list[Part]:
    """Return the parts of a block's parameters to send to its preconditioning rank under an engine with slices."""
    owner = plan.blocks[block.name].column
    return [_part(block, parameter, layout[parameter].shape, owner) for parameter in block.parameters]


def _part(block: Block, parameter: str, shape: Sequence[int], owner: int) -> Part:
    """Return the part of a parameter to send to its block's owner: all of it, or the block's own rows."""
    rows = block.rows(parameter)
    first, last = (0, shape[0]) if rows is None else rows
    row = torch.Size(shape[1:]).numel()
    return Part(f"{block.name}/{parameter}", parameter, (last - first, *shape[1:]), owner, first * row)


def _places(
    groups: Sequence[Group], parts: Mapping[str, Sequence[Part]]
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Return the memory in which each part of the groups' blocks is assembled.

    That is its place in the block's gradient matrix, or, where the matrix has its elements in another order than any
    two-dimensional view shows, a tensor of its own, to be copied to and from (the pairs).
    """
    places: dict[str, Tensor] = {}
    staged: list[tuple[Tensor, Tensor]] = []
    for group in groups:
        for index, block in enumerate(group.blocks):
            views = block.parameter_views(group.matrix(group.gradient, index))
            for part, place in zip(parts[block.name], views, strict=True):
                rows = as_rows(place)
                if rows is None:
                    apart = place.new_empty(place.shape)
                    staged.append((apart, place))
                    rows = apart.view(1, -1)
                places[part.name] = rows
    return places, staged
