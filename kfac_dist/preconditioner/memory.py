"""How many bytes K-FAC keeps on each rank between steps: a pure function of the plan and the configuration.

    factors     running averages, for each class where they are kept apart; also the window of a step, where it isn't
                given back after it
    inverses    what the blocks of the rank's column are preconditioned with
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
from kfac_dist.curvature.factors import FactorKind, Unit
from kfac_dist.curvature.solvers import payload_numel
from kfac_dist.preconditioner.plan import Plan

_FLOAT = 4
_BYTES = {DType.FLOAT32: 4, DType.BFLOAT16: 2}


@dataclass(frozen=True)
class RankBytes:
    """Bytes on one rank."""

    factors: int
    inverses: int
    gradients: int

    @property
    def total(self) -> int:
        """All of them."""
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
    found = []
    for rank in range(grid.world_size):
        blocks = plan.column_blocks(grid.column_of(rank))
        gradients = _FLOAT * sum(matrices[name] for name in blocks)
        if sharded:  # the workspace, what comes from the row's other ranks and what goes to them
            others = (grid.columns - 1) / grid.columns
            gradients += math.ceil(others * gradients + (_FLOAT * elements - gradients) / grid.columns)
        elif grid.columns > 1:  # the results of all columns
            gradients += _FLOAT * elements
        factors = _numel(plan.owned(rank)) * average if own else _numel(plan.units) * (average + _FLOAT)
        inverses = sum(_payload_bytes(unit, config) for name in blocks for unit in plan.blocks[name].units)
        found.append(RankBytes(factors, inverses, gradients))
    return found


def _numel(units: Sequence[Unit]) -> int:
    return sum(unit.statistics.numel for unit in units)


def _payload_bytes(unit: Unit, config: KFACConfig) -> int:
    vectors = payload_numel(unit, config.inversion.solver)
    if unit.kind is FactorKind.DIAGONAL:
        return _FLOAT * vectors
    return _BYTES[config.inversion.inverse_dtype] * unit.numel + _FLOAT * (vectors - unit.numel)
