"""Bytes that K-FAC keeps on each rank between steps: a pure function of the plan and the configuration.

    factors     running averages, for each class where they are kept apart; also the window of a step, where it isn't
                given back after it
    inverses    of the blocks of the rank's column, under EKFAC every block's eigenbases; with `offload` two groups of
                them, and all of them on the host
    gradients   workspaces of these blocks, communication buffers, and the momentum of orthogonal steps

With placement `owner`, `reduction: reduce_scatter` and `reduce_every: step` all three are of the rank's own blocks, and
fall as 1/W until there are no more blocks to give away. While a step measures, a rank has a window of every factor as
well: it measures all layers on its part of the batch, before it knows only its own factors' sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kfac_dist.config.schema import Direction, KFACConfig, ReduceEvery, Reduction
from kfac_dist.curvature.factors import Unit
from kfac_dist.curvature.inverses.offload import GROUP_BYTES, aligned
from kfac_dist.curvature.inverses.payloads import stored_bytes
from kfac_dist.curvature.inverses.precondition import group_size
from kfac_dist.distributed.movement.owner_buffer import sharing_numel
from kfac_dist.errors import ConfigError
from kfac_dist.precision import itemsize, working
from kfac_dist.preconditioner.plan import BlockPlan, Plan, exchange_buckets

_GIB = 2**30
# Layers that a refusal names.
_NAMED = 3


@dataclass(frozen=True)
class RankBytes:
    """Bytes on one rank.

    Attributes:
        factors: Statistics.
        inverses: Inverses on the device.
        gradients: Workspaces, communication buffers, and momentum.
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
    """Return the bytes that each rank keeps.

    Args:
        plan: The plan.
        config: Precisions, solver and reduction.
        sharded: Whether the engine's gradients are slices, which an exchange brings to the blocks' owners.
    """
    grid = plan.grid
    own = keeps_own_factors_only(config, grid.world_size)
    average, value = itemsize(config.curvature.factor_dtype), working(config).itemsize
    everything = _numel(plan.units) * (average + value)
    owned = _numel_by_owner(plan)
    moments = _moment_bytes(plan, config)
    columns = _column_bytes(plan, config, sharded=sharded)
    found = []
    for rank in range(grid.world_size):
        column = columns[grid.column_of(rank)]
        factors = owned[rank] * average if own else everything
        found.append(replace(column, factors=factors + moments[rank]))
    return found


def _column_bytes(plan: Plan, config: KFACConfig, *, sharded: bool) -> list[RankBytes]:
    """Return the bytes that the ranks of each column keep, without factors."""
    columns, value = plan.grid.columns, working(config).itemsize
    matrices = {name: math.prod(block.matrix_shape) for name, block in plan.blocks.items()}
    payloads = {name: _payload_bytes(block, config) for name, block in plan.blocks.items()}
    # EKFAC measures every block in its basis, wherever it is preconditioned.
    rescaled = {name for name, block in plan.blocks.items() if block.moments is not None}
    bases = sum(payloads[name] for name in rescaled)
    blocks = plan.columns()
    elements = [sum(matrices[name] for name in names) for names in blocks]
    shared = sharing_numel(elements)
    buckets = exchange_buckets(plan, config.distribution.buckets if sharded else 1)
    found = []
    for column, names in enumerate(blocks):
        gradients = value * elements[column]
        if sharded:  # the workspace, and the buffers from and to the row's other ranks
            others = (columns - 1) / columns
            gradients += math.ceil(others * gradients + (value * sum(elements) - gradients) / columns)
        elif columns > 1:  # the results of all columns
            gradients += value * shared
        if config.update.direction is Direction.ORTHOGONAL:
            gradients += value * elements[column]  # momentum
        inverses, host = bases + sum(payloads[name] for name in names if name not in rescaled), 0
        inverses += value * sum(matrices[name] for name in names if name in rescaled)
        if config.inversion.offload:
            groups = _groups(plan, config, buckets[column])
            inverses, host = min(2, len(groups)) * max(groups, default=0), sum(groups)
        found.append(RankBytes(0, inverses, gradients, host))
    return found


def _groups(plan: Plan, config: KFACConfig, buckets: Sequence[Sequence[str]]) -> list[int]:
    """Return the bytes of each group of a column's inverses as offloading lays them out; see `build_groups`."""
    found = []
    for names in buckets:
        alike: dict[object, list[str]] = {}
        for name in names:
            alike.setdefault(plan.blocks[name].likeness, []).append(name)
        for members in alike.values():
            sizes = _stored(plan.blocks[members[0]].units, config)
            count = group_size(len(members), sum(sizes), GROUP_BYTES)
            parts = [min(count, len(members) - first) for first in range(0, len(members), count)]
            found += [aligned([size * part for size in sizes])[-1] for part in parts]
    return found


def _moment_bytes(plan: Plan, config: KFACConfig) -> list[int]:
    """Return the bytes of EKFAC's running averages by rank, and of their window where it stays between steps."""
    moments = plan.of_moments()
    average, value = itemsize(config.curvature.factor_dtype), working(config).itemsize
    if config.distribution.reduction is Reduction.REDUCE_SCATTER and plan.grid.world_size > 1:
        return [numel * average for numel in _numel_by_owner(moments)]
    return [_numel(moments.units) * (average + value)] * plan.grid.world_size


def _numel_by_owner(plan: Plan) -> list[int]:
    numels = [0] * plan.grid.world_size
    for unit in plan.units:
        numels[plan.assignment.owners[unit.name]] += unit.statistics.numel
    return numels


def _numel(units: Sequence[Unit]) -> int:
    return sum(unit.statistics.numel for unit in units)


def _payload_bytes(block: BlockPlan, config: KFACConfig) -> int:
    return sum(_stored(block.units, config))


def _stored(units: Sequence[Unit], config: KFACConfig) -> list[int]:
    return stored_bytes(
        units, config.inversion.solver, itemsize(config.inversion.inverse_dtype), working(config).itemsize
    )


# ---- statistics by class, checked before any of it is allocated


def class_bytes(plan: Plan, config: KFACConfig) -> int:
    """Return the most bytes that a rank gives to statistics by class while it measures: averages and window."""
    ranks = range(plan.grid.world_size)
    average = itemsize(config.curvature.factor_dtype)
    window = working(config).itemsize * _class_numel(plan.units)
    if keeps_own_factors_only(config, plan.grid.world_size):
        return window + average * max(_class_numel(plan.owned(rank)) for rank in ranks)
    return window + average * _class_numel(plan.units)


def check_class_memory(plan: Plan, config: KFACConfig) -> None:
    """Refuse statistics by class that don't fit the configured limit; the same on every rank.

    Raises:
        ConfigError: Names the bytes, the number of classes, the largest layers, and alternatives. Also where
            the number of classes isn't known.
    """
    by_class = config.curvature.class_conditional
    if by_class is None:
        return
    if by_class.classes is None:
        raise ConfigError(
            "kfac.curvature.class_conditional.classes: missing; only training sees how many outputs the model has: "
            "give the number of classes, {classes: 10}"
        )
    needed = class_bytes(plan, config) / _GIB
    if needed <= by_class.limit_gib:
        return
    sizes = {name: block.factor_bytes for name, block in plan.blocks.items() if any(u.classes for u in block.units)}
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:_NAMED]
    named = ", ".join(f"{name} ({2 * sizes[name] / _GIB:.3g} GiB)" for name in largest)
    widest = max((unit.dim for unit in plan.units if unit.classes), default=0)
    raise ConfigError(
        f"kfac.curvature.class_conditional: statistics of {config.curvature.class_slots} classes take {needed:.3g} GiB "
        f"on a rank, {needed / config.curvature.class_slots:.3g} GiB without classes; limit_gib is "
        f"{by_class.limit_gib:g}. The largest layers are {named}. Set class_conditional.limit_gib to "
        f"{math.ceil(needed)} if there is as much memory, leave layers out (kfac.curvature.exclude), cut their factors "
        f"(kfac.inversion.max_factor_dim: {max(2, widest // 4)}), or leave class_conditional out"
    )


def _class_numel(units: Iterable[Unit]) -> int:
    return sum(unit.statistics.numel for unit in units if unit.classes)
