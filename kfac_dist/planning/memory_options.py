"""The effect of options that save memory on the bytes of a rank: each planned with and without, all else the same.

An option is on where its effect is: `sample_fraction` at any share, placement `owner` also where `auto` means it.

`sample_fraction` saves rows that a measurement copies before it multiplies them. Inputs and output gradients are there
anyway, autograd holds them, and a choice of rows is a view of them. What is copied is what has to be in fp32 to be
multiplied, one layer's side at a time:

    rows             16-bit model          fp32 model
    A                fp32                  nothing
    G                fp32                  nothing
    G, ĝ = d·∂L/∂s   fp32, and times d     times d          d a number of valid tokens that the device alone knows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from kfac_dist.config.schema import DType, Fisher, KFACConfig, Placement, ReduceEvery, Reduction, Sharing
from kfac_dist.curvature.blocks import Block, KroneckerBlock
from kfac_dist.curvature.blocks.layers.convolution import ConvolutionBlock
from kfac_dist.curvature.blocks.layers.embedding import EmbeddingBlock
from kfac_dist.errors import ConfigError
from kfac_dist.preconditioner.memory import RankBytes, rank_bytes
from kfac_dist.preconditioner.plan import build_plan

Changes = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Option:
    """An option that spares memory.

    Attributes:
        name: As a configuration says it.
        on: Values that switch it on, by section.
        off: Values that switch it off.
    """

    name: str
    on: Changes
    off: Changes


@dataclass(frozen=True)
class Saving:
    """The effect of one option.

    Attributes:
        option: Its name.
        active: Whether it is in effect.
        without: Bytes that the fullest rank keeps without it; None where the engine can't do without.
        having: Bytes that the fullest rank keeps with it.
        copies: Bytes that it saves of a measurement's temporary copies; None if they are unknown.
    """

    option: str
    active: bool
    without: RankBytes | None
    having: RankBytes
    copies: int | None = 0

    @property
    def required(self) -> bool:
        """Whether the engine can't do without it."""
        return self.without is None

    @property
    def device(self) -> int:
        """Bytes that it spares on the device between steps."""
        return 0 if self.without is None else self.without.total - self.having.total


_SAMPLING = "curvature.sample_fraction"
# The share that is planned where none is configured.
_SHARE = 0.25
_OWNER = {"placement": Placement.OWNER, "grad_worker_fraction": None}
_OPTIONS = (
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
        {"distribution": _OWNER},
        {"distribution": {"placement": Placement.REPLICATED, "grad_worker_fraction": None}},
    ),
    Option(
        "distribution: reduce_scatter, step",
        {"distribution": {"reduction": Reduction.REDUCE_SCATTER, "reduce_every": ReduceEvery.STEP}},
        {"distribution": {"reduction": Reduction.ALL_REDUCE, "reduce_every": ReduceEvery.REFRESH}},
    ),
)


def savings(
    blocks: Sequence[Block],
    config: KFACConfig,
    *,
    world_size: int,
    local_world_size: int,
    shard_size: int,
    micro: MicroRows | None = None,
) -> list[Saving]:
    """Return each option's effect on the bytes of the fullest rank, without those that ranks or options exclude.

    Args:
        blocks: The model's blocks.
        config: The configuration.
        world_size: Ranks that share the work.
        local_world_size: Ranks of one node.
        shard_size: Consecutive ranks that together hold each gradient once.
        micro: The micro-batch of a rank; by default one without copies.
    """

    def planned(changes: Changes) -> RankBytes:
        changed = _changed(config, changes)
        plan = build_plan(
            blocks, changed, world_size=world_size, local_world_size=local_world_size, shard_size=shard_size
        )
        return max(rank_bytes(plan, changed, sharded=shard_size > 1), key=lambda rank: rank.total)

    own = build_plan(blocks, config, world_size=world_size, local_world_size=local_world_size, shard_size=shard_size)
    alone = world_size > 1 and own.grid.group_size == 1
    effective = _with(config, {"distribution": _OWNER}) if alone or shard_size > 1 else config
    sampling = _sampling(config)
    found = [saving for option in (sampling, *_OPTIONS) if (saving := _saving(option, effective, planned)) is not None]
    copied = [
        copied_bytes(blocks, _with(config, changes), micro or MicroRows()) for changes in (sampling.off, sampling.on)
    ]
    spared = None if copied[0] is None or copied[1] is None else copied[0] - copied[1]
    return [replace(saving, copies=spared) if saving.option == sampling.name else saving for saving in found]


def _sampling(config: KFACConfig) -> Option:
    share = config.curvature.sample_fraction if config.curvature.sample_fraction < 1 else _SHARE
    on, off = ({"curvature": {"sample_fraction": value}} for value in (share, 1.0))
    return Option(f"{_SAMPLING}: {share:.3g}", on, off)


def _saving(option: Option, effective: KFACConfig, planned: Callable[[Changes], RankBytes]) -> Saving | None:
    active = all(
        getattr(getattr(effective, section), key) == value
        for section, values in option.on.items()
        for key, value in values.items()
    )
    try:
        having = planned(option.on)
    except (ConfigError, ValidationError):  # of the ranks; of other options
        return None
    try:
        return Saving(option.name, active, planned(option.off), having)
    except (ConfigError, ValidationError):
        return Saving(option.name, active, None, having) if active else None


def _changed(config: KFACConfig, changes: Changes) -> KFACConfig:
    # Validated as a whole: a copy isn't, and some options exclude each other.
    return KFACConfig.model_validate(_with(config, changes).model_dump())


def _with(config: KFACConfig, changes: Changes) -> KFACConfig:
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    return config.model_copy(update=sections)


_FLOAT = 4


@dataclass(frozen=True)
class MicroRows:
    """The planner's view of one micro-batch on one rank.

    Attributes:
        rows: Rows of each block, as far as they are known.
        half: Whether the model computes in 16 bits.
        counted: Whether the device alone knows over how many terms the loss is a mean.
    """

    rows: Mapping[str, float] = field(default_factory=dict)
    half: bool = False
    counted: bool = False

    @property
    def copied(self) -> bool:
        """Whether anything is copied at all."""
        return self.half or self.counted


def copied_bytes(blocks: Sequence[Block], config: KFACConfig, micro: MicroRows) -> int | None:
    """Return the bytes of the largest copy that measuring a micro-batch makes; None if no block's rows are known.

    A sample's summed rows (sharing `reduce`) and a convolution's patches are made before rows are chosen: sampling
    spares nothing of them, and they don't count.

    Args:
        blocks: The model's blocks.
        config: The measurement, with its share of rows.
        micro: The micro-batch.
    """
    if not micro.copied:
        return 0
    if not micro.rows:
        return None
    share = config.curvature.sample_fraction
    # K-FAC's own passes send back gradients of a term, which nothing has divided.
    counted = micro.counted and config.curvature.fisher is Fisher.EMPIRICAL
    sizes = (
        micro.rows.get(block.name, 0.0) * values for block in blocks for values in _values(block, micro.half, counted)
    )
    return round(_FLOAT * share * max(sizes, default=0.0))


def _values(block: Block, half: bool, counted: bool) -> Iterator[int]:
    """Yield the fp32 values that each side of a block copies of a row."""
    if not isinstance(block, KroneckerBlock | EmbeddingBlock) or block.sharing is not Sharing.EXPAND:
        return
    groups, d_out, d_in = block.matrix_shape
    if isinstance(block, KroneckerBlock) and not isinstance(block, ConvolutionBlock):
        yield half * groups * (d_in - block.has_bias)
    yield (half + counted) * groups * d_out
