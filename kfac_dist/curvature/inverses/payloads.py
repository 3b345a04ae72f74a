"""The results of refreshes in the memory that preconditioning reads: payloads of like blocks, side by side.

    side A of k blocks    one piece for each diagonal block that it is cut into, or for p equal ones together
                          matrix  [k·batch, n, n]; equal ones (heads) are one [k·batch, p, n, n]
                          vector  [k·batch, n], of eigenvalues or a diagonal

Before its first refresh a payload is the identity; where it is an eigendecomposition, its eigenvalues are `UNKNOWN`, so
that no damping is added to factors that were never measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kfac_dist.config.schema import Solver
from kfac_dist.curvature.blocks import Block
from kfac_dist.curvature.factors import FactorKind, Side, Unit
from kfac_dist.curvature.inverses.solvers import is_eigen, payload_numel

UNKNOWN = -1.0
"""The eigenvalues of a factor that was never solved; those of one that was are never negative."""


@dataclass
class Piece:
    """One tensor's share of one side, for all blocks; offloading moves it to the host and back.

    Attributes:
        start: First row of the factor.
        stop: Row after the last.
        matrix: `[k·batch, n, n]`, or `[k·batch, p, n, n]` for p equal diagonal blocks; None for a diagonal.
        vector: `[k·batch, stop − start]`, if there is one.
    """

    start: int
    stop: int
    matrix: Tensor | None
    vector: Tensor | None


def pieces_of(units: Sequence[Unit]) -> list[list[Unit]]:
    """Return a block's units by the piece that holds them: equal diagonal blocks of a side, and groups, together."""
    found = []
    for _, own in itertools.groupby(units, key=lambda unit: unit.side):
        side = list(own)
        ranges = dict.fromkeys((unit.start, unit.stop) for unit in side)
        if len(ranges) > 1 and len({stop - start for start, stop in ranges}) == 1:
            found.append(side)
        else:
            found += [[unit for unit in side if (unit.start, unit.stop) == place] for place in ranges]
    return found


def stored_bytes(units: Sequence[Unit], solver: Solver, itemsize: int, working: int = 4) -> list[int]:
    """Return the bytes of each tensor that a block's payloads are stored in: a piece's matrices, its vectors.

    Args:
        units: The block's units.
        solver: The solver of the payloads.
        itemsize: Bytes of a matrix's value.
        working: Bytes of a vector's.
    """
    sizes = []
    for piece in pieces_of(units):
        dense = sum(unit.numel for unit in piece if unit.kind is FactorKind.DENSE)
        sizes += [itemsize * dense, working * (sum(payload_numel(unit, solver) for unit in piece) - dense)]
    return [size for size in sizes if size]


class BlockDiagonal:
    """One side of k like blocks: its pieces, and products with all of them.

    Args:
        units: The side's units in one of the blocks.
        rows: k times the independent matrices of a block.
        solver: The solver of the payloads.
        device: Their device.
        dtype: Of the matrices.
        working: Of the vectors.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        rows: int,
        solver: Solver,
        device: torch.device,
        dtype: torch.dtype,
        working: torch.dtype,
    ) -> None:
        self.pieces: list[Piece] = []
        self._places: dict[tuple[int, int], tuple[Piece, int | None]] = {}
        for own in pieces_of(units):
            ranges = list(dict.fromkeys((unit.start, unit.stop) for unit in own))
            start, stop, unit = ranges[0][0], ranges[-1][1], own[0]
            matrix = vector = None
            if unit.kind is FactorKind.DENSE:
                lead = (rows,) if len(ranges) == 1 else (rows, len(ranges))
                matrix = torch.eye(unit.dim, device=device, dtype=dtype).expand(*lead, -1, -1).clone()
            if unit.kind is FactorKind.DIAGONAL or payload_numel(unit, solver) > unit.numel:
                first = UNKNOWN if is_eigen(unit, solver) else 1.0
                vector = torch.full((rows, stop - start), first, device=device, dtype=working)
            piece = Piece(start, stop, matrix, vector)
            self.pieces.append(piece)
            for index, place in enumerate(ranges):
                self._places[place] = (piece, index if len(ranges) > 1 else None)

    def place(self, unit: Unit, rows: slice) -> tuple[Tensor | None, Tensor | None]:
        """Return where a unit's matrices and vectors are kept."""
        piece, index = self._places[unit.start, unit.stop]
        matrix = None if piece.matrix is None else piece.matrix[rows]
        if matrix is not None and index is not None:
            matrix = matrix[:, index]
        first = unit.start - piece.start
        return matrix, None if piece.vector is None else piece.vector[rows, first : first + unit.dim]

    @property
    def diagonal(self) -> bool:
        """Whether there are vectors alone."""
        return self.pieces[0].matrix is None

    def vectors(self) -> Tensor:
        """Return eigenvalues, or the diagonal, `[k·batch, n]`."""
        parts = [piece.vector for piece in self.pieces if piece.vector is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def left(self, values: Tensor, *, transposed: bool = False) -> Tensor:
        """Return `M X` (or `Mᵀ X`) for X `[k·batch, n, m]`, in the matrices' precision."""
        if self.diagonal:
            return values
        parts = [_left(_matrix(p, transposed), values[:, p.start : p.stop]) for p in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def right(self, values: Tensor, *, transposed: bool = False) -> Tensor:
        """Return `X M` (or `X Mᵀ`) for X `[k·batch, m, n]`, in the matrices' precision."""
        if self.diagonal:
            return values
        parts = [_right(values[:, :, p.start : p.stop], _matrix(p, transposed)) for p in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def of(self, rows: slice) -> tuple[Tensor, ...]:
        """Return some blocks' matrices `[batch, n, n]`, diagonal block by diagonal block, as views."""
        found: list[Tensor] = []
        for piece in self.pieces:
            if piece.matrix is not None:
                own = piece.matrix[rows]
                found += [own] if own.ndim == 3 else own.unbind(1)
        return tuple(found)


class PayloadHome(Protocol):
    """The memory in which payloads stay between uses, where that isn't the device's; `offload` implements it."""

    def put(self, place: Tensor, values: Tensor) -> None:
        """Write values of the device to a place in that memory."""

    def settle(self) -> None:
        """Wait until the payloads of `put` have arrived."""


class Payloads:
    """The payloads of like blocks.

    Args:
        blocks: k blocks of equal `matrix_shape` and factors.
        units: The units of each block, alike in everything but their names.
        solver: The solver of the payloads.
        device: Their device.
        dtype: Precision in which matrices are kept and multiplied.
        working: That of everything else: vectors, gradients, payloads on their way.

    Attributes:
        blocks: The blocks.
        units: All their units.
        sides: The payloads, by side.
        working: Precision of gradients and of payloads on their way.
        home: The host memory in which the payloads stay between uses, or None.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        units: Sequence[Sequence[Unit]],
        solver: Solver,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        working: torch.dtype = torch.float32,
    ) -> None:
        self.working = working
        self.blocks = tuple(blocks)
        self.units = tuple(unit for own in units for unit in own)
        self.home: PayloadHome | None = None
        self._device = device
        self._index = {block.name: index for index, block in enumerate(blocks)}
        # A norm's F has one matrix a unit of the layer: as many as the gradient matrix has.
        self._batch = blocks[0].matrix_shape[0]
        self.sides = {
            side: BlockDiagonal(list(own), len(blocks) * self._batch, solver, device, dtype, working)
            for side, own in itertools.groupby(units[0], key=lambda unit: unit.side)
        }

    @property
    def pieces(self) -> list[Piece]:
        """Everything that the payloads are stored in."""
        return [piece for side in self.sides.values() for piece in side.pieces]

    def load(self, unit: Unit, payload: Tensor) -> None:
        """Take a unit's flat payload."""
        matrix, vector = self._place(unit)
        if matrix is None:
            assert vector is not None
            self._put(vector, payload.view(unit.shape))
            return
        self._put(matrix, payload[: unit.numel].view(unit.shape))
        if vector is not None:
            self._put(vector, payload[unit.numel :].view(unit.batch, unit.dim))

    def payload(self, unit: Unit) -> Tensor:
        """Return a unit's flat payload in the working precision; a view where there is one: looking costs nothing."""
        if self.home is not None:
            self.home.settle()
        parts = [part.flatten().to(self._device, self.working) for part in self._place(unit) if part is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def basis(self, block: str, side: Side) -> tuple[Tensor, ...]:
        """Return the matrices `[batch, n, n]` of one side of a block, diagonal block by diagonal block."""
        return self.sides[side].of(self._rows(self._index[block]))

    def eigenvalues(self, block: str, side: Side) -> Tensor:
        """Return the vectors of one side of a block, `[batch, n]`."""
        return self.sides[side].vectors()[self._rows(self._index[block])]

    def _place(self, unit: Unit) -> tuple[Tensor | None, Tensor | None]:
        first = self._index[unit.block] * self._batch + unit.first
        return self.sides[unit.side].place(unit, slice(first, first + unit.batch))

    def _put(self, place: Tensor, values: Tensor) -> None:
        if self.home is None:
            if values.data_ptr() != place.data_ptr():  # a unit that keeps its payload gets its own memory
                place.copy_(values)
        else:
            self.home.put(place, values.to(place.dtype))

    def _rows(self, index: int) -> slice:
        return slice(index * self._batch, (index + 1) * self._batch)


def _matrix(piece: Piece, transposed: bool) -> Tensor:
    assert piece.matrix is not None
    return piece.matrix.mT if transposed else piece.matrix


def _left(matrix: Tensor, values: Tensor) -> Tensor:
    if matrix.ndim == 3:
        return torch.bmm(matrix, values)
    return torch.matmul(matrix, values.unflatten(1, matrix.shape[1:3])).flatten(1, 2)


def _right(values: Tensor, matrix: Tensor) -> Tensor:
    if matrix.ndim == 3:
        return torch.bmm(values, matrix)
    parts = values.unflatten(2, matrix.shape[1:3]).transpose(1, 2)
    return torch.matmul(parts, matrix).transpose(1, 2).flatten(2, 3)
