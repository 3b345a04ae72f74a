"""Coverage of weight matrices alone, whose biases, and whose embeddings and norms, have no block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import TypeVar

from kfac_dist.curvature.blocks.base import Block, KroneckerBlock
from kfac_dist.curvature.blocks.layers.tied import TiedBlock
from kfac_dist.curvature.factors import FactorKind

_Kind = TypeVar("_Kind", bound=type[Block])


@dataclass(frozen=True)
class WeightMatrices:
    """The choice of weight matrices among a model's blocks.

    Attributes:
        exclude: Patterns on blocks' names; those that match have none.
        last: Whether the model's last layer has one, too, where no embedding is tied to a head.
    """

    exclude: Sequence[str] = ()
    last: bool = False

    def split(self, blocks: Sequence[Block]) -> tuple[list[Block], dict[str, str]]:
        """Return the blocks that are weight matrices, and by parameter of others why they are none."""
        matrices = [block for block in blocks if _is_matrix(block)]
        tied = any(isinstance(block, TiedBlock) for block in blocks)
        end = None if tied or self.last or len(matrices) < 2 else matrices[-1]
        why = {block.name: self._against(block, end) for block in blocks}
        # Blocks of rows of one parameter are in or out together.
        out = {name: why[block.name] for block in blocks if why[block.name] for name in block.parameters}
        kept = [block for block in blocks if not any(name in out for name in block.parameters)]
        return kept, {name: out.get(name, reason) for name, reason in _left(blocks, kept, out).items()}

    def _against(self, block: Block, end: Block | None) -> str:
        """Say why a block is left out; nothing if it isn't."""
        names = {block.name, *(name.rpartition(".")[0] for name in block.parameters)}
        for pattern in self.exclude:
            if any(fnmatchcase(name, pattern) for name in names):
                return f"matched by {pattern!r} of kfac.update.orthogonal.exclude"
        if not _is_matrix(block):
            return "no weight matrix"
        return "the model's last layer" if block is end else ""


def _left(blocks: Sequence[Block], kept: Sequence[Block], out: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of blocks that aren't kept, with a reason each."""
    names = {id(block) for block in kept}
    left = [block for block in blocks if id(block) not in names]
    first = {id(block): next(out[name] for name in block.parameters if name in out) for block in left}
    return {name: first[id(block)] for block in left for name in block.parameters}


@cache
def without_bias(kind: _Kind) -> _Kind:
    """Return a block's class for layers' weights alone."""
    if not issubclass(kind, KroneckerBlock):
        return kind
    names = {"parameter_names": kind.parameter_names[:1], "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), names)  # type: ignore[return-value]


def _is_matrix(block: Block) -> bool:
    dense = all(spec.kind is FactorKind.DENSE for spec in block.factors)
    return isinstance(block, KroneckerBlock) and dense and min(block.matrix_shape[1:]) > 1
