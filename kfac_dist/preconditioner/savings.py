"""What options that spare memory do to the bytes of a rank: each planned with and without, all else the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from kfac_dist.config.schema import DType, KFACConfig, Placement, ReduceEvery, Reduction
from kfac_dist.curvature.blocks import Block
from kfac_dist.errors import ConfigError
from kfac_dist.preconditioner.memory import RankBytes, rank_bytes
from kfac_dist.preconditioner.plan import build_plan

Changes = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Option:
    """An option that spares memory.

    Attributes:
        name: As a configuration says it.
        on: Section by section, what switches it on.
        off: What switches it off.
    """

    name: str
    on: Changes
    off: Changes


@dataclass(frozen=True)
class Saving:
    """What one option does.

    Attributes:
        option: Its name.
        active: Whether the configuration has it on.
        without: Bytes of the fullest rank without it.
        having: Bytes of the fullest rank with it.
    """

    option: str
    active: bool
    without: RankBytes
    having: RankBytes

    @property
    def device(self) -> int:
        """Bytes that it spares on the device."""
        return self.without.total - self.having.total


_OPTIONS = (
    Option(
        "curvature.sample_fraction: 0.25",
        {"curvature": {"sample_fraction": 0.25}},
        {"curvature": {"sample_fraction": 1.0}},
    ),
    Option(
        "curvature.factor_dtype: bfloat16",
        {"curvature": {"factor_dtype": DType.BFLOAT16}},
        {"curvature": {"factor_dtype": DType.FLOAT32}},
    ),
    Option(
        "inversion.inverse_dtype: bfloat16",
        {"inversion": {"inverse_dtype": DType.BFLOAT16}},
        {"inversion": {"inverse_dtype": DType.FLOAT32}},
    ),
    Option("inversion.offload: true", {"inversion": {"offload": True}}, {"inversion": {"offload": False}}),
    Option(
        "distribution.placement: owner",
        {"distribution": {"placement": Placement.OWNER, "grad_worker_fraction": None}},
        {"distribution": {"placement": Placement.REPLICATED, "grad_worker_fraction": None}},
    ),
    Option(
        "distribution: reduce_scatter, step",
        {"distribution": {"reduction": Reduction.REDUCE_SCATTER, "reduce_every": ReduceEvery.STEP}},
        {"distribution": {"reduction": Reduction.ALL_REDUCE, "reduce_every": ReduceEvery.REFRESH}},
    ),
)


def savings(
    blocks: Sequence[Block], config: KFACConfig, *, world_size: int, local_world_size: int, shard_size: int
) -> list[Saving]:
    """Return what each option does to the bytes of the fullest rank, without those that ranks or options exclude.

    Args:
        blocks: The model's blocks.
        config: What is asked.
        world_size: Ranks that share the work.
        local_world_size: Ranks of one node.
        shard_size: Consecutive ranks that together hold each gradient once.
    """

    def planned(changes: Changes) -> RankBytes:
        changed = _changed(config, changes)
        plan = build_plan(
            blocks, changed, world_size=world_size, local_world_size=local_world_size, shard_size=shard_size
        )
        return max(rank_bytes(plan, changed, sharded=shard_size > 1), key=lambda rank: rank.total)

    return [saving for option in _OPTIONS if (saving := _saving(option, config, planned)) is not None]


def _saving(option: Option, config: KFACConfig, planned: Callable[[Changes], RankBytes]) -> Saving | None:
    active = all(
        getattr(getattr(config, section), key) == value
        for section, values in option.on.items()
        for key, value in values.items()
    )
    try:
        return Saving(option.name, active, planned(option.off), planned(option.on))
    except (ConfigError, ValidationError):  # of the ranks; of other options
        return None


def _changed(config: KFACConfig, changes: Changes) -> KFACConfig:
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    # Validated as a whole: a copy isn't, and some options exclude each other.
    return KFACConfig.model_validate(config.model_copy(update=sections).model_dump())
