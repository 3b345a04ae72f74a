"""The pace of a run: what is due, what is owed, and what was never refreshed."""

from __future__ import annotations

from typing import Any

from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.curvature.block_tridiagonal_units import find_all
from kfac_dist.preconditioner.invert.refresh_queue import RefreshQueue
from kfac_dist.preconditioner.invert.refresh_schedule import RefreshSchedule
from kfac_dist.preconditioner.plan import Plan, build_plan
from tests.preconditioner.workloads import deep


def planned(layers: int, world_size: int = 1, **sections: Any) -> tuple[RefreshQueue, Plan]:
    config = parse_kfac(sections)
    plan = build_plan(find_all(deep(layers), config).blocks, config, world_size=world_size)
    return RefreshQueue(RefreshSchedule.of(config), plan), plan


TURNS = {
    "curvature": {"factor_every": 2, "stagger": 2},
    "inversion": {"inverse_every": 8, "stagger": 8, "early_refresh": 0},
}


def test_slots_without_layers_are_left_out() -> None:
    pace, plan = planned(3, **TURNS)
    inhabited = {block.slot for block in plan.blocks.values()}
    assert len(inhabited) == 3
    for step in range(1, 17):
        pace.begin(step)
        assert set(pace.slots) <= set(pace.measured) <= inhabited


def test_a_skipped_refresh_is_made_up_for_by_the_next_step_that_measures() -> None:
    pace, _ = planned(8, **TURNS)
    pace.begin(0)
    assert len(pace.slots) == 8
    pace.skip()
    pace.begin(1)
    assert len(pace.slots) == 8
    assert pace.take(1, unmeasured=[5]) == 0  # the first refresh is used at once
    assert pace.overdue == {5}
    pace.begin(2)
    assert 5 in pace.slots
    assert 5 in pace.measured
    pace.take(2, unmeasured=[5])
    assert not pace.overdue  # asked once more, and no more


def test_slots_do_not_depend_on_the_number_of_ranks_and_parts_are_even() -> None:
    (_, alone), (_, many) = planned(16, **TURNS), planned(16, world_size=4, **TURNS)
    slots = {name: block.slot for name, block in alone.blocks.items()}
    assert slots == {name: block.slot for name, block in many.blocks.items()}
    part = {0: 0, 1: 0}
    for slot in slots.values():
        part[slot // 4] += 1
    assert part == {0: 8, 1: 8}
    assert all(list(slots.values()).count(slot) == 2 for slot in range(8))
