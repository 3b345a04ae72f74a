"""Sharded gradients to the ranks that precondition them, and back: two all-to-alls a step, planned once.

    shards            a 0 1 2 | b 0 2 | c 1        parameter, and the ranks that hold a slice of it
    to_owners         rank 0 ⇐ a, rank 1 ⇐ b, rank 2 ⇐ c: an owner assembles its parameters' full gradients
    (precondition)
    to_shards         the same bytes back the same way, into the gradients' own memory

`plan_exchange` is pure: it says which elements lie where in the two buffers. `Exchange` owns the buffers and moves the
bytes. A rank never holds more full gradients than it owns. Several exchanges, each over some of the parameters, make
buckets.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.distributed.communicator import Communicator
from kfac_dist.distributed.layout import GradientLayout, Slice


@dataclass(frozen=True)
class Copy:
    """Elements of a parameter and where they lie in a buffer.

    Attributes:
        name: The parameter.
        piece: Its elements, and the rank that holds them as its shard.
        offset: Their first position in the buffer.
    """

    name: str
    piece: Slice
    offset: int

    @property
    def buffer_range(self) -> slice:
        """Their positions in the buffer."""
        return slice(self.offset, self.offset + self.piece.numel)


@dataclass(frozen=True)
class ExchangePlan:
    """What one rank sends and receives.

    Attributes:
        shard_copies: This rank's shards in its shard buffer: by owner, then in the layout's order.
        shard_splits: Elements of the shard buffer for each owner.
        owner_copies: Pieces of the parameters that this rank owns, in its owner buffer: by the rank that holds them,
            then in the layout's order.
        owner_splits: Elements of the owner buffer from each rank.
        owned: The parameters that this rank owns, with their shapes.
    """

    shard_copies: tuple[Copy, ...]
    shard_splits: tuple[int, ...]
    owner_copies: tuple[Copy, ...]
    owner_splits: tuple[int, ...]
    owned: Mapping[str, tuple[int, ...]]

    def sent_elements(self, rank: int) -> tuple[int, int]:
        """Elements that `rank`, whose plan this is, sends to others on the way to owners, and on the way back."""
        return (
            sum(self.shard_splits) - self.shard_splits[rank],
            sum(self.owner_splits) - self.owner_splits[rank],
        )


def plan_exchange(layout: GradientLayout, owners: Mapping[str, int], rank: int) -> ExchangePlan:
    """Plans the exchange of the parameters in `owners`, for one rank.

    Args:
        layout: Who holds which part of each gradient.
        owners: Parameter to the rank that preconditions it; parameters that aren't in it keep their gradients.
        rank: The rank whose plan is wanted.

    Raises:
        ValueError: A parameter isn't in the layout or isn't sharded, or an owner is no rank.
    """
    for name, owner in owners.items():
        if name not in layout or layout[name].is_replicated:
            raise ValueError(f"{name} is not a sharded parameter of the layout: there is nothing to exchange")
        if not 0 <= owner < layout.size:
            raise ValueError(f"{name}: its owner {owner} is none of {layout.size} ranks")
    pieces = [
        (parameter.name, piece, owners[parameter.name])
        for parameter in layout.parameters
        if parameter.name in owners
        for piece in parameter.slices or ()
    ]
    shards = [(name, piece, owner) for name, piece, owner in pieces if piece.rank == rank]
    owned = [(name, piece, piece.rank) for name, piece, owner in pieces if owner == rank]
    shard_copies, shard_splits = _lay_out(shards, layout.size)
    owner_copies, owner_splits = _lay_out(owned, layout.size)
    shapes = {p.name: p.shape for p in layout.parameters if owners.get(p.name) == rank}
    return ExchangePlan(shard_copies, shard_splits, owner_copies, owner_splits, shapes)


def _lay_out(pieces: Iterable[tuple[str, Slice, int]], size: int) -> tuple[tuple[Copy, ...], tuple[int, ...]]:
    """Puts (parameter, elements, peer) one after another by peer; the sort is stable, so both ends see one order."""
    ordered = sorted(pieces, key=lambda entry: entry[2])
    starts = itertools.accumulate((piece.numel for _, piece, _ in ordered), initial=0)
    splits = [0] * size
    for _, piece, peer in ordered:
        splits[peer] += piece.numel
    copies = tuple(Copy(name, piece, start) for (name, piece, _), start in zip(ordered, starts, strict=False))
    return copies, tuple(splits)


class Exchange:
    """Moves gradients along a plan, through buffers that live as long as it does.

    Args:
        comm: The ranks of the layout.
        plan: This rank's plan; every rank's comes from the same layout and the same owners.
        device: Where the gradients live.
        wire_dtype: What travels; owners always compute on fp32.
        label: Name of the traffic.
    """

    def __init__(
        self,
        comm: Communicator,
        plan: ExchangePlan,
        *,
        device: torch.device | str = "cpu",
        wire_dtype: torch.dtype = torch.float32,
        label: str = "gradients",
    ) -> None:
        self.plan = plan
        self._comm = comm
        self._label = label
        self._shards = torch.empty(sum(plan.shard_splits), dtype=wire_dtype, device=device)
        self._pieces = torch.empty(sum(plan.owner_splits), dtype=wire_dtype, device=device)
        self._full = {name: torch.empty(shape, device=device) for name, shape in plan.owned.items()}

    def to_owners(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Brings every parameter's shards to its owner; collective.

        Args:
            local: Parameter to this rank's slice of its gradient: 1-D, any floating dtype; more parameters than the
                plan has are ignored.

        Returns:
            The full fp32 gradients, in the parameter's shape, of the parameters that this rank owns: buffers that the
            next call overwrites.
        """
        views = self._local_views(local)
        _copy_all([self._shards[copy.buffer_range] for copy in self.plan.shard_copies], views)
        self._comm.all_to_all(
            self._pieces, self._shards, self.plan.owner_splits, self.plan.shard_splits, label=self._label
        ).wait()
        _copy_all(self._owned_views(self._full), [self._pieces[copy.buffer_range] for copy in self.plan.owner_copies])
        return dict(self._full)

    def to_shards(self, updated: Mapping[str, Tensor], local: Mapping[str, Tensor]) -> None:
        """Takes owners' results back and writes them into the slices in place; collective.

        Args:
            updated: The parameters that this rank owns, full, shaped as `to_owners` returned them, or those.
            local: What `to_owners` was given.
        """
        _copy_all([self._pieces[copy.buffer_range] for copy in self.plan.owner_copies], self._owned_views(updated))
        self._comm.all_to_all(
            self._shards, self._pieces, self.plan.shard_splits, self.plan.owner_splits, label=self._label
        ).wait()
        _copy_all(self._local_views(local), [self._shards[copy.buffer_range] for copy in self.plan.shard_copies])

    def _local_views(self, local: Mapping[str, Tensor]) -> list[Tensor]:
        views = []
        for copy in self.plan.shard_copies:
            view = local[copy.name]
            if view.shape != (copy.piece.numel,):
                raise ValueError(f"{copy.name}: {copy.piece} has {copy.piece.numel} elements, not {tuple(view.shape)}")
            views.append(view)
        return views

    def _owned_views(self, full: Mapping[str, Tensor]) -> list[Tensor]:
        flat = {name: full[name].reshape(-1) for name in self.plan.owned}
        return [flat[copy.name][copy.piece.start : copy.piece.stop] for copy in self.plan.owner_copies]


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies pairwise, converting dtypes, in one launch on a GPU."""
    if targets:
        torch._foreach_copy_(targets, sources)
