from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_dist.config.schema import AssignmentStrategy
from kfac_dist.distributed.assignment.assign import WorkItem, assign
from kfac_dist.distributed.assignment.grid import Grid

ROUND_ROBIN, BALANCED = AssignmentStrategy.ROUND_ROBIN, AssignmentStrategy.BALANCED


def units(**blocks: tuple[float, ...]) -> list[WorkItem]:
    return [
        WorkItem(f"{block}.{index}", block, cost, nbytes=8)
        for block, costs in blocks.items()
        for index, cost in enumerate(costs)
    ]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[WorkItem], Grid]:
    columns, rows = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    cost = st.one_of(st.just(0.0), st.integers(1, 5).map(float), st.floats(0, 1e9))
    blocks = draw(st.lists(st.lists(cost, min_size=1, max_size=3), max_size=12))
    return units(**{f"block{index}": tuple(costs) for index, costs in enumerate(blocks)}), Grid(columns * rows, columns)


@settings(deadline=None)
@given(problems(), st.sampled_from(AssignmentStrategy))
def test_units_go_to_ranks_of_their_blocks_column(problem: tuple[list[WorkItem], Grid], s: AssignmentStrategy) -> None:
    items, grid = problem
    plan = assign(items, grid, s)
    assert set(plan.owners) == {item.name for item in items}
    assert set(plan.columns) == {item.block for item in items}
    for item in items:
        assert plan.owners[item.name] in plan.workers(item.block)
        assert grid.column_of(plan.owners[item.name]) == plan.columns[item.block]
    assert sum(plan.load()) == pytest.approx(sum(item.cost for item in items))
    assert sum(plan.held_bytes()) == grid.group_size * sum(item.nbytes for item in items)


@settings(deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_balanced_does_not_depend_on_the_order_of_items(problem: tuple[list[WorkItem], Grid], shuffle: object) -> None:
    items, grid = problem
    shuffled = list(items)
    shuffle.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = assign(items, grid, BALANCED), assign(shuffled, grid, BALANCED)
    assert (one.owners, one.columns) == (other.owners, other.columns)


@settings(deadline=None)
@given(problems())
def test_no_rank_gets_more_than_the_mean_and_one_unit(problem: tuple[list[WorkItem], Grid]) -> None:
    items, grid = problem
    plan = assign(items, Grid(grid.world_size, 1), BALANCED)
    costs = [item.cost for item in items]
    assert max(plan.load()) <= sum(costs) / grid.world_size + max([0.0, *costs]) + 1e-6


def test_round_robin_deals_in_order() -> None:
    items = units(a=(1, 1), b=(1, 1), c=(1, 1))
    replicated = assign(items, Grid(4, 1), ROUND_ROBIN)
    assert list(replicated.owners.values()) == [0, 1, 2, 3, 0, 1]
    owner = assign(items, Grid(4, 4), ROUND_ROBIN)
    assert list(owner.owners.values()) == [0, 0, 1, 1, 2, 2]
    hybrid = assign(items, Grid(4, 2), ROUND_ROBIN)
    assert dict(hybrid.columns) == {"a": 0, "b": 1, "c": 0}
    assert list(hybrid.owners.values()) == [0, 2, 1, 3, 0, 2]


def test_balanced_puts_the_longest_first() -> None:
    items = units(a=(3, 3), b=(2, 2), c=(2,))
    assert max(assign(items, Grid(2, 1), BALANCED).load()) == 7
    # Whole blocks on one rank each: {a} and {b, c}.
    owner = assign(items, Grid(2, 2), BALANCED)
    assert dict(owner.columns) == {"a": 0, "b": 1, "c": 1}
    assert owner.load() == (6, 6)
    assert owner.imbalance() == 1.0
    # Two columns of two: the same columns, units spread inside.
    hybrid = assign(items, Grid(4, 2), BALANCED)
    assert hybrid.load() == (3, 4, 3, 2)


def test_units_that_cost_nothing_are_spread_too() -> None:
    plan = assign(units(**{f"b{index}": (0.0,) for index in range(4)}), Grid(4, 4), BALANCED)
    assert sorted(plan.owners.values()) == [0, 1, 2, 3]
    assert plan.imbalance() == 1.0


def test_held_bytes_follow_the_placement() -> None:
    items = units(a=(1, 1), b=(1,))
    assert assign(items, Grid(2, 1), BALANCED).held_bytes() == (24, 24)
    assert assign(items, Grid(2, 2), BALANCED).held_bytes() == (16, 8)


def gpt2_small() -> list[WorkItem]:
    dims = [(768, 768)] * 4 * 12 + [(768, 3072), (3072, 768)] * 12
    return [
        WorkItem(f"layer{index}.{side}", f"layer{index}", float(n) ** 3, 4 * n * n)
        for index, pair in enumerate(dims)
        for side, n in zip("ag", pair, strict=True)
    ]


def test_balanced_beats_round_robin_on_a_transformer() -> None:
    grid = Grid(8, 1)
    assert assign(gpt2_small(), grid, BALANCED).imbalance() < 1.06
    assert assign(gpt2_small(), grid, ROUND_ROBIN).imbalance() > 1.3


@pytest.mark.parametrize("columns", [1, 8, 4096])
def test_thousands_of_ranks(columns: int) -> None:
    items = [WorkItem(f"layer{i}.{side}", f"layer{i}", float(i % 17) + 1, 4) for i in range(300) for side in "ag"]
    plan = assign(items, Grid(4096, columns), BALANCED)
    ranks = len(set(plan.owners.values()))
    assert ranks == (300 if columns == 4096 else 600)


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_bad_costs_are_refused(cost: float) -> None:
    with pytest.raises(ValueError, match=r"unit 'a\.0' has cost"):
        assign(units(a=(cost,)), Grid(1, 1), BALANCED)


def test_equal_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two units are named 'a\.0'"):
        assign(units(a=(1,)) * 2, Grid(1, 1), ROUND_ROBIN)
