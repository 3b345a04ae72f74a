"""What statistics by class cost in memory, told before any of it is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterable

from kfac_dist.config.schema import KFACConfig
from kfac_dist.curvature.factors import Unit
from kfac_dist.errors import ConfigError
from kfac_dist.precision import itemsize, working
from kfac_dist.preconditioner.memory import keeps_own_factors_only
from kfac_dist.preconditioner.plan import Plan

_GIB = 2**30
# Layers that a refusal names.
_NAMED = 3


def class_bytes(plan: Plan, config: KFACConfig) -> int:
    """Return the most bytes that a rank gives to statistics by class while it measures: averages and window."""
    ranks = range(plan.grid.world_size)
    average = itemsize(config.curvature.factor_dtype)
    window = working(config).itemsize * _numel(plan.units)
    if keeps_own_factors_only(config, plan.grid.world_size):
        return window + average * max(_numel(plan.owned(rank)) for rank in ranks)
    return window + average * _numel(plan.units)


def check_class_memory(plan: Plan, config: KFACConfig) -> None:
    """Refuse statistics by class that don't fit the configured limit; the same on every rank.

    Raises:
        ConfigError: Says the bytes, the number of classes, the largest layers, and what to write instead. Also where
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


def _numel(units: Iterable[Unit]) -> int:
    return sum(unit.statistics.numel for unit in units if unit.classes)
