"""The plan: blocks and units, their owners, and the slots in which they refresh.

A pure function of names, shapes, the number of ranks and the configuration. Every rank computes it for itself, and a
hash of its rows is compared before anything else travels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kfac_dist.config.schema import AssignmentStrategy, Fisher, KFACConfig, Placement
from kfac_dist.curvature.blocks import Block
from kfac_dist.curvature.factors import FactorKind, Side, Unit, units_of
from kfac_dist.curvature.inverses.precondition import rescales
from kfac_dist.curvature.inverses.solvers import payload_numel
from kfac_dist.curvature.inverses.splits import check_patterns, cuts_of
from kfac_dist.distributed.assignment.assign import Assignment, WorkItem, assign
from kfac_dist.distributed.assignment.grid import Grid, build_grid
from kfac_dist.distributed.movement.owner_buffer import split_buckets
from kfac_dist.errors import ConfigError

_FLOAT = 4


@dataclass(frozen=True)
class BlockPlan:
    """One block's row of the plan.

    Attributes:
        name: Name of the block.
        description: Kind and shapes.
        units: Its units, factor by factor.
        owners: The rank that inverts each unit.
        column: The column of the grid that preconditions it.
        slot: When it refreshes.
        matrix_shape: `(batch, d_out, d_in)` of its gradient matrix.
        partial_traces: See `Block.partial_traces`.
        moments: EKFAC's second moments of the block, where it has any.
        moments_owner: The rank that keeps them when they are reduced to owners.
    """

    name: str
    description: str
    units: tuple[Unit, ...]
    owners: tuple[int, ...]
    column: int
    slot: int
    matrix_shape: tuple[int, int, int]
    partial_traces: bool = False
    moments: Unit | None = None
    moments_owner: int = 0

    @property
    def inversion_cost(self) -> float:
        """Σ n³ over the block's units."""
        return sum(unit.cost for unit in self.units)

    @property
    def factor_bytes(self) -> int:
        """Bytes of the block's statistics in fp32."""
        return _FLOAT * sum(unit.statistics.numel for unit in self.units)

    @property
    def moments_bytes(self) -> int:
        """Bytes of the block's second moments in fp32; 0 without any."""
        return 0 if self.moments is None else _FLOAT * self.moments.numel

    @property
    def likeness(self) -> tuple[object, ...]:
        """A key that is equal for blocks which one batched product can precondition."""
        units = tuple((u.side, u.start, u.stop, u.first, u.batch, u.kind) for u in self.units)
        return self.matrix_shape, units, self.moments is None

    @property
    def row(self) -> tuple[str, str]:
        """Name, and everything that ranks have to agree on."""
        moments = "" if self.moments is None else f", moments {self.moments_owner}"
        return self.name, f"{self.description}; owners {self.owners}, column {self.column}, slot {self.slot}{moments}"


@dataclass(frozen=True)
class Plan:
    """Blocks by name in the model's order, and where their units lie.

    Attributes:
        blocks: The rows.
        units: All units in the order of the flat buffers: by slot, and inside a slot in the order in which backward
            completes the blocks, so that buckets fill one after the other.
        assignment: The owner of each unit.
        grid: The ranks.
    """

    blocks: Mapping[str, BlockPlan]
    units: tuple[Unit, ...]
    assignment: Assignment
    grid: Grid

    def rows(self) -> list[tuple[str, str]]:
        """Return the rows that ranks compare at start-up, one per block."""
        return [block.row for block in self.blocks.values()]

    def slot_units(self, slots: Sequence[int]) -> tuple[int, int]:
        """Return the range `[first, last)` of units of consecutive slots in the flat order."""
        inside = [index for index, unit in enumerate(self.units) if self.blocks[unit.block].slot in slots]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    def of_moments(self) -> Plan:
        """Return the plan of EKFAC's second moments: a unit for each block that has them, all in one slot."""
        blocks = {
            name: replace(block, units=(block.moments,), owners=(block.moments_owner,), slot=0)
            for name, block in self.blocks.items()
            if block.moments is not None
        }
        order = dict.fromkeys(unit.block for unit in self.units if unit.block in blocks)
        units = tuple(blocks[name].units[0] for name in order)
        owners = {unit.name: blocks[unit.block].moments_owner for unit in units}
        columns = {name: block.column for name, block in blocks.items()}
        return Plan(blocks, units, Assignment(self.grid, owners, columns, ()), self.grid)

    def column_blocks(self, column: int) -> list[str]:
        """Return the blocks that a column preconditions, in the model's order."""
        return [name for name, block in self.blocks.items() if block.column == column]

    def columns(self) -> list[list[str]]:
        """Return the blocks that each column preconditions, in the model's order."""
        found: list[list[str]] = [[] for _ in range(self.grid.columns)]
        for name, block in self.blocks.items():
            found[block.column].append(name)
        return found

    def owned(self, rank: int) -> list[Unit]:
        """Return the units that a rank inverts, in flat order."""
        return [unit for unit in self.units if self.assignment.owners[unit.name] == rank]


def build_plan(
    blocks: Sequence[Block],
    config: KFACConfig,
    *,
    world_size: int,
    local_world_size: int = 1,
    shard_size: int = 1,
) -> Plan:
    """Plan the work of `world_size` ranks.

    Args:
        blocks: The model's blocks; only names and shapes are read.
        config: The options.
        world_size: Ranks that share the work.
        local_world_size: Ranks of one node, for placement `node`.
        shard_size: Number of consecutive ranks that together hold each gradient once: they are the rows of the grid,
            and determine the meaning of placement `auto`. 1 if every rank holds all.

    Raises:
        ConfigError: The placement doesn't fit the number of ranks or the engine's shards, or a split its layers.
    """
    distribution = config.distribution
    grid = _grid(config, world_size, local_world_size, shard_size)
    check_patterns(blocks, config.inversion.splits)
    units = {block.name: block_units(block, config) for block in blocks}
    items = [
        WorkItem(unit.name, name, unit.cost, _FLOAT * payload_numel(unit, config.inversion.solver))
        for name, own in units.items()
        for unit in own
    ]
    assignment = assign(items, grid, distribution.assignment)
    slots = _slots(units, config.curvature.stagger, config.inversion.stagger)
    rows = {
        block.name: BlockPlan(
            name=block.name,
            description=block.describe(),
            units=units[block.name],
            owners=tuple(assignment.owners[unit.name] for unit in units[block.name]),
            column=assignment.columns[block.name],
            slot=slots[block.name],
            matrix_shape=block.matrix_shape,
            partial_traces=block.partial_traces,
            moments=moments_unit(block, units[block.name], config),
            # Beside its costliest inversion: there is nothing to balance, a rank's share follows from that.
            moments_owner=assignment.owners[max(units[block.name], key=lambda unit: unit.cost).name],
        )
        for block in blocks
    }
    backward = list(reversed(blocks))
    backward.sort(key=lambda block: slots[block.name])
    return Plan(rows, tuple(unit for block in backward for unit in units[block.name]), assignment, grid)


def _grid(config: KFACConfig, world_size: int, local_world_size: int, shard_size: int) -> Grid:
    distribution = config.distribution
    placement = distribution.placement
    if shard_size > 1:
        if placement not in (Placement.AUTO, Placement.OWNER):
            raise ConfigError(
                f"kfac.distribution.placement: {placement} needs every gradient whole on every rank, but this engine "
                f"leaves each of {shard_size} ranks with a slice: use owner or auto"
            )
        return Grid(world_size, shard_size)
    if placement is Placement.AUTO:
        placement = Placement.REPLICATED
    return build_grid(placement, world_size, distribution.grad_worker_fraction, local_world_size)


def exchange_buckets(plan: Plan, count: int) -> list[list[list[str]]]:
    """Divide the exchange of sharded engines into buckets of near-equal elements: names by column and bucket.

    Blocks of one shape stay together where they can, so that they are preconditioned by one batched product. Every
    column has the same number of buckets, of which the last may be empty.
    """
    columns = []
    for names in plan.columns():
        first = {plan.blocks[name].likeness: place for place, name in reversed(list(enumerate(names)))}
        names.sort(key=lambda name: first[plan.blocks[name].likeness])
        cuts = split_buckets([math.prod(plan.blocks[name].matrix_shape) for name in names], count)
        columns.append([names[start:stop] for start, stop in cuts])
    most = max((len(buckets) for buckets in columns), default=0)
    return [buckets + [[]] * (most - len(buckets)) for buckets in columns]


def block_units(block: Block, config: KFACConfig) -> tuple[Unit, ...]:
    """Return the units that a configuration measures of a block: `input_only` has no G."""
    measured = tuple(
        factor
        for factor in block.factors
        if config.curvature.fisher is not Fisher.INPUT_ONLY or factor.side is not Side.G
    )
    classes = config.curvature.class_slots if block.by_class else 0
    cuts = cuts_of(block, config.inversion.splits)
    return units_of(block.name, measured, config.inversion.max_factor_dim, classes, cuts)


def moments_unit(block: Block, units: Sequence[Unit], config: KFACConfig) -> Unit | None:
    """Return the unit of a block's second moments under EKFAC; None where they aren't defined."""
    if not rescales(block, units, config.inversion.solver):
        return None
    batch, d_out, d_in = block.matrix_shape
    return Unit(block.name, Side.S, 0, 0, d_out * d_in, batch, FactorKind.DIAGONAL)


def _slots(units: Mapping[str, tuple[Unit, ...]], parts: int, slots: int) -> dict[str, int]:
    """Spread blocks over slots of about equal cost: parts by the cost of measuring, slots by that of solving.

    Nothing of it depends on the number of ranks: when a layer refreshes is part of the mathematics.
    """
    measured = {name: sum(_measuring_cost(unit) for unit in own) for name, own in units.items()}
    solved = {name: sum(unit.cost for unit in own) for name, own in units.items()}
    together = slots // parts
    found: dict[str, int] = {}
    for name, part in _spread(measured, parts).items():
        found[name] = part * together
    for first in range(0, slots, together):
        own = {name: solved[name] for name, slot in found.items() if slot == first}
        found |= {name: first + place for name, place in _spread(own, together).items()}
    return found


def _spread(costs: Mapping[str, float], parts: int) -> dict[str, int]:
    items = [WorkItem(name, name, cost, 0) for name, cost in costs.items()]
    return dict(assign(items, Grid(parts, parts), AssignmentStrategy.BALANCED).owners)


def _measuring_cost(unit: Unit) -> float:
    """Return n² for each dense matrix, n for a diagonal: times the rows, which layers are taken to have alike."""
    return float(unit.numel)
