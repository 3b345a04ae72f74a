"""Factors and the units that they are cut into: names and shapes only.

A block has one or two *factors* (A and G of a Kronecker product, or one unit-wise F). A factor may be cut into diagonal
blocks, by named splits (heads, groups, sizes) and where it is larger than `max_factor_dim`, and each of those is a
*unit*: the smallest piece of work that is measured, reduced, inverted and shared on its own.

With statistics by class, a unit has as many sums as there are classes; inverted and shared is
still one factor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum


class FactorKind(StrEnum):
    """Storage of a factor."""

    DENSE = "dense"
    DIAGONAL = "diagonal"
    CROSS = "cross"


class Side(StrEnum):
    """Factors of a block: input side, output side, or the whole (unit-wise) block.

    In a chain of layers, also the moments of a side with the same side of the layer that follows. S is no factor:
    EKFAC's second moments in the eigenbasis of A and G.
    """

    A = "A"
    G = "G"
    F = "F"
    A_NEXT = "A_next"
    G_NEXT = "G_next"
    S = "S"


@dataclass(frozen=True)
class FactorSpec:
    """Shape of one factor: `batch` independent matrices (or diagonals) of size `dim`; `dim`×`columns` if crossed.

    Attributes:
        traced: Whether it is a partial trace of F, so that it is a mean over the loss's terms on either side.
    """

    side: Side
    dim: int
    batch: int = 1
    kind: FactorKind = FactorKind.DENSE
    columns: int = 0
    traced: bool = False


@dataclass(frozen=True)
class Unit:
    """Rows and columns `[start, stop)` of one factor of one block.

    Attributes:
        block: Name of the block.
        side: The factor of the block.
        index: Position among the diagonal blocks of that factor.
        start: First row of the factor that belongs to this unit.
        stop: Row after the last.
        batch: Independent matrices (groups, normalised units).
        kind: Dense, diagonal, or crossed with another layer's.
        classes: Classes whose statistics are kept apart; 0 if they aren't.
        columns: Columns of a crossed unit.
        first: The first of the factor's independent matrices that this unit has.
        traced: See `FactorSpec`.
    """

    block: str
    side: Side
    index: int
    start: int
    stop: int
    batch: int
    kind: FactorKind
    classes: int = 0
    columns: int = 0
    first: int = 0
    traced: bool = False

    @property
    def per_term(self) -> bool:
        """Whether the factor is a mean over the loss's terms; else it is one over the rows that the layer saw."""
        return self.traced or self.side not in (Side.A, Side.A_NEXT)

    @property
    def name(self) -> str:
        """Name that is unique in a model, e.g. `encoder.0/A/0`."""
        return f"{self.block}/{self.side}/{self.index}"

    @property
    def dim(self) -> int:
        """Size n of each matrix."""
        return self.stop - self.start

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the factor: `[batch, n, n]`, `[batch, n]` for a diagonal, `[batch, n, columns]` if crossed."""
        match self.kind:
            case FactorKind.DENSE:
                return (self.batch, self.dim, self.dim)
            case FactorKind.DIAGONAL:
                return (self.batch, self.dim)
            case FactorKind.CROSS:
                return (self.batch, self.dim, self.columns)

    @property
    def numel(self) -> int:
        """Number of the factor's values."""
        return math.prod(self.shape)

    @property
    def statistics(self) -> Unit:
        """The unit as its sums are stored: one after the other by class, as if each were a matrix of its own."""
        return replace(self, batch=self.batch * self.classes, classes=0) if self.classes else self

    @property
    def cost(self) -> float:
        """Inversion cost: n³ for each dense matrix (the other layer's, if crossed), n for a diagonal."""
        match self.kind:
            case FactorKind.DENSE:
                return float(self.batch * self.dim**3)
            case FactorKind.DIAGONAL:
                return float(self.batch * self.dim)
            case FactorKind.CROSS:
                return float(self.batch * self.columns**3)


@dataclass(frozen=True)
class Heads:
    """A layer's part in attention's heads.

    Attributes:
        side: G where it makes them, A where it reads them.
        fused: Whether it makes queries, keys and values at once.
        dim: Width of one head; None where the model doesn't say.
    """

    side: Side
    fused: bool
    dim: int | None


@dataclass(frozen=True)
class Cuts:
    """Cuts of a block's factors, besides those by `max_factor_dim`.

    Attributes:
        sizes: Sizes of the diagonal blocks of a side's factor; a side that isn't named is whole.
        groups: Whether each of a factor's independent matrices is a unit of its own.
    """

    sizes: Mapping[Side, tuple[int, ...]] = field(default_factory=dict)
    groups: bool = False


def equal_parts(dim: int, parts: int) -> tuple[int, ...]:
    """Return the sizes of near-equal parts."""
    edges = [dim * i // parts for i in range(parts + 1)]
    return tuple(b - a for a, b in itertools.pairwise(edges))


def cut(dim: int, max_dim: int | None, sizes: tuple[int, ...] | None = None) -> tuple[tuple[int, int], ...]:
    """Return the ranges of the diagonal blocks: of the given sizes, larger ones in near-equal parts of ≤ `max_dim`."""
    parts = [
        part
        for size in (sizes or (dim,))
        for part in (equal_parts(size, 1 if max_dim is None else -(-size // max_dim)))
    ]
    return tuple(itertools.pairwise((0, *itertools.accumulate(parts))))


def units_of(
    block: str, factors: tuple[FactorSpec, ...], max_dim: int | None, classes: int = 0, cuts: Cuts | None = None
) -> tuple[Unit, ...]:
    """Return the units of a block, in the order of its factors; only dense ones are cut."""
    cuts = cuts or Cuts()
    return tuple(
        Unit(block, factor.side, index, start, stop, size, factor.kind, classes, factor.columns, first, factor.traced)
        for factor in factors
        for index, (first, size, (start, stop)) in enumerate(_places(factor, max_dim, cuts))
    )


def _places(factor: FactorSpec, max_dim: int | None, cuts: Cuts) -> list[tuple[int, int, tuple[int, int]]]:
    """Return first matrix, number of matrices and range of each unit."""
    if factor.kind is not FactorKind.DENSE:
        return [(0, factor.batch, (0, factor.dim))]
    lanes = [(lane, 1) for lane in range(factor.batch)] if cuts.groups else [(0, factor.batch)]
    ranges = cut(factor.dim, max_dim, cuts.sizes.get(factor.side))
    return [(first, size, place) for first, size in lanes for place in ranges]
