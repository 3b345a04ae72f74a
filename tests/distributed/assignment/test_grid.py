from __future__ import annotations

import pytest

from kfac_dist.config.schema import Placement
from kfac_dist.distributed.assignment.grid import Grid, build_grid
from kfac_dist.errors import ConfigError


def test_the_grid_of_the_docstring() -> None:
    grid = Grid(6, 2)
    assert grid.worker_groups() == ((0, 2, 4), (1, 3, 5))
    assert grid.rows() == ((0, 1), (2, 3), (4, 5))
    assert (grid.group_size, grid.column_of(5), grid.row_of(5), grid.rank_at(2, 1)) == (3, 1, 2, 5)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12])
def test_columns_and_rows_partition_the_ranks_and_cross_once(size: int) -> None:
    for columns in (c for c in range(1, size + 1) if size % c == 0):
        grid = Grid(size, columns)
        for partition in (grid.worker_groups(), grid.rows()):
            assert sorted(rank for group in partition for rank in group) == list(range(size))
        for rank in range(size):
            assert grid.worker_group(grid.column_of(rank))[grid.row_of(rank)] == rank
            assert grid.row(grid.row_of(rank))[grid.column_of(rank)] == rank
            assert grid.rank_at(grid.row_of(rank), grid.column_of(rank)) == rank


def test_placements_are_grids() -> None:
    assert build_grid(Placement.REPLICATED, 6) == Grid(6, 1)
    assert build_grid(Placement.OWNER, 6) == Grid(6, 6)
    assert build_grid(Placement.HYBRID, 6, 0.5) == Grid(6, 2)
    assert build_grid(Placement.HYBRID, 6, 1.0) == build_grid(Placement.REPLICATED, 6)
    assert build_grid(Placement.HYBRID, 6, 1 / 6) == build_grid(Placement.OWNER, 6)
    assert build_grid(Placement.NODE, 8, local_world_size=4) == Grid(8, 4)
    # Two nodes of four: each block's inverses are on one rank of each node.
    assert build_grid(Placement.NODE, 8, local_world_size=4).worker_group(1) == (1, 5)


def test_fraction_may_be_written_with_two_decimals() -> None:
    assert build_grid(Placement.HYBRID, 3, 0.33) == Grid(3, 3)
    assert build_grid(Placement.HYBRID, 4096, 1 / 4096) == Grid(4096, 4096)


@pytest.mark.parametrize(("size", "fraction"), [(6, 0.4), (6, 0.01), (6, 4 / 6), (4, 0.75), (5, 0.5), (4, None)])
def test_fraction_that_does_not_fit_is_told_the_allowed_ones(size: int, fraction: float | None) -> None:
    with pytest.raises(ConfigError) as caught:
        build_grid(Placement.HYBRID, size, fraction)
    message = str(caught.value)
    assert message.startswith(f"kfac.distribution.grad_worker_fraction: {fraction} of {size} ranks")
    assert {4: "0.25, 0.5, 1", 5: "0.2, 1", 6: "0.166667, 0.333333, 0.5, 1"}[size] in message


def test_uneven_nodes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"placement: node needs the same number .* 6 ranks .* 4 on this one"):
        build_grid(Placement.NODE, 6, local_world_size=4)


def test_what_the_caller_must_have_settled() -> None:
    with pytest.raises(ValueError, match="auto is resolved"):
        build_grid(Placement.AUTO, 4)
    with pytest.raises(ValueError, match="6 ranks can't stand in rows of 4"):
        Grid(6, 4)
