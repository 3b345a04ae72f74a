"""Layouts of gradients: pure tables, the same on every rank, that engines make and the exchange reads.

replicated (DDP)     every rank holds all of it
rows (FSDP2)         rank r holds a run of rows: one slice of the flattened gradient
ranges (ZeRO)        rank r holds any 1-D range, cut anywhere, or nothing
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of a flattened parameter, held by `rank`."""

    rank: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True)
class ParameterSlices:
    """The ranks that hold the parts of one parameter's gradient.

    Attributes:
        name: The parameter's name.
        shape: Its full shape.
        slices: Its slices in ascending order, each non-empty and at most one a rank; None when every rank holds all.

    Raises:
        ValueError: The slices don't tile the flattened parameter, or a rank holds two.
    """

    name: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...] | None

    def __post_init__(self) -> None:
        if self.slices is None:
            return
        end = 0
        for piece in self.slices:
            if piece.start != end or piece.numel <= 0:
                raise ValueError(
                    f"{self.name}: {piece} does not begin at element {end}, where the slice before it ends"
                    if piece.start != end
                    else f"{self.name}: {piece} is empty"
                )
            end = piece.stop
        if end != self.numel:
            raise ValueError(f"{self.name}: its slices end at element {end} of {self.numel}")
        if len({piece.rank for piece in self.slices}) != len(self.slices):
            raise ValueError(f"{self.name}: a rank holds two slices; its gradient is one view")

    @classmethod
    def replicated(cls, name: str, shape: Iterable[int]) -> ParameterSlices:
        """A parameter whose gradient every rank holds in full."""
        return cls(name, tuple(shape), None)

    @classmethod
    def sharded(cls, name: str, shape: Iterable[int], slices: Iterable[Slice]) -> ParameterSlices:
        """A parameter cut into slices, given in any order; empty ones are dropped."""
        held = sorted((piece for piece in slices if piece.numel), key=lambda piece: piece.start)
        return cls(name, tuple(shape), tuple(held))

    @classmethod
    def rows(cls, name: str, shape: Iterable[int], size: int) -> ParameterSlices:
        """A parameter cut along its first dimension into ceil(rows / size) rows a rank, as `Shard(0)` does it."""
        full = tuple(shape)
        row = math.prod(full[1:])
        step = -(-full[0] // size)
        bounds = [min(rank * step, full[0]) * row for rank in range(size + 1)]
        return cls.sharded(name, full, (Slice(rank, bounds[rank], bounds[rank + 1]) for rank in range(size)))

    @property
    def numel(self) -> int:
        """Elements of the full parameter."""
        return math.prod(self.shape)

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds all of it."""
        return self.slices is None

    def held_by(self, rank: int) -> Slice | None:
        """Return a rank's share, or None if it has none."""
        if self.slices is None:
            return Slice(rank, 0, self.numel) if self.numel else None
        return next((piece for piece in self.slices if piece.rank == rank), None)


@dataclass(frozen=True)
class GradientLayout:
    """The gradients of all parameters over `size` ranks; the order of parameters is the same on every rank.

    Raises:
        ValueError: Two parameters share a name, or a slice belongs to no rank.
    """

    parameters: tuple[ParameterSlices, ...]
    size: int

    def __post_init__(self) -> None:
        if len(self._by_name) != len(self.parameters):
            raise ValueError("two parameters share a name")
        for parameter in self.parameters:
            for piece in parameter.slices or ():
                if not 0 <= piece.rank < self.size:
                    raise ValueError(f"{parameter.name}: {piece} belongs to none of {self.size} ranks")

    def __getitem__(self, name: str) -> ParameterSlices:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds every gradient in full."""
        return all(parameter.is_replicated for parameter in self.parameters)

    def held_by(self, rank: int) -> dict[str, Slice]:
        """Parameter name to a rank's slice of it; parameters without a slice on the rank are left out."""
        held = ((parameter.name, parameter.held_by(rank)) for parameter in self.parameters)
        return {name: piece for name, piece in held if piece is not None}

    @cached_property
    def _by_name(self) -> dict[str, ParameterSlices]:
        return {parameter.name: parameter for parameter in self.parameters}
