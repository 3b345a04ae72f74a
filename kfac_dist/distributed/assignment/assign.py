"""Assignment of units to the ranks that invert them: a pure function of names, costs and the grid.

Each block goes to one column of the grid, and each unit (one inversion: a factor, or one diagonal block of a cut one)
to one rank of that column. With columns of one rank (placement owner) a block's units therefore share an owner; with
one column of all ranks (replicated) every unit is placed on its own.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from kfac_dist.config.schema import AssignmentStrategy
from kfac_dist.distributed.assignment.grid import Grid


@dataclass(frozen=True)
class WorkItem:
    """One inversion: the unit that is assigned.

    Attributes:
        name: Unique name of the unit.
        block: Name of the block whose gradient needs it.
        cost: Cost of the inversion, in any unit that is the same for all items; 0 for free items.
        nbytes: Bytes of the result, as held by the ranks of its column.
    """

    name: str
    block: str
    cost: float
    nbytes: int


@dataclass(frozen=True)
class Assignment:
    """The rank that inverts each unit, and the ranks that precondition each block.

    Attributes:
        grid: The ranks.
        owners: Unit name to the rank that inverts it.
        columns: Block name to the column whose ranks hold its inverses and precondition it.
        items: The assigned items, in the caller's order.
    """

    grid: Grid
    owners: Mapping[str, int]
    columns: Mapping[str, int]
    items: tuple[WorkItem, ...]

    def workers(self, block: str) -> tuple[int, ...]:
        """Ranks that hold the block's inverses and precondition its gradient."""
        return self.grid.worker_group(self.columns[block])

    def load(self) -> tuple[float, ...]:
        """Cost of the inversions of each rank."""
        load = [0.0] * self.grid.world_size
        for item in self.items:
            load[self.owners[item.name]] += item.cost
        return tuple(load)

    def held_bytes(self) -> tuple[int, ...]:
        """Bytes of inverses that each rank holds: those of all units of its column."""
        of_column = [0] * self.grid.columns
        for item in self.items:
            of_column[self.columns[item.block]] += item.nbytes
        return tuple(of_column[self.grid.column_of(rank)] for rank in range(self.grid.world_size))

    def imbalance(self) -> float:
        """Largest load of a rank over the mean load: 1 is perfect, W is one rank doing everything."""
        load = self.load()
        mean = sum(load) / len(load)
        return max(load) / mean if mean else 1.0


def assign(items: Sequence[WorkItem], grid: Grid, strategy: AssignmentStrategy) -> Assignment:
    """Assigns blocks to columns and units to the ranks of their block's column.

    `round_robin` deals blocks over columns and units over each column's ranks in the order of `items`, which has to be
    the same on every rank. `balanced` is longest processing time first (Graham 1969), which is within 4/3 of the best:
    blocks over columns by the cost of all their units (columns are equally large), then each column's units over its
    ranks. Ties go to the lower name, so that the order of `items` is without effect.

    Raises:
        ValueError: Two units share a name, or a cost is negative or not finite.
    """
    _check(items)
    match strategy:
        case AssignmentStrategy.ROUND_ROBIN:
            columns, owners = _deal(items, grid)
        case AssignmentStrategy.BALANCED:
            columns, owners = _balance(items, grid)
    return Assignment(grid, MappingProxyType(owners), MappingProxyType(columns), tuple(items))


def _deal(items: Sequence[WorkItem], grid: Grid) -> tuple[dict[str, int], dict[str, int]]:
    columns: dict[str, int] = {}
    owners: dict[str, int] = {}
    dealt = [0] * grid.columns
    for item in items:
        column = columns.setdefault(item.block, len(columns) % grid.columns)
        owners[item.name] = grid.rank_at(dealt[column] % grid.group_size, column)
        dealt[column] += 1
    return columns, owners


def _balance(items: Sequence[WorkItem], grid: Grid) -> tuple[dict[str, int], dict[str, int]]:
    units: dict[str, list[WorkItem]] = {}
    for item in items:
        units.setdefault(item.block, []).append(item)
    # fsum: the order of `items` must not reach the last bit of a cost, and by it the plan.
    block_costs = [(block, math.fsum(item.cost for item in of_block)) for block, of_block in units.items()]
    columns = _longest_first(block_costs, range(grid.columns))
    of_column: list[list[tuple[str, float]]] = [[] for _ in range(grid.columns)]
    for item in items:
        of_column[columns[item.block]].append((item.name, item.cost))
    owners: dict[str, int] = {}
    for column, costs in enumerate(of_column):
        owners |= _longest_first(costs, grid.worker_group(column))
    return columns, owners


def _longest_first(costs: Iterable[tuple[str, float]], bins: Sequence[int]) -> dict[str, int]:
    """Name to bin: the costliest goes first, each to the least loaded bin (then the emptiest, then the first)."""
    heap = [(0.0, 0, bin_) for bin_ in bins]  # sorted, hence a heap
    placed: dict[str, int] = {}
    for name, cost in sorted(costs, key=lambda named: (-named[1], named[0])):
        load, count, bin_ = heap[0]
        heapq.heapreplace(heap, (load + cost, count + 1, bin_))
        placed[name] = bin_
    return placed


def _check(items: Sequence[WorkItem]) -> None:
    names: set[str] = set()
    for item in items:
        if item.name in names:
            raise ValueError(f"two units are named {item.name!r}")
        names.add(item.name)
        if not math.isfinite(item.cost) or item.cost < 0:
            raise ValueError(f"unit {item.name!r} has cost {item.cost}: costs are finite and at least 0")
