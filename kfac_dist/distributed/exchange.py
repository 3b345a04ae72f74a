"""Sharded gradients to the ranks that precondition them, and back: two all-to-alls, planned once.

    shards            a 0 1 2 | b 0 2 | c 1        parameter, and the ranks that hold a slice of it
    to_owners         rank 0 ⇐ a, rank 1 ⇐ b, rank 2 ⇐ c: an owner assembles its parts' full gradients
    (precondition)
    to_shards         the same bytes back the same way, into the gradients' own memory

What travels to one owner is a `Part`: a parameter, or a run of its rows where several owners share it. `plan_exchange`
is pure: it says which elements lie where in the two buffers. `Exchange` owns the buffers and moves the bytes. A rank
never holds more full gradients than it owns. Both ways start at once and are waited for later, so that several
exchanges, each over some of the parts, make buckets: one is on its way while another is preconditioned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.distributed.communicator import Communicator, Work
from kfac_dist.distributed.layout import GradientLayout, ParameterSlices


@dataclass(frozen=True)
class Part:
    """Elements of one parameter that travel together to the rank that preconditions them.

    Attributes:
        name: Unique among the parts.
        parameter: The parameter's name.
        shape: What the owner assembles.
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
        """A parameter that nobody else owns a part of."""
        return cls(parameter.name, parameter.name, parameter.shape, owner)

    @property
    def stop(self) -> int:
        """One past its last element in the flattened parameter."""
        return self.start + torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Copy:
    """What one rank holds of one part.

    Attributes:
        part: Name of the part.
        parameter: Name of its parameter.
        holder: The rank that holds these elements as its shard.
        local: The first of them in the holder's slice of the gradient.
        offset: The first of them in the flattened part.
        numel: How many there are.
    """

    part: str
    parameter: str
    holder: int
    local: int
    offset: int
    numel: int


@dataclass(frozen=True)
class ExchangePlan:
    """What one rank sends and receives.

    Attributes:
        shards: This rank's elements, in the order of its shard buffer: by owner, then in the order of the parts.
        shard_splits: Elements of the shard buffer for each owner.
        pieces: What makes up the parts that this rank owns, in the order of its owner buffer: by holder, then in the
            order of the parts.
        piece_splits: Elements of the owner buffer from each holder.
        owned: The parts that this rank owns, with their shapes.
    """

    shards: tuple[Copy, ...]
    shard_splits: tuple[int, ...]
    pieces: tuple[Copy, ...]
    piece_splits: tuple[int, ...]
    owned: Mapping[str, tuple[int, ...]]

    def sent_elements(self, rank: int) -> tuple[int, int]:
        """Elements that `rank`, whose plan this is, sends to others on the way to owners, and on the way back."""
        return (
            sum(self.shard_splits) - self.shard_splits[rank],
            sum(self.piece_splits) - self.piece_splits[rank],
        )


def plan_exchange(layout: GradientLayout, parts: Sequence[Part], rank: int) -> ExchangePlan:
    """Plans the exchange of some parts, for one rank.

    Args:
        layout: Who holds which slice of each gradient.
        parts: What travels, in the same order on every rank; elements in no part keep their gradients.
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
            if first < last:
                copy = Copy(part.name, name, held.rank, first - held.start, first - part.start, last - first)
                copies.append((copy, part.owner))
    shards, shard_splits = _by_peer([(copy, owner) for copy, owner in copies if copy.holder == rank], layout.size)
    pieces, piece_splits = _by_peer([(copy, copy.holder) for copy, owner in copies if owner == rank], layout.size)
    owned = {part.name: part.shape for part in parts if part.owner == rank}
    return ExchangePlan(shards, shard_splits, pieces, piece_splits, owned)


def _by_peer(copies: Iterable[tuple[Copy, int]], size: int) -> tuple[tuple[Copy, ...], tuple[int, ...]]:
    """Orders copies by the other end's rank; the sort is stable, so both ends see one order."""
    ordered = sorted(copies, key=lambda entry: entry[1])
    splits = [0] * size
    for copy, peer in ordered:
        splits[peer] += copy.numel
    return tuple(copy for copy, _ in ordered), tuple(splits)


class Exchange:
    """Moves gradients along a plan, through buffers that live as long as it does.

    One round trip is `to_owners`, `assembled`, `to_shards`, `delivered`, in this order.

    Args:
        comm: The ranks of the layout.
        plan: This rank's plan; every rank's comes from the same layout and the same parts.
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
        self._shards = torch.zeros(sum(plan.shard_splits), dtype=wire_dtype, device=device)
        self._pieces = torch.zeros(sum(plan.piece_splits), dtype=wire_dtype, device=device)
        self._full = {name: torch.zeros(shape, device=device) for name, shape in plan.owned.items()}
        self._in_shards = torch.split(self._shards, [copy.numel for copy in plan.shards]) if plan.shards else ()
        self._in_pieces = torch.split(self._pieces, [copy.numel for copy in plan.pieces]) if plan.pieces else ()
        self._work: Work | None = None

    def to_owners(self, local: Mapping[str, Tensor]) -> None:
        """Starts to bring every part's shards to its owner; collective.

        Args:
            local: Parameter to this rank's slice of its gradient: 1-D, any floating dtype. One that is missing counts
                as zero; more parameters than the plan has are ignored.
        """
        views = self._views(local)
        absent = [target for target, view in zip(self._in_shards, views, strict=True) if view is None]
        if absent:
            torch._foreach_zero_(absent)
        _copy_all(self._in_shards, views)
        self._work = self._comm.all_to_all(
            self._pieces, self._shards, self.plan.piece_splits, self.plan.shard_splits, label=self._label
        )

    def assembled(self) -> dict[str, Tensor]:
        """Waits, and returns the full fp32 gradients of the parts that this rank owns: buffers, used again."""
        self._wait()
        _copy_all(self._places(self._full), self._in_pieces)
        return dict(self._full)

    def to_shards(self, updated: Mapping[str, Tensor]) -> None:
        """Starts to take owners' results back; collective.

        Args:
            updated: The parts that this rank owns, shaped as `assembled` returned them, or those very tensors.
        """
        _copy_all(self._in_pieces, self._places(updated))
        self._work = self._comm.all_to_all(
            self._shards, self._pieces, self.plan.shard_splits, self.plan.piece_splits, label=self._label
        )

    def delivered(self, local: Mapping[str, Tensor], scale: Tensor | None = None) -> None:
        """Waits, and writes what came back into the slices, in place.

        Args:
            local: What `to_owners` was given.
            scale: 0-dim factor for all of it.
        """
        self._wait()
        if scale is not None and self._in_shards:
            self._shards.mul_(scale)
        _copy_all(self._views(local), self._in_shards)

    def _wait(self) -> None:
        assert self._work is not None, "nothing is on its way"
        self._work.wait()
        self._work = None

    def _views(self, local: Mapping[str, Tensor]) -> list[Tensor | None]:
        views: list[Tensor | None] = []
        for copy in self.plan.shards:
            held = local.get(copy.parameter)
            if held is not None and (held.ndim != 1 or held.numel() < copy.local + copy.numel):
                raise ValueError(
                    f"{copy.parameter}: rank {copy.holder} holds {copy.local + copy.numel} elements or more of it, "
                    f"but its gradient has shape {tuple(held.shape)}"
                )
            views.append(None if held is None else held[copy.local : copy.local + copy.numel])
        return views

    def _places(self, full: Mapping[str, Tensor]) -> list[Tensor]:
        flat = {name: full[name].reshape(-1) for name in self.plan.owned}
        return [flat[copy.part][copy.offset : copy.offset + copy.numel] for copy in self.plan.pieces]


def _copy_all(targets: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> None:
    """Copies pairwise where both are there, converting dtypes, in one launch on a GPU."""
    pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if t is not None and s is not None]
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
