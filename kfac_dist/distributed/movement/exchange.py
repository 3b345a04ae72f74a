"""Sharded gradients to the ranks that precondition them, and back: two all-to-alls, planned once.

    shards            a 0 1 2 | b 0 2 | c 1        parameter, and the ranks that hold a slice of it
    to_owners         rank 0 ⇐ a, rank 1 ⇐ b, rank 2 ⇐ c: an owner assembles its parts' full gradients
    (precondition)
    to_shards         the same bytes back the same way, into the gradients' own memory

A `Part` is sent to one owner: a parameter, or a run of its rows if several owners share it. `plan_exchange`
is pure: it says which elements lie where in the two buffers. `Exchange` owns the buffers and moves the bytes, from and
to the memory in which owners precondition; what a rank both holds and owns is copied there without a detour. A rank
never holds more full gradients than it owns. Both ways start at once and are waited for later, so that several
exchanges, each over some of the parts, make buckets: one is on its way while another is preconditioned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.distributed.communicators.base import Communicator, Work
from kfac_dist.distributed.movement.gradient_layout import GradientLayout, ParameterSlices
from kfac_dist.distributed.movement.runs import cut_like, runs


@dataclass(frozen=True)
class Part:
    """Elements of one parameter that travel together to the rank that preconditions them.

    Attributes:
        name: Unique among the parts.
        parameter: The parameter's name.
        shape: Shape of the part, assembled at the owner.
        owner: The rank.
        start: The first of its elements in the flattened parameter; the others follow.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    owner: int
    start: int = 0

    @classmethod
    def whole(cls, parameter: ParameterSlices, owner: int) -> Part:
        """A parameter with one owner."""
        return cls(parameter.name, parameter.name, parameter.shape, owner)

    @property
    def stop(self) -> int:
        """One past its last element in the flattened parameter."""
        return self.start + torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Copy:
    """One rank's share of one part.

    Attributes:
        part: Name of the part.
        parameter: Name of its parameter.
        holder: The rank that holds these elements as its shard.
        local: The first of them in the holder's slice of the gradient.
        offset: The first of them in the flattened part.
        numel: Their number.
    """

    part: str
    parameter: str
    holder: int
    local: int
    offset: int
    numel: int


@dataclass(frozen=True)
class ExchangePlan:
    """One rank's messages, sent and received.

    Attributes:
        shards: Slices that this rank holds for other owners, in the order of its shard buffer: by owner, then by part.
        shard_splits: Elements of the shard buffer for each owner.
        pieces: Slices of this rank's parts that others hold, in the order of its owner buffer: by holder, then by part.
        piece_splits: Elements of the owner buffer from each holder.
        kept: Slices that this rank both holds and owns: they stay here.
        owned: The parts that this rank owns, with their shapes.
    """

    shards: tuple[Copy, ...]
    shard_splits: tuple[int, ...]
    pieces: tuple[Copy, ...]
    piece_splits: tuple[int, ...]
    kept: tuple[Copy, ...]
    owned: Mapping[str, tuple[int, ...]]

    @property
    def sent_elements(self) -> tuple[int, int]:
        """Elements that this rank sends on the way to owners, and on the way back."""
        return sum(self.shard_splits), sum(self.piece_splits)


def plan_exchange(layout: GradientLayout, parts: Sequence[Part], rank: int) -> ExchangePlan:
    """Plans the exchange of some parts, for one rank.

    Args:
        layout: Slices of each gradient, by the rank that holds them.
        parts: The parts to send, in the same order on every rank; elements in no part keep their gradients.
        rank: The rank whose plan is wanted.

    Raises:
        ValueError: A parameter isn't in the layout or isn't sharded, a part exceeds it, or an owner is no rank.
    """
    copies: list[tuple[Copy, int]] = []
    for part in parts:
        name = part.parameter
        if name not in layout or layout[name].is_replicated:
            raise ValueError(f"{name} is not a sharded parameter of the layout: there is nothing to exchange")
        if not 0 <= part.owner < layout.size:
            raise ValueError(f"{part.name}: its owner {part.owner} is none of {layout.size} ranks")
        if not 0 <= part.start <= part.stop <= layout[name].numel:
            raise ValueError(f"{part.name}: elements {part.start} to {part.stop} exceed {name}'s {layout[name].numel}")
        for held in layout[name].slices or ():
            first, last = max(held.start, part.start), min(held.stop, part.stop)
            if first < last and rank in (held.rank, part.owner):
                copy = Copy(part.name, name, held.rank, first - held.start, first - part.start, last - first)
                copies.append((copy, part.owner))
    there = [(copy, owner) for copy, owner in copies if owner != rank]
    coming = [(copy, copy.holder) for copy, owner in copies if owner == rank != copy.holder]
    kept = tuple(copy for copy, owner in copies if owner == rank == copy.holder)
    owned = {part.name: part.shape for part in parts if part.owner == rank}
    return ExchangePlan(*_by_peer(there, layout.size), *_by_peer(coming, layout.size), kept, owned)


def _by_peer(copies: Iterable[tuple[Copy, int]], size: int) -> tuple[tuple[Copy, ...], tuple[int, ...]]:
    """Orders copies by the other end's rank; the sort is stable, so both ends see one order."""
    ordered = sorted(copies, key=lambda entry: entry[1])
    splits = [0] * size
    for copy, peer in ordered:
        splits[peer] += copy.numel
    return tuple(copy for copy, _ in ordered), tuple(splits)


class SliceViews:
    """Fixed memory for some slices of this rank's gradients, filled and emptied by one copy of all.

    Args:
        copies: The slices.
        places: Of each, the views that hold its elements, in order.
    """

    def __init__(self, copies: Sequence[Copy], places: Sequence[Sequence[Tensor]]) -> None:
        # Flat where they can be, so that a whole slice needs no view of its own.
        flat = [[view.view(-1) if view.is_contiguous() else view for view in own] for own in places]
        self._slices = list(zip(copies, flat, strict=True))
        self._views = [view for own in flat for view in own]
        # Of the gradients that have filled it, until they are back.
        self._filled: tuple[Mapping[str, Tensor], list[Tensor], list[Tensor]] | None = None

    def fill(self, local: Mapping[str, Tensor]) -> None:
        """Copy what a rank holds of gradients into the memory; one that is missing counts as zero."""
        views, held = self._pairs(local)
        self._filled = (local, views, held)
        if len(views) < len(self._views):
            torch._foreach_zero_([view for copy, own in self._slices if copy.parameter not in local for view in own])
        if views:
            torch._foreach_copy_(views, held)

    def empty_into(self, local: Mapping[str, Tensor], scale: Tensor | None) -> None:
        """Copy what is in the memory, times a 0-dim factor, over the gradients that there are."""
        if scale is not None and self._views:
            torch._foreach_mul_(self._views, scale)
        filled, self._filled = self._filled, None
        views, held = self._pairs(local) if filled is None or filled[0] is not local else filled[1:]
        if views:
            torch._foreach_copy_(held, views)

    def _pairs(self, local: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the views whose gradients are there, and the parts of these that hold the same elements."""
        views: list[Tensor] = []
        held: list[Tensor] = []
        for copy, own in self._slices:
            gradient = local.get(copy.parameter)
            if gradient is None:
                continue
            part = _part_of(gradient, copy)
            views += own
            if len(own) > 1:
                held += cut_like(part, own)
            else:
                held += [part if view.ndim == 1 else part.view(view.shape) for view in own]
        return (self._views if len(views) == len(self._views) else views), held


class Exchange:
    """Moves gradients along a plan, through buffers that live as long as it does.

    One round trip is `to_owners`, `assembled`, `to_shards`, `delivered`, in this order.

    Args:
        comm: The ranks of the layout.
        plan: This rank's plan; every rank's comes from the same layout and the same parts.
        places: The memory of each part that this rank owns, as `[R, C]` with the part's elements row by row: there it
            is assembled, in fp32 or what owners compute on, and from there it goes back.
        device: The gradients' device.
        wire_dtype: The dtype sent.
        label: Name of the traffic.

    Raises:
        ValueError: A place is missing, or has another number of elements.
    """

    def __init__(
        self,
        comm: Communicator,
        plan: ExchangePlan,
        places: Mapping[str, Tensor],
        *,
        device: torch.device | str = "cpu",
        wire_dtype: torch.dtype = torch.float32,
        label: str = "gradients",
    ) -> None:
        self.plan = plan
        self._comm = comm
        self._label = label
        for name, shape in plan.owned.items():
            found = places[name].shape if name in places else None
            if found is None or len(found) != 2 or found.numel() != torch.Size(shape).numel():
                raise ValueError(f"{name} has shape {tuple(shape)}; its place has {found and tuple(found)}")
        self._shards = torch.zeros(sum(plan.shard_splits), dtype=wire_dtype, device=device)
        self._pieces = torch.zeros(sum(plan.piece_splits), dtype=wire_dtype, device=device)
        in_shards = torch.split(self._shards, [copy.numel for copy in plan.shards]) if plan.shards else ()
        self._sent = SliceViews(plan.shards, [(view,) for view in in_shards])
        self._assembled = [run for copy in plan.pieces for run in _runs_of(places, copy)]
        self._in_pieces = cut_like(self._pieces, self._assembled)
        self._kept = SliceViews(plan.kept, [_runs_of(places, copy) for copy in plan.kept])
        self._work: Work | None = None

    def to_owners(self, local: Mapping[str, Tensor]) -> None:
        """Starts to bring every part's shards to its owner; collective.

        Args:
            local: Parameter to this rank's slice of its gradient: 1-D, any floating dtype. One that is missing counts
                as zero; more parameters than the plan has are ignored.
        """
        self._sent.fill(local)
        self._work = self._comm.all_to_all(
            self._pieces, self._shards, self.plan.piece_splits, self.plan.shard_splits, label=self._label
        )
        self._kept.fill(local)

    def assembled(self) -> None:
        """Waits until the gradients of all parts that this rank owns are in their places."""
        self._wait()
        if self._assembled:
            torch._foreach_copy_(self._assembled, self._in_pieces)

    def to_shards(self) -> None:
        """Starts to send the places' values back; collective. They must not be written until `delivered`."""
        if self._assembled:
            torch._foreach_copy_(self._in_pieces, self._assembled)
        self._work = self._comm.all_to_all(
            self._shards, self._pieces, self.plan.shard_splits, self.plan.piece_splits, label=self._label
        )

    def delivered(self, local: Mapping[str, Tensor], scale: Tensor | None = None) -> None:
        """Waits, and writes the received values into the slices, in place.

        Args:
            local: The argument of `to_owners`.
            scale: 0-dim factor of all values; it also scales this rank's own slices in their places.
        """
        self._wait()
        for views in (self._sent, self._kept):
            views.empty_into(local, scale)

    def _wait(self) -> None:
        assert self._work is not None, "nothing is on its way"
        self._work.wait()
        self._work = None


def _runs_of(places: Mapping[str, Tensor], copy: Copy) -> list[Tensor]:
    return runs(places[copy.part], copy.offset, copy.offset + copy.numel)


def _part_of(gradient: Tensor, copy: Copy) -> Tensor:
    """Return the view of this rank's slice that a copy speaks of."""
    numel, stop = gradient.numel(), copy.local + copy.numel
    if gradient.ndim != 1 or numel < stop:
        raise ValueError(
            f"{copy.parameter}: rank {copy.holder} holds {stop} elements or more of it, but its gradient has shape "
            f"{tuple(gradient.shape)}"
        )
    return gradient if numel == copy.numel else gradient[copy.local : stop]
