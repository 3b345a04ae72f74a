"""KAISA's grid of ranks: a column preconditions a block, rows share the result (Pauloski et al. 2021).

The W ranks stand in rows of `columns` ranks; here W = 6 and columns = 2:

                 column 0   column 1
        row 0      0          1          rank = row * columns + column
        row 1      2          3
        row 2      4          5

A *column* is a group of gradient workers. Every block belongs to one column: its ranks hold the block's inverses (each
unit inverted by one of them, then broadcast down the column) and each of them preconditions the block's gradient.
A *row* is a run of consecutive ranks: its member in column c hands the gradients that column c preconditioned to the
rest of the row. The named placements are grids:

    replicated   columns = 1                     one column of all ranks: inverses travel, gradients don't (COMM-OPT)
    owner        columns = W                     columns of one rank: gradients travel, inverses don't (MEM-OPT)
    hybrid       columns = 1 / fraction          a block's inverses on fraction · W ranks
    node         columns = ranks of one node     a row is a node: inverses once per node, gradients stay inside it
"""

from __future__ import annotations

from dataclasses import dataclass

from kfac_dist.config.schema import Placement
from kfac_dist.errors import ConfigError

# grad_worker_fraction is written in decimals: 0.33 of 3 ranks means one rank.
_ROUNDING = 0.02


@dataclass(frozen=True)
class Grid:
    """`world_size` ranks in rows of `columns` ranks; the module draws it.

    Raises:
        ValueError: `columns` does not divide `world_size`.
    """

    world_size: int
    columns: int

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.columns < 1 or self.world_size % self.columns:
            raise ValueError(f"{self.world_size} ranks can't stand in rows of {self.columns}")

    @property
    def group_size(self) -> int:
        """Ranks in a column: how many hold the inverses of one block."""
        return self.world_size // self.columns

    def column_of(self, rank: int) -> int:
        """Column of a rank: the blocks of this column are preconditioned here."""
        return rank % self.columns

    def row_of(self, rank: int) -> int:
        """Row of a rank: the ranks with which it trades preconditioned gradients."""
        return rank // self.columns

    def rank_at(self, row: int, column: int) -> int:
        """The rank that stands at a row and a column."""
        return row * self.columns + column

    def worker_group(self, column: int) -> tuple[int, ...]:
        """Ranks of a column, ascending: the gradient workers of its blocks."""
        return tuple(range(column, self.world_size, self.columns))

    def worker_groups(self) -> tuple[tuple[int, ...], ...]:
        """All columns: a partition of the ranks."""
        return tuple(self.worker_group(column) for column in range(self.columns))

    def row(self, index: int) -> tuple[int, ...]:
        """Ranks of a row, ascending; the position in it is the column."""
        return tuple(range(index * self.columns, (index + 1) * self.columns))

    def rows(self) -> tuple[tuple[int, ...], ...]:
        """All rows: a partition of the ranks."""
        return tuple(self.row(index) for index in range(self.group_size))


def build_grid(
    placement: Placement, world_size: int, grad_worker_fraction: float | None = None, local_world_size: int = 1
) -> Grid:
    """The grid of a placement.

    Args:
        placement: A concrete placement: the caller, which knows the engine, resolves `auto`.
        world_size: Ranks of the run.
        grad_worker_fraction: Share of the ranks that precondition one block; `hybrid` only.
        local_world_size: Ranks of one node; `node` only.

    Raises:
        ConfigError: The fraction, or the node, doesn't fit this number of ranks.
    """
    match placement:
        case Placement.REPLICATED:
            return Grid(world_size, 1)
        case Placement.OWNER:
            return Grid(world_size, world_size)
        case Placement.HYBRID:
            return Grid(world_size, world_size // _workers(world_size, grad_worker_fraction))
        case Placement.NODE:
            if world_size % local_world_size:
                raise ConfigError(
                    f"kfac.distribution.placement: node needs the same number of ranks on every node, but {world_size} "
                    f"ranks are not a multiple of the {local_world_size} on this one; use replicated, owner or hybrid"
                )
            return Grid(world_size, local_world_size)
        case Placement.AUTO:
            raise ValueError("placement auto is resolved before the grid is built: replicated, or owner when sharded")


def _workers(world_size: int, fraction: float | None) -> int:
    workers = round((fraction or 0.0) * world_size)
    fits = workers >= 1 and world_size % workers == 0
    if fraction is None or not fits or abs(fraction * world_size - workers) > _ROUNDING:
        divisors = [count for count in range(1, world_size + 1) if world_size % count == 0]
        allowed = ", ".join(f"{count / world_size:.6g}" for count in divisors)
        raise ConfigError(
            f"kfac.distribution.grad_worker_fraction: {fraction} of {world_size} ranks is no number of ranks that "
            f"divides {world_size}; allowed with {world_size} ranks: {allowed}"
        )
    return workers
