"""Chains of linear layers: their detection, the moments between neighbours, and preconditioning.

    linear1 ── tanh ── linear2 ── linear3 ── tanh ── linear4          each layer feeds the next one alone

A chain's layers measure, besides A and G, the moments E[a_i a_{i+1}ᵀ] and E[ĝ_i ĝ_{i+1}ᵀ] with the layer that follows:
factors of their own, reduced and averaged like all others. The mathematics is in `tridiagonal`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from kfac_dist.config.schema import Direction, KFACConfig, Structure
from kfac_dist.curvature.block_tridiagonal import ChainLink, apply_inverse
from kfac_dist.curvature.blocks import Block, Coverage, LayerCall, MicroBatch, find_blocks
from kfac_dist.curvature.blocks.base import KroneckerBlock, StatisticsSink
from kfac_dist.curvature.blocks.layers.linear import LinearBlock
from kfac_dist.curvature.blocks.rows import sample, shared_rows, unscale
from kfac_dist.curvature.blocks.weight_matrices import WeightMatrices
from kfac_dist.curvature.factors import FactorKind, FactorSpec, Side, Unit
from kfac_dist.curvature.inverses.precondition import Group
from kfac_dist.errors import ModelError
from kfac_dist.precision import widened

NEXT = {Side.A: Side.A_NEXT, Side.G: Side.G_NEXT}

# Modules allowed between two layers of a chain: each output depends on the input at the same index.
ELEMENTWISE = (
    nn.Dropout,
    nn.ELU,
    nn.GELU,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.ReLU,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
)


def find_all(model: nn.Module, config: KFACConfig) -> Coverage:
    """Return the model's blocks with all the factors that a configuration measures.

    Raises:
        ModelError: The model is no chain, though the inverse is to be that of one.
    """
    orthogonal = config.update.orthogonal_options if config.update.direction is Direction.ORTHOGONAL else None
    matrices = None if orthogonal is None else WeightMatrices(orthogonal.exclude, orthogonal.head)
    coverage = find_blocks(model, config.curvature, matrices)
    if config.inversion.structure is Structure.BLOCK_TRIDIAGONAL:
        link_chain(model, coverage)
    return coverage


def link_chain(model: nn.Module, coverage: Coverage) -> None:
    """Give each of a chain's blocks, in place, its moments with the block that follows.

    Raises:
        ModelError: The model is no chain, naming the layer that breaks it.
    """
    chain = _chain_of(model, coverage)
    for block, following in pairwise(chain):
        shapes = {spec.side: spec.dim for spec in following.factors}
        crossed = tuple(
            FactorSpec(NEXT[spec.side], spec.dim, kind=FactorKind.CROSS, columns=shapes[spec.side])
            for spec in block.factors
        )
        block.factors = (*block.factors, *crossed)


def _chain_of(model: nn.Module, coverage: Coverage) -> list[LinearBlock]:
    blocks = {block.name: block for block in coverage.blocks}
    chain: list[LinearBlock] = []
    for name, layer in _layers(model, ""):
        if isinstance(layer, ELEMENTWISE) or (isinstance(layer, nn.Flatten) and not chain):
            continue
        block = blocks.pop(name, None)
        if not isinstance(layer, nn.Linear) or not isinstance(block, LinearBlock) or len(block.modules) > 1:
            what = coverage.uncovered.get(f"{name}.weight", "") or "it is no linear layer of its own"
            raise _no_chain(f"layer {name or 'of the model'} ({type(layer).__name__}) breaks it: {what}")
        chain.append(block)
    if not chain or blocks:
        raise _no_chain("it has no linear layers" if not chain else f"layer {next(iter(blocks))} stands beside it")
    return chain


def _layers(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of an `nn.Sequential` in order, through nested ones."""
    if not isinstance(module, nn.Sequential):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _layers(child, f"{prefix}.{name}" if prefix else name)


def _no_chain(why: str) -> ModelError:
    return ModelError(
        "kfac.inversion.structure block_tridiagonal needs a chain, an nn.Sequential of linear layers with elementwise "
        f"activations between them, and {why}; set kfac.inversion.structure to block_diagonal"
    )


class NeighbourMoments:
    """Measures the moments of neighbouring layers.

    A layer's rows are kept until its neighbours have been measured in the same pass, so that backward holds those of
    one more layer.

    Args:
        blocks: All blocks of a model; those of a chain in its order. Others measure nothing here.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = {block.name: block for block in blocks}
        self._pairs = [
            (block.name, following.name)
            for block, following in pairwise(blocks)
            if any(spec.kind is FactorKind.CROSS for spec in block.factors)
        ]
        self._rows: dict[tuple[Side, str], tuple[Tensor, float, float | Tensor]] = {}
        self._done: dict[Side, set[tuple[str, str]]] = {Side.A: set(), Side.G: set()}

    def reset(self) -> None:
        """Forget the state of a pass."""
        self._rows.clear()
        for done in self._done.values():
            done.clear()

    def measure(
        self, block: Block, calls: Sequence[LayerCall], batch: MicroBatch, sink: StatisticsSink, sides: frozenset[Side]
    ) -> None:
        """Add a block's joint moments with its neighbours, as far as those were measured in this pass.

        Raises:
            ModelError: The layer was called more than once.
        """
        if not any(block.name in pair for pair in self._pairs):
            return
        if len(calls) != 1 or not isinstance(block, KroneckerBlock):
            raise _no_chain(f"layer {block.name} is called {len(calls)} times in one pass")
        for side in sides & set(NEXT):
            rows = _input_rows(block, calls[0], batch) if side is Side.A else _output_rows(block, calls[0], batch)
            self._rows[side, block.name] = rows
            for pair in self._pairs:
                if block.name in pair and all((side, name) in self._rows for name in pair):
                    self._add(pair, side, sink)
            self._forget(side)

    def _add(self, pair: tuple[str, str], side: Side, sink: StatisticsSink) -> None:
        (own, scale, count), (following, other, _) = (self._rows[side, name] for name in pair)
        sink.add_values(pair[0], NEXT[side], (own.mT @ following * (scale * other))[None])
        sink.add_count(pair[0], NEXT[side], count)
        self._done[side].add(pair)

    def _forget(self, side: Side) -> None:
        """Let go of rows that no neighbour waits for; after the last pair, begin anew."""
        waited = {name for pair in self._pairs if pair not in self._done[side] for name in pair}
        self._rows = {key: rows for key, rows in self._rows.items() if key[0] is not side or key[1] in waited}
        if len(self._done[side]) == len(self._pairs):
            self._done[side].clear()


def _input_rows(block: KroneckerBlock, call: LayerCall, batch: MicroBatch) -> tuple[Tensor, float, float]:
    [rows] = shared_rows([block.use_rows(call, batch.batch_size)], block.sharing, mean=True)
    kept = widened(sample(rows, batch)[0])
    if block.has_bias:
        kept = torch.cat([kept, kept.new_ones(len(kept), 1)], dim=1)
    return kept, 1.0, float(len(kept))


def _output_rows(block: KroneckerBlock, call: LayerCall, batch: MicroBatch) -> tuple[Tensor, float, float | Tensor]:
    assert call.grad is not None
    whole = block.output_rows(call.grad, batch.batch_size)
    [rows] = shared_rows([whole], block.sharing, mean=False)
    kept = sample(rows, batch)
    scaled, factor = unscale(kept, batch)
    return widened(scaled[0]), factor, batch.terms * (kept.shape[1] / max(rows.shape[1], 1))


class ChainGroup(Group):
    """All blocks of a chain, preconditioned together by the block-tridiagonal inverse.

    Payloads: K and s of A and G; Ψ of the moments with the layer that follows.

    Args:
        blocks: The blocks in the chain's order.
        units: The units of each.
        device: Their device.
        working: Precision of everything.

    Attributes:
        gradient: Flat workspace of all blocks' gradient matrices, one after the other.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        units: Sequence[Sequence[Unit]],
        device: torch.device,
        working: torch.dtype = torch.float32,
    ) -> None:
        self.working = working
        self.blocks = tuple(blocks)
        self.units = tuple(unit for own in units for unit in own)
        self._edges = [0, *accumulate(math.prod(block.matrix_shape) for block in blocks)]
        self.gradient = torch.zeros(self._edges[-1], device=device, dtype=working)
        self.home = None
        self._matrices: dict[tuple[str, Side], Tensor] = {}
        self._told: dict[tuple[str, Side], Tensor] = {}
        for unit in self.units:
            key = unit.block, unit.side
            if unit.kind is FactorKind.CROSS:
                self._matrices[key] = torch.zeros(unit.dim, unit.columns, device=device, dtype=working)
            else:
                self._matrices[key] = torch.eye(unit.dim, device=device, dtype=working)
                self._told[key] = torch.zeros(unit.dim, device=device, dtype=working)

    def matrix(self, buffer: Tensor, index: int) -> Tensor:
        """See `Group.matrix`."""
        return buffer[self._edges[index] : self._edges[index + 1]].view(self.blocks[index].matrix_shape)

    def load(self, unit: Unit, payload: Tensor) -> None:
        """See `Group.load`."""
        key = unit.block, unit.side
        self._matrices[key].copy_(payload[: unit.numel].view(unit.shape[1:]))
        if key in self._told:
            self._told[key].copy_(payload[unit.numel :])

    def payload(self, unit: Unit) -> Tensor:
        """See `Group.payload`."""
        key = unit.block, unit.side
        flat = self._matrices[key].flatten()
        return torch.cat([flat, self._told[key]]) if key in self._told else flat

    def apply(self, gradient: Tensor, damping: float) -> Tensor:
        """See `Group.apply`; the damping is part of the payloads."""
        links = [
            ChainLink(
                self._matrices[name, Side.A],
                self._matrices[name, Side.G],
                self._told[name, Side.A],
                self._told[name, Side.G],
                self._matrices.get((name, Side.A_NEXT)),
                self._matrices.get((name, Side.G_NEXT)),
            )
            for name in (block.name for block in self.blocks)
        ]
        gradients = [self.matrix(gradient, index)[0] for index in range(len(self.blocks))]
        return torch.cat([update.flatten() for update in apply_inverse(links, gradients)])
