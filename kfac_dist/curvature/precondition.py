"""Preconditioning: blocks of equal shape are one batch, and the caller doesn't know which solver made the inverses.

A `Group` stacks the payloads of k like blocks, so that each side of `G⁻¹ ∇ A⁻¹` is one batched product. Before its
first refresh a block's payload is the identity: it keeps the plain gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfac_dist.config.schema import Solver
from kfac_dist.curvature.blocks import Block
from kfac_dist.curvature.factors import FactorKind, Side, Unit
from kfac_dist.curvature.solvers import is_eigen, payload_numel

if TYPE_CHECKING:
    from kfac_dist.curvature.offload import Offload


@dataclass
class Piece:
    """One diagonal block of one side, for all blocks of a group: `matrix [k·batch, n, n]`, `vector [k·batch, n]`."""

    start: int
    stop: int
    matrix: Tensor | None
    vector: Tensor | None


class Group(ABC):
    """Blocks of one shape with their payloads.

    Args:
        blocks: k blocks of equal `matrix_shape` and factors.
        units: The units of each block, alike in everything but their names.
        solver: What made the payloads.
        device: Where they live.
        dtype: Precision in which matrices are kept and multiplied; vectors and sums are fp32.

    Attributes:
        gradient: `[k·batch, d_out, d_in]` workspace that the caller fills with the blocks' gradients.
        home: Keeps the payloads elsewhere between uses, if anybody does.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        units: Sequence[Sequence[Unit]],
        solver: Solver,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.blocks = tuple(blocks)
        self.units = tuple(unit for own in units for unit in own)
        batch, d_out, d_in = blocks[0].matrix_shape
        self.gradient = torch.zeros(len(blocks) * batch, d_out, d_in, device=device)
        self.home: Offload | None = None
        self._batch = batch
        self._dtype = dtype
        self._place: dict[str, tuple[Piece, slice]] = {}
        self._sides: dict[Side, list[Piece]] = {}
        for like in zip(*units, strict=True):
            piece = _allocate(like[0], len(blocks), solver, device, dtype)
            self._sides.setdefault(like[0].side, []).append(piece)
            for index, unit in enumerate(like):
                self._place[unit.name] = (piece, slice(index * unit.batch, (index + 1) * unit.batch))

    @property
    def pieces(self) -> list[Piece]:
        """Everything that the payloads are stored in."""
        return [piece for own in self._sides.values() for piece in own]

    def matrix(self, buffer: Tensor, index: int) -> Tensor:
        """Return block `index`'s matrix `[batch, d_out, d_in]` in a buffer shaped like `gradient`."""
        return buffer[index * self._batch : (index + 1) * self._batch]

    def load(self, unit: Unit, payload: Tensor) -> None:
        """Take a unit's flat payload."""
        piece, rows = self._place[unit.name]
        if piece.matrix is None:
            assert piece.vector is not None
            self._put(piece.vector[rows], payload.view(unit.shape))
            return
        self._put(piece.matrix[rows], payload[: unit.numel].view(unit.shape))
        if piece.vector is not None:
            self._put(piece.vector[rows], payload[unit.numel :].view(unit.batch, unit.dim))

    def _put(self, place: Tensor, values: Tensor) -> None:
        if self.home is None:
            place.copy_(values)
        else:
            self.home.put(place, values.to(place.dtype))

    def payload(self, unit: Unit) -> Tensor:
        """Return a unit's flat fp32 payload; a view where there is one, so that looking costs nothing."""
        piece, rows = self._place[unit.name]
        if self.home is not None:
            self.home.settle()
        device = self.gradient.device
        parts = [part[rows].flatten().to(device).float() for part in (piece.matrix, piece.vector) if part is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @abstractmethod
    def apply(self, damping: float) -> Tensor:
        """Return the preconditioned `gradient`, a new tensor of its shape."""


class InverseGroup(Group):
    """Damped inverses: `Δ = G⁻¹ ∇ A⁻¹`, or `∇ F⁻¹` a unit."""

    def __init__(
        self,
        blocks: Sequence[Block],
        units: Sequence[Sequence[Unit]],
        solver: Solver,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(blocks, units, solver, device, dtype)
        self._right = self._sides.get(Side.A) or self._sides[Side.F]
        self._left = self._sides.get(Side.G, [])

    def apply(self, damping: float) -> Tensor:
        """See `Group.apply`; the damping is part of the inverses."""
        return _multiply_left(self._left, _multiply_right(self.gradient.to(self._dtype), self._right)).float()


class EigenGroup(Group):
    """Exact damping: `Δ = Q_G [(Q_Gᵀ ∇ Q_A) / (d_G d_Aᵀ + λ)] Q_Aᵀ`, tile by tile when factors are cut."""

    def apply(self, damping: float) -> Tensor:
        """See `Group.apply`."""
        out = torch.empty_like(self.gradient)
        whole = [Piece(0, self.gradient.shape[1], None, None)]
        for g in self._sides.get(Side.G, whole):
            for a in self._sides[Side.A]:
                tile = self.gradient[:, g.start : g.stop, a.start : a.stop]
                out[:, g.start : g.stop, a.start : a.stop] = _damped_tile(tile, g, a, damping)
        return out


def _damped_tile(tile: Tensor, g: Piece, a: Piece, damping: float) -> Tensor:
    dtype = next((piece.matrix.dtype for piece in (g, a) if piece.matrix is not None), tile.dtype)
    tile = tile.to(dtype)
    if g.matrix is not None:
        tile = g.matrix.mT @ tile
    if a.matrix is not None:
        tile = tile @ a.matrix
    assert a.vector is not None
    d_a = a.vector[:, None, :]
    tile = (tile / ((d_a if g.vector is None else g.vector[:, :, None] * d_a) + damping)).to(dtype)
    if g.matrix is not None:
        tile = g.matrix @ tile
    return tile if a.matrix is None else tile @ a.matrix.mT


def _multiply_right(gradient: Tensor, pieces: Sequence[Piece]) -> Tensor:
    if len(pieces) == 1:
        matrix, vector = pieces[0].matrix, pieces[0].vector
        if vector is not None:
            return (gradient * vector[:, None, :]).to(gradient.dtype)
        return torch.bmm(gradient, _dense(matrix))
    out = torch.empty_like(gradient)
    for piece in pieces:
        out[:, :, piece.start : piece.stop] = torch.bmm(gradient[:, :, piece.start : piece.stop], _dense(piece.matrix))
    return out


def _multiply_left(pieces: Sequence[Piece], gradient: Tensor) -> Tensor:
    if not pieces:
        return gradient
    if len(pieces) == 1:
        return torch.bmm(_dense(pieces[0].matrix), gradient)
    return torch.cat([torch.bmm(_dense(p.matrix), gradient[:, p.start : p.stop]) for p in pieces], dim=1)


def _dense(matrix: Tensor | None) -> Tensor:
    assert matrix is not None
    return matrix


def _allocate(unit: Unit, blocks: int, solver: Solver, device: torch.device, dtype: torch.dtype) -> Piece:
    """Return identity payloads for one unit of each block of a group."""
    rows = blocks * unit.batch
    matrix = vector = None
    if unit.kind is FactorKind.DENSE:
        matrix = torch.eye(unit.dim, device=device, dtype=dtype).expand(rows, -1, -1).clone()
    if unit.kind is FactorKind.DIAGONAL or payload_numel(unit, solver) > unit.numel:
        vector = torch.ones(rows, unit.dim, device=device)
    return Piece(unit.start, unit.stop, matrix, vector)


def stored_bytes(unit: Unit, solver: Solver, itemsize: int) -> tuple[int, ...]:
    """Return the bytes of a unit's payload as a group stores them: its matrices', its vectors'.

    Args:
        unit: The unit.
        solver: What makes the payload.
        itemsize: Bytes of a matrix's value; vectors are fp32.
    """
    vectors = payload_numel(unit, solver) - (unit.numel if unit.kind is FactorKind.DENSE else 0)
    matrices = itemsize * unit.numel if unit.kind is FactorKind.DENSE else 0
    return tuple(size for size in (matrices, 4 * vectors) if size)


def build_groups(
    blocks: Sequence[Block],
    units: dict[str, tuple[Unit, ...]],
    solver: Solver,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    largest: int | None = None,
) -> list[Group]:
    """Return groups of blocks that share one batched product, in order of first appearance.

    Args:
        blocks: The blocks.
        units: The units of each.
        solver: What makes the payloads.
        device: Where the groups live.
        dtype: Precision of matrices.
        largest: Bytes of payloads above which a group is cut in several; by default none is.
    """
    alike: dict[tuple[object, ...], list[Block]] = {}
    for block in blocks:
        shape = tuple((u.side, u.start, u.stop, u.batch, u.kind) for u in units[block.name])
        alike.setdefault((block.matrix_shape, shape), []).append(block)
    groups: list[Group] = []
    for members in [part for like in alike.values() for part in _cut(like, units, solver, dtype, largest)]:
        own = [units[block.name] for block in members]
        kind = EigenGroup if any(is_eigen(unit, solver) for unit in own[0]) else InverseGroup
        groups.append(kind(members, own, solver, device, dtype))
    return groups


def _cut(
    like: list[Block], units: dict[str, tuple[Unit, ...]], solver: Solver, dtype: torch.dtype, largest: int | None
) -> list[list[Block]]:
    each = sum(sum(stored_bytes(unit, solver, dtype.itemsize)) for unit in units[like[0].name])
    count = group_size(len(like), each, largest)
    return [like[first : first + count] for first in range(0, len(like), count)]


def group_size(blocks: int, each: int, largest: int | None) -> int:
    """Return how many of like blocks are in one group, each with payloads of `each` bytes."""
    return blocks if largest is None else max(1, min(blocks, largest // max(1, each)))
