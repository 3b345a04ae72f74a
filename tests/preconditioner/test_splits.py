"""Sub-blocks as units of their own, spread over the ranks: the same training on one rank and on three."""

from __future__ import annotations

from typing import Any

import pytest

from kfac_dist.errors import CheckpointError
from kfac_dist.preconditioner.plan import build_plan
from tests.harness import run_ranks
from tests.preconditioner.test_invariance import TOLERANCE, configuration, mathematics, train_all
from tests.preconditioner.workloads import Run, relative

SPLITS = {"splits": {"0": {"outputs": 3, "inputs": [4, 4]}, "2": 2}}
CASES = [
    ("mlp", configuration(inversion=SPLITS)),
    ("mlp", configuration("newton_schulz", inversion=SPLITS, placement="owner", reduction="reduce_scatter")),
    ("mlp", configuration("eigen", inversion={**SPLITS, "max_factor_dim": 3}, assignment="balanced")),
    ("mlp", configuration("ekfac", inversion=SPLITS, placement="owner")),
    ("conv", configuration(inversion={"splits": {"grouped": "per_group", "stem": {"inputs": 3}}}, reduce_every="step")),
]


def test_sub_blocks_leave_the_parameters_alone() -> None:
    alone = run_ranks(1, train_all, [(n, mathematics(config)) for n, config in CASES], process_group=False)[0]
    for results in run_ranks(3, train_all, CASES):
        for (name, config), parameters, expected in zip(CASES, results, alone, strict=True):
            assert relative(parameters, expected) < TOLERANCE, (name, config)


def test_each_sub_block_may_have_another_owner() -> None:
    run = Run("mlp", configuration(inversion=SPLITS))
    plan = build_plan(run.kfac.coverage.blocks, run.kfac.solver_access.config, world_size=3)
    assert [unit.dim for unit in plan.blocks["0"].units] == [4, 5, 3, 4, 4]
    assert plan.blocks["0"].owners == (0, 1, 2, 0, 1)
    assert plan.blocks["0"].inversion_cost == 4**3 + 5**3 + 3**3 + 4**3 + 4**3
    run.close()


def state_of(**inversion: Any) -> dict[str, Any]:
    run = Run("mlp", {"inversion": {"inverse_every": 10, **inversion}})
    state = run.kfac.state_dict()
    run.close()
    return state


def test_a_state_of_other_splits_is_refused() -> None:
    run = Run("mlp", {"inversion": {"inverse_every": 10, "splits": {"2": {"outputs": 2}}}})
    run.kfac.load_state_dict(state_of(splits={"2": {"outputs": [3, 4]}}))
    for other in ({}, {"2": {"outputs": [2, 5]}}):
        with pytest.raises(CheckpointError, match="max_factor_dim or splits"):
            run.kfac.load_state_dict(state_of(splits=other))
    run.close()
