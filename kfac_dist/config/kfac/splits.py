"""`kfac.inversion.splits`: which layers' factors are cut into diagonal blocks, and where (Block K-FAC)."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Self

from pydantic import model_validator

from kfac_dist.config.section import Count, Section


class SplitBy(StrEnum):
    """Parts that a layer has by its nature."""

    PER_HEAD = "per_head"
    PER_GROUP = "per_group"


class SplitConfig(Section):
    """Cuts of the factors of some layers.

    In YAML `per_head` and `per_group` may stand alone, and so may a number: that many parts of both factors.

    Attributes:
        by: `per_head` cuts G of projections that make attention's heads (q, k, v, also fused) and A of the one that
            reads them; `per_group` makes each group of a grouped convolution a unit of its own.
        heads: `per_head` only: number of heads, where the model doesn't say.
        inputs: Parts of A: how many near-equal ones, or their sizes; a bias's coordinate belongs to the last.
        outputs: Parts of G, likewise.
    """

    by: SplitBy | None = None
    heads: Count | None = None
    inputs: Count | tuple[Count, ...] | None = None
    outputs: Count | tuple[Count, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        match data:
            case str():
                return {"by": data}
            case bool():
                return data
            case int():
                return {"inputs": data, "outputs": data}
            case list() | tuple():
                raise ValueError(f"sizes {list(data)} need a side: write {{outputs: {list(data)}}}, or inputs")
        return data

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        sized = self.inputs is not None or self.outputs is not None
        if (self.by is None) != sized:
            raise ValueError("give per_head, per_group, a number, or a mapping with inputs or outputs: one of them")
        if self.heads is not None and self.by is not SplitBy.PER_HEAD:
            raise ValueError("heads has no effect without by: per_head")
        return self


def refuse_idle(splits: dict[str, SplitConfig]) -> dict[str, SplitConfig]:
    """Refuse a last pattern that leaves its layers whole; an earlier one keeps them from those that come after it."""
    for pattern, split in list(splits.items())[-1:]:
        if split.by is None and all(_is_whole(parts) for parts in (split.inputs, split.outputs)):
            raise ValueError(
                f"{pattern!r}: 1 part cuts nothing: give inputs or outputs 2 or more, or leave these layers out of "
                "splits"
            )
    return splits


def _is_whole(parts: int | tuple[int, ...] | None) -> bool:
    return parts is None or parts == 1 or (isinstance(parts, tuple) and len(parts) == 1)
