"""How many bytes K-FAC keeps on each rank between steps: a pure function of the plan and the configuration.

    factors     running averages, for each class where they are kept apart; also the window of a step, where it isn't
                given back after it
    inverses    what the blocks of the rank's column are preconditioned with, under EKFAC every block's eigenbases; with
                `offload` two groups of them, and all of them on the host
    gradients   workspaces of these blocks, and what travels

With placement `owner`, `reduction: reduce_scatter` and `reduce_every: step` all three are of the rank's own blocks, and
fall as 1/W until there are no more blocks to give away. While a step measures, a rank has a window of every factor as
well: it measures all layers on its part of the batch, before it knows only its own factors' sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kfac_dist.config.schema import DType, KFACConfig, ReduceEvery, Reduction
from kfac_dist.curvature.factors import Unit
from kfac_dist.curvature.offload import GROUP_BYTES, aligned
from kfac_dist.curvature.payloads import stored_bytes
from kfac_dist.curvature.precondition import group_size
from kfac_dist.distributed.segments import sharing_numel
from kfac_dist.preconditioner.plan import BlockPlan, Plan, exchange_buckets

_FLOAT = 4
_BYTES = {DType.FLOAT32: 4, DType.BFLOAT16: 2}


@dataclass(frozen=True)
class RankBytes:
    """Bytes on one rank.

    Attributes:
        factors: Statistics.
        inverses: What the device holds of inverses.
        gradients: Workspaces, and what travels.
        host: Inverses in host memory.
    """

    factors: int
    inverses: int
    gradients: int
    host: int = 0

    @property
    def total(self) -> int:
        """All that is on the device."""
        return self.factors + self.inverses + self.gradients


def keeps_own_factors_only(config: KFACConfig, world_size: int) -> bool:
    """Whether a rank keeps the averages of its own units alone, and no window between steps."""
    distribution = config.distribution
    scatters = distribution.reduction is Reduction.REDUCE_SCATTER and distribution.reduce_every is ReduceEvery.STEP
    return scatters and world_size > 1


def rank_bytes(plan: Plan, config: KFACConfig, *, sharded: bool) -> list[RankBytes]:
    """Return what each rank keeps.

    Args:
        plan: Who does what.
        config: Precisions, solver and reduction.
        sharded: Whether the engine's gradients are slices, which an exchange brings to the blocks' owners.
    """
    grid = plan.grid
    own = keeps_own_factors_only(config, grid.world_size)
    average = _BYTES[config.curvature.factor_dtype]
    matrices = {name: math.prod(block.matrix_shape) for name, block in plan.blocks.items()}
    elements = sum(matrices.values())
    by_column = [0] * grid.columns
    for name, block in plan.blocks.items():
        by_column[block.column] += matrices[name]
    found = []
    for rank in range(grid.world_size):
        blocks = plan.column_blocks(grid.column_of(rank))
        gradients = _FLOAT * sum(matrices[name] for name in blocks)
        if sharded:  # the workspace, what comes from the row's other ranks and what goes to them
            others = (grid.columns - 1) / grid.columns
            gradients += math.ceil(others * gradients + (_FLOAT * elements - gradients) / grid.columns)
        elif grid.columns > 1:  # the results of all columns
            gradients += _FLOAT * sharing_numel(by_column)
        factors = _numel(plan.owned(rank)) * average if own else _numel(plan.units) * (average + _FLOAT)
        # EKFAC measures every block in its basis, wherever it is preconditioned.
        bases = [name for name, block in plan.blocks.items() if name in blocks or block.moments is not None]
        inverses, host = sum(_payload_bytes(plan.blocks[name], config) for name in bases), 0
        inverses += _FLOAT * sum(matrices[name] for name in blocks if plan.blocks[name].moments is not None)
        factors += _moment_bytes(plan, config, rank)
        if config.inversion.offload:
            groups = _groups(plan, config, grid.column_of(rank), sharded=sharded)
            inverses, host = min(2, len(groups)) * max(groups, default=0), sum(groups)
        found.append(RankBytes(factors, inverses, gradients, host))
    return found


def _groups(plan: Plan, config: KFACConfig, column: int, *, sharded: bool) -> list[int]:
    """Return the bytes of each group of a column's inverses as offloading lays them out; see `build_groups`."""
    found = []
    for names in exchange_buckets(plan, config.distribution.buckets if sharded else 1)[column]:
        alike: dict[object, list[str]] = {}
        for name in names:
            alike.setdefault(plan.blocks[name].likeness, []).append(name)
        for members in alike.values():
            sizes = _stored(plan.blocks[members[0]].units, config)
            count = group_size(len(members), sum(sizes), GROUP_BYTES)
            parts = [min(count, len(members) - first) for first in range(0, len(members), count)]
            found += [aligned([size * part for size in sizes])[-1] for part in parts]
    return found


def _moment_bytes(plan: Plan, config: KFACConfig, rank: int) -> int:
    """Return the bytes of EKFAC's running averages on a rank, and of their window where it stays between steps."""
    moments = plan.of_moments()
    average = _BYTES[config.curvature.factor_dtype]
    if config.distribution.reduction is Reduction.REDUCE_SCATTER and plan.grid.world_size > 1:
        return _numel(moments.owned(rank)) * average
    return _numel(moments.units) * (average + _FLOAT)


def _numel(units: Sequence[Unit]) -> int:
    return sum(unit.statistics.numel for unit in units)


def _payload_bytes(block: BlockPlan, config: KFACConfig) -> int:
    return sum(_stored(block.units, config))


def _stored(units: Sequence[Unit], config: KFACConfig) -> list[int]:
    return stored_bytes(units, config.inversion.solver, _BYTES[config.inversion.inverse_dtype])
