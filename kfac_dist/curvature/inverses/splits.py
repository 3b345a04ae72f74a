"""Block K-FAC: where named splits cut the factors of a layer. The first pattern that matches a layer's name counts.

    per_head     q, k, v    G: a diagonal block a head (fused: q's heads, then k's, then v's); A whole
                 out        A: a diagonal block a head, the bias's coordinate with the last; G whole
    per_group    grouped convolutions: the groups' factors, already apart, become units of their own
    numbers      near-equal parts, or parts of given sizes, of A (`inputs`) and G (`outputs`)

`max_factor_dim` then cuts factors that are still too large.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from kfac_dist.config.schema import SplitBy, SplitConfig
from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.blocks.layers.attention import AttentionBlock
from kfac_dist.curvature.factors import Cuts, FactorKind, FactorSpec, Side, equal_parts
from kfac_dist.errors import ConfigError, did_you_mean

_KEY = "kfac.inversion.splits"


def cuts_of(block: Block, splits: Mapping[str, SplitConfig]) -> Cuts:
    """Return how the splits cut a block's factors.

    Raises:
        ConfigError: The split that matches the block doesn't fit it.
    """
    pattern = next((pattern for pattern in splits if _matches(pattern, block)), None)
    if pattern is None:
        return Cuts()
    return _Split(pattern, block).cuts(splits[pattern])


def check_patterns(blocks: Iterable[Block], splits: Mapping[str, SplitConfig]) -> None:
    """Refuse patterns that cut nothing: no block has such a name, or an earlier pattern has taken them all.

    Raises:
        ConfigError: For the first such pattern.
    """
    left = list(blocks)
    names = [block.name for block in left]
    for pattern in splits:
        taken = [block for block in left if _matches(pattern, block)]
        if not taken:
            known = any(fnmatchcase(name, pattern) for name in names)
            why = (
                "an earlier pattern has matched all its layers" if known else "no layer with a K-FAC block is named so"
            )
            raise ConfigError(f"{_KEY}: {pattern!r} cuts nothing: {why}{'' if known else did_you_mean(pattern, names)}")
        left = [block for block in left if block not in taken]


def _matches(pattern: str, block: Block) -> bool:
    names = [block.name]
    if isinstance(block, AttentionBlock):  # the module, for all of its projections
        names.append(block.name.removesuffix(block.projection.name).removesuffix("."))
    return any(fnmatchcase(name, pattern) for name in names)


class _Split:
    """One split applied to one block; its methods refuse a split that doesn't fit."""

    def __init__(self, pattern: str, block: Block) -> None:
        self._pattern = pattern
        self._block = block
        self._factors = {factor.side: factor for factor in block.factors}

    def cuts(self, split: SplitConfig) -> Cuts:
        match split.by:
            case SplitBy.PER_HEAD:
                return self._per_head(split.heads)
            case SplitBy.PER_GROUP:
                if max(factor.batch for factor in self._block.factors) == 1 or Side.F in self._factors:
                    raise self._refused("per_group", "it has no groups; only grouped convolutions do")
                return Cuts(groups=True)
            case None:
                sides = {Side.A: split.inputs, Side.G: split.outputs}
        return Cuts({side: self._sizes(side, parts) for side, parts in sides.items() if parts is not None})

    def _per_head(self, count: int | None) -> Cuts:
        heads = self._block.heads
        if heads is None:
            raise self._refused(
                "per_head",
                "nothing shows that it makes attention's heads or reads them; write {outputs: n} to cut G or "
                "{inputs: n} to cut A, or narrow the pattern",
            )
        width = self._width(heads.side)
        if count is not None:
            parts = count * (3 if heads.fused else 1)
        elif heads.dim:
            parts = width // heads.dim
        else:
            why = "the model doesn't say how many heads it has; write {by: per_head, heads: n}"
            raise self._refused("per_head", why)
        if not parts or width % parts:
            of_each = " of q, k and v each" if heads.fused else ""
            found = f"{count} heads{of_each}" if count is not None else f"heads of {heads.dim}"
            raise self._refused("per_head", f"{found} don't divide its {width} {_SIDES[heads.side]}")
        return Cuts({heads.side: self._with_bias(heads.side, (width // parts,) * parts)})

    def _sizes(self, side: Side, parts: int | tuple[int, ...]) -> tuple[int, ...]:
        factor, what = self._dense(side), _SIDES[side]
        if isinstance(parts, int):
            if parts > factor.dim:
                raise self._refused(f"{what}: {parts}", f"the factor has {factor.dim} rows")
            return equal_parts(factor.dim, parts)
        if sum(parts) not in (factor.dim, self._width(side)):
            raise self._refused(
                f"{what}: {list(parts)}", f"they add up to {sum(parts)}, and it has {self._width(side)}"
            )
        return parts if sum(parts) == factor.dim else self._with_bias(side, parts)

    def _dense(self, side: Side) -> FactorSpec:
        factor = self._factors.get(side)
        if factor is None or factor.kind is FactorKind.DIAGONAL:
            what = "its Fisher is unit-wise" if factor is None else f"its {side} is a diagonal"
            raise self._refused(_SIDES[side], f"{what}: nothing to cut")
        return factor

    def _width(self, side: Side) -> int:
        """Return the inputs or outputs of the layer, without a bias's coordinate."""
        return self._dense(side).dim - (getattr(self._block, "has_bias", False) if side is Side.A else 0)

    def _with_bias(self, side: Side, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return (*sizes[:-1], sizes[-1] + self._dense(side).dim - sum(sizes))

    def _refused(self, asked: str, why: str) -> ConfigError:
        return ConfigError(f"{_KEY}: {self._pattern!r} asks for {asked} of layer {self._block.name!r}: {why}")


_SIDES = {Side.A: "inputs", Side.G: "outputs"}
