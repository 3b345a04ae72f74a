"""Preconditioning: blocks of equal shape are one batch, and the caller doesn't know which solver made the inverses.

A `Group` stacks the payloads of k like blocks, so that each side of `G⁻¹ ∇ A⁻¹` is one batched product. Before its
first refresh a block's payload is the identity: it keeps the plain gradient, exactly, for any solver and λ. So
does a block of which one factor was never measured, such as a layer that is called but has no part in the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kfac_dist.config.schema import Solver
from kfac_dist.curvature.blocks import Block
from kfac_dist.curvature.ekfac import level
from kfac_dist.curvature.factors import Side, Unit
from kfac_dist.curvature.inverses.payloads import Payloads, stored_bytes
from kfac_dist.curvature.inverses.solvers import is_eigen


class Group(Payloads, ABC):
    """Blocks of one shape with their payloads; see `Payloads`.

    Attributes:
        gradient: `[k·batch, d_out, d_in]` workspace that the caller fills with the blocks' gradients.
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
        super().__init__(blocks, units, solver, device, dtype, working)
        batch, d_out, d_in = blocks[0].matrix_shape
        self.gradient = torch.zeros(len(blocks) * batch, d_out, d_in, device=device, dtype=working)
        self._dtype = dtype

    def matrix(self, buffer: Tensor, index: int) -> Tensor:
        """Return block `index`'s matrix `[batch, d_out, d_in]` in a buffer shaped like `gradient`."""
        return buffer[self._rows(index)]

    @abstractmethod
    def apply(self, gradient: Tensor, damping: float) -> Tensor:
        """Return the product of the damped inverse with a tensor shaped like `gradient`, a new tensor."""


class InverseGroup(Group):
    """Damped inverses: `Δ = G⁻¹ ∇ A⁻¹`, or `∇ F⁻¹` a unit."""

    def apply(self, gradient: Tensor, damping: float) -> Tensor:
        """See `Group.apply`; the damping is part of the inverses."""
        gradient = gradient.to(self._dtype)
        right = self.sides[Side.A] if Side.A in self.sides else self.sides[Side.F]
        if right.diagonal:
            gradient = (gradient * right.vectors()[:, None, :]).to(gradient.dtype)
        else:
            gradient = right.right(gradient)
        return (self.sides[Side.G].left(gradient) if Side.G in self.sides else gradient).to(self.working)


class EigenGroup(Group):
    """Exact damping: `Δ = Q_G [(Q_Gᵀ ∇ Q_A) / (d_G d_Aᵀ + λ)] Q_Aᵀ`; Q is block-diagonal when factors are cut."""

    def apply(self, gradient: Tensor, damping: float) -> Tensor:
        """See `Group.apply`."""
        a, g = self.sides[Side.A], self.sides.get(Side.G)
        dtype = gradient.dtype if a.diagonal and g is None else self._dtype
        rotated = a.right(gradient.to(dtype))
        rotated = rotated if g is None else g.left(rotated, transposed=True)
        rotated = (rotated / (self._curvature() + damping * self._known())).to(dtype)
        rotated = a.right(rotated, transposed=True)
        return (rotated if g is None else g.left(rotated)).to(self.working)

    def multiply(self, gradient: Tensor, scales: Mapping[Side, Callable[[Tensor], Tensor]]) -> Tensor:
        """Return `f(G) ∇ f(A)`, a function of eigenvalues for each side; sides that have none stay as they are.

        Args:
            gradient: `[k·batch, d_out, d_in]`.
            scales: By side: eigenvalues `[k·batch, n]` to the function's; `UNKNOWN` ones are negative.
        """
        for side, function in scales.items():
            own = self.sides.get(side)
            if own is None:
                continue
            values = function(own.vectors()).to(self.working)
            rotate = own.right if side is Side.A else own.left
            forth, back = (False, True) if side is Side.A else (True, False)
            rotated = rotate(gradient.to(gradient.dtype if own.diagonal else self._dtype), transposed=forth)
            rotated = rotated * (values[:, None, :] if side is Side.A else values[:, :, None]).to(rotated.dtype)
            gradient = rotate(rotated, transposed=back).to(self.working)
        return gradient

    def _curvature(self) -> Tensor:
        """Return the diagonal of the Fisher in the eigenbasis, `[k·batch, d_out, d_in]` or a shape that broadcasts."""
        d_a = self.sides[Side.A].vectors()[:, None, :]
        if Side.G not in self.sides:
            return d_a.abs()
        return self.sides[Side.G].vectors()[:, :, None] * d_a  # of two unknown sides: 1

    def _known(self) -> Tensor:
        """Return, of each matrix `[k·batch, 1, 1]`, 1 if its eigenvalues are known, else 0."""
        first = self.sides[Side.A].pieces[0].vector
        assert first is not None
        return (first[:, :1, None] >= 0).to(first.dtype)


class RescaledGroup(EigenGroup):
    """EKFAC (George et al. 2018): `Δ = Q_G [(Q_Gᵀ ∇ Q_A) / (S + λ)] Q_Aᵀ` with S measured in the basis."""

    def __init__(
        self,
        blocks: Sequence[Block],
        units: Sequence[Sequence[Unit]],
        solver: Solver,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        working: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(blocks, units, solver, device, dtype, working)
        self._moments = torch.ones_like(self.gradient)

    def rescale(self, block: str, moments: Tensor, known: Tensor) -> None:
        """Take S of a block.

        Args:
            block: Its name.
            moments: S, as many values as the block's gradient.
            known: 0-dim bool: whether it has been measured; if not, the block has K-FAC's own `d_G d_Aᵀ`.
        """
        own = self.moments(block)
        d_a, d_g = self.eigenvalues(block, Side.A), self.eigenvalues(block, Side.G)
        measured = level(moments.view_as(own), d_a, d_g)
        known = known & (d_a[:, :1, None] >= 0)  # else the product of two unknown sides, which is 1
        torch.where(known, measured, d_g[:, :, None] * d_a[:, None, :], out=own)

    def moments(self, block: str) -> Tensor:
        """Return S of a block as it is used, a view `[batch, d_out, d_in]`."""
        return self._moments[self._rows(self._index[block])]

    def _curvature(self) -> Tensor:
        return self._moments


def build_groups(
    blocks: Sequence[Block],
    units: dict[str, tuple[Unit, ...]],
    solver: Solver,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    largest: int | None = None,
    working: torch.dtype = torch.float32,
) -> list[Group]:
    """Return groups of blocks that share one batched product, in order of first appearance.

    Args:
        blocks: The blocks.
        units: The units of each.
        solver: The solver of the payloads.
        device: The groups' device.
        dtype: Precision of matrices.
        largest: Bytes of payloads above which a group is cut in several; by default none is.
        working: Precision of everything else.
    """
    alike: dict[tuple[object, ...], list[Block]] = {}
    for block in blocks:
        shape = tuple((u.side, u.start, u.stop, u.first, u.batch, u.kind) for u in units[block.name])
        alike.setdefault((block.matrix_shape, shape, block.per_sample), []).append(block)
    groups: list[Group] = []
    for members in [
        part
        for like in alike.values()
        for part in _cut(like, units, solver, (dtype.itemsize, working.itemsize), largest)
    ]:
        own = [units[block.name] for block in members]
        groups.append(_kind(members[0], own[0], solver)(members, own, solver, device, dtype, working))
    return groups


def _cut(
    like: list[Block],
    units: dict[str, tuple[Unit, ...]],
    solver: Solver,
    itemsizes: tuple[int, int],
    largest: int | None,
) -> list[list[Block]]:
    each = sum(stored_bytes(units[like[0].name], solver, *itemsizes))
    count = group_size(len(like), each, largest)
    return [like[first : first + count] for first in range(0, len(like), count)]


def group_size(blocks: int, each: int, largest: int | None) -> int:
    """Return how many of like blocks are in one group, each with payloads of `each` bytes."""
    return blocks if largest is None else max(1, min(blocks, largest // max(1, each)))


def _kind(block: Block, units: Sequence[Unit], solver: Solver) -> type[InverseGroup | EigenGroup]:
    if rescales(block, units, solver):
        return RescaledGroup
    return EigenGroup if any(is_eigen(unit, solver) for unit in units) else InverseGroup


def rescales(block: Block, units: Sequence[Unit], solver: Solver) -> bool:
    """Whether a block's eigenvalues are replaced by second moments of its per-sample gradients (EKFAC)."""
    return solver is Solver.EKFAC and block.per_sample and {unit.side for unit in units} == {Side.A, Side.G}
