"""The strategies that are compared: a grid around the configuration, each of them a valid configuration.

placement × reduction      all that fit the ranks and the engine, with balanced assignment
assignment                 the configured placement, dealt and balanced
stagger                    refreshes in one step, or spread over several
max_factor_dim, intervals  other mathematics at another cost: shown, but not recommended by themselves

The first two are distributions, all of which are looked at. Each of the others is an axis, crossed with the best that
was found before it: the whole grid has hundreds, and its best is nearly always there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from kfac_dist.config.schema import KFACConfig, Placement
from kfac_dist.curvature.blocks import Block
from kfac_dist.curvature.factors import FactorKind

Changes = dict[str, dict[str, Any]]

_REDUCTIONS = (("all_reduce", "refresh"), ("reduce_scatter", "refresh"), ("reduce_scatter", "step"))
# Sizes that larger factors are cut to: near multiples of sizes that GPUs multiply well.
_DIMS = (4096, 2048, 1024, 512)
_MOST_DIMS = 2
_STAGGERED = 10


@dataclass(frozen=True)
class Strategy:
    """One way to do it.

    Attributes:
        config: The whole configuration.
        changes: Differences from the configured one, by section.
        same_mathematics: Whether a run takes the same steps as the configured one, but for rounding and for when its
            inverses are refreshed.
    """

    config: KFACConfig
    changes: Changes
    same_mathematics: bool = True

    @property
    def configured(self) -> bool:
        """Whether it is the configuration as it stands."""
        return not self.changes


@dataclass(frozen=True)
class Axis:
    """An option to vary, for any distribution.

    Attributes:
        changes: Function of a configuration and the side of the largest factor; returns the alternatives.
        same_mathematics: See `Strategy`.
    """

    changes: Callable[[KFACConfig, int], Iterator[Changes]]
    same_mathematics: bool


def distributions(config: KFACConfig, *, world_size: int, node_size: int, sharded: bool) -> list[Strategy]:
    """Return the possible strategies, the configured one first; excluded combinations of options are left out.

    Args:
        config: The configuration.
        world_size: Number of ranks.
        node_size: Ranks of a node.
        sharded: Whether ranks hold slices of gradients, which leaves placement `owner` alone.
    """
    found = {repr(config): Strategy(config, {})}
    for changes in _distributions(config, world_size, node_size, sharded=sharded):
        _add(found, config, changes, same=True)
    return list(found.values())


def crossed(config: KFACConfig, bases: Iterable[Strategy], axis: Axis, blocks: Iterable[Block]) -> list[Strategy]:
    """Return the variants of strategies along an axis, without themselves; excluded combinations are left out.

    Args:
        config: The configuration that changes refer to.
        bases: The strategies.
        axis: The option to vary.
        blocks: The model's blocks.
    """
    largest = max((s.dim for block in blocks for s in block.factors if s.kind is FactorKind.DENSE), default=0)
    before = {repr(base.config): base for base in bases}
    found = dict(before)
    for base in before.values():
        for changes in axis.changes(base.config, largest):
            same = base.same_mathematics and axis.same_mathematics
            _add(found, config, _merged(base.changes, changes), same=same)
    return [strategy for key, strategy in found.items() if key not in before]


def changed(config: KFACConfig, changes: Changes) -> KFACConfig:
    """Return a configuration with other values.

    Raises:
        ValidationError: They don't fit each other, or the rest.
    """
    values = config.model_dump()
    for section, own in changes.items():
        values[section] = {**values[section], **own}
    return KFACConfig.model_validate(values)


def _add(found: dict[str, Strategy], config: KFACConfig, changes: Changes, *, same: bool) -> None:
    try:
        other = changed(config, changes)
    except ValidationError:  # of options that exclude each other: such a strategy isn't one
        return
    if repr(other) not in found:
        found[repr(other)] = Strategy(other, _differing(config, other, changes), same)


def _merged(first: Changes, then: Changes) -> Changes:
    return {section: {**first.get(section, {}), **then.get(section, {})} for section in (*first, *then)}


def _differing(config: KFACConfig, other: KFACConfig, changes: Changes) -> Changes:
    """Return those changes that change something."""
    kept = {
        section: {
            key: value
            for key, value in own.items()
            if getattr(getattr(config, section), key) != getattr(getattr(other, section), key)
        }
        for section, own in changes.items()
    }
    return {section: own for section, own in kept.items() if own}


def _distributions(config: KFACConfig, world_size: int, node_size: int, *, sharded: bool) -> Iterator[Changes]:
    if world_size == 1:
        return
    own = config.distribution
    auto = Placement.OWNER if sharded else Placement.REPLICATED
    for placement in _placements(world_size, node_size, sharded=sharded):
        if own.placement is Placement.AUTO and placement["placement"] == auto:
            placement["placement"] = own.placement
        for reduction, every in _REDUCTIONS:
            for assignment in ("balanced", "round_robin"):
                chosen = {**placement, "reduction": reduction, "reduce_every": every, "assignment": assignment}
                if assignment == "round_robin":
                    same = (own.reduction, own.reduce_every) == (reduction, every)
                    if not same or own.placement != placement["placement"]:
                        continue
                yield {"distribution": chosen}


def _placements(world_size: int, node_size: int, *, sharded: bool) -> Iterator[dict[str, Any]]:
    whole = () if sharded else ("replicated",)
    for name in (*whole, "owner"):
        yield {"placement": name, "grad_worker_fraction": None}
    if sharded:
        return
    if 1 < node_size < world_size and world_size % node_size == 0:
        yield {"placement": "node", "grad_worker_fraction": None}
    workers = _middle(world_size)
    if workers is not None and world_size // workers != node_size:
        yield {"placement": "hybrid", "grad_worker_fraction": round(workers / world_size, 6)}


def _middle(world_size: int) -> int | None:
    """Return the number of gradient workers half-way between one and all, if there is one that divides the ranks."""
    between = [count for count in range(2, world_size) if world_size % count == 0]
    return min(between, key=lambda count: (abs(count - world_size**0.5), count), default=None)


def _staggers(config: KFACConfig, largest: int) -> Iterator[Changes]:
    measurements = config.inversion.inverse_every // config.curvature.factor_every
    parts = config.curvature.stagger
    for slots in (1, min(_STAGGERED, measurements)):
        yield {"inversion": {"stagger": parts * slots}}


def _dims(config: KFACConfig, largest: int) -> Iterator[Changes]:
    smaller = [dim for dim in _DIMS if dim < min(largest, config.inversion.max_factor_dim or largest)]
    for dim in smaller[:_MOST_DIMS]:
        yield {"inversion": {"max_factor_dim": dim}}
    if config.inversion.max_factor_dim is not None:
        yield {"inversion": {"max_factor_dim": None}}


def _intervals(config: KFACConfig, largest: int) -> Iterator[Changes]:
    every, window = config.curvature.factor_every, config.inversion.inverse_every
    yield {"inversion": {"inverse_every": 2 * window}}
    if window % 2 == 0 and (window // 2) % every == 0:
        yield {"inversion": {"inverse_every": window // 2}}
    yield {"curvature": {"factor_every": 2 * every}, "inversion": {"inverse_every": 2 * window}}


AXES = (Axis(_staggers, True), Axis(_dims, False), Axis(_intervals, False))
