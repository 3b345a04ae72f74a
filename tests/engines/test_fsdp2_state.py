"""K-FAC's state under `fully_shard`: it goes on under DDP, on other numbers of ranks, and exactly where it stopped."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from tests.engines.fsdp2_runs import Case, Training, mesh_of, needs_sharding
from tests.harness import run_ranks
from tests.preconditioner.test_invariance import TOLERANCE, configuration
from tests.preconditioner.workloads import relative

pytestmark = needs_sharding

LEAN = {"reduction": "reduce_scatter", "reduce_every": "step"}
DIAGONAL = {"uncovered": "diagonal"}
CASES = [
    Case("scaled", configuration(curvature=DIAGONAL)),
    Case("mlp", configuration("eigen", inversion={"stagger": 2, "inverse_lag": 1, "max_factor_dim": 6}, **LEAN)),
    Case("mlp", configuration("ekfac", inversion={"inverse_lag": 1, "rescale_every": 1}, **LEAN)),
    Case("token", configuration(curvature={"loss_terms": "token"}, **LEAN)),
]
# Mesh of `fully_shard`, or None for DDP; ranks; and how far.
CHAIN: list[tuple[tuple[int, ...] | None, int, int]] = [((3,), 3, 5), (None, 2, 9), ((2, 2), 4, 14), (None, 1, 20)]

Saved = tuple[dict[str, Tensor], dict[str, Any]]


def go_on(shape: tuple[int, ...] | None, first: int, stop: int, saved: list[Saved] | None) -> list[Saved]:
    results: list[Saved] = []
    mesh = None if shape is None else mesh_of(shape)
    for index, case in enumerate(CASES):
        training = Training(case, mesh, None if saved is None else saved[index][0])
        if saved is not None:
            training.kfac.load_state_dict(saved[index][1])
        parameters = training.train(stop, first)
        results.append((parameters, training.kfac.state_dict()))
        training.close()
    return results


def flat(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a nested state, by path."""
    if isinstance(state, dict):
        return {key: value for name, part in state.items() for key, value in flat(part, f"{prefix}/{name}").items()}
    return {prefix: state}


def test_a_run_changes_engines_and_ranks_on_its_way() -> None:
    [straight] = run_ranks(1, go_on, None, 0, 20, None)
    saved: list[Saved] | None = None
    first = 0
    for shape, size, stop in CHAIN:
        by_rank = run_ranks(size, go_on, shape, first, stop, saved)
        for other in by_rank[1:]:
            for (_, state), (_, wanted) in zip(other, by_rank[0], strict=True):
                found, expected = flat(state), flat(wanted)
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[key], value) for key, value in expected.items())
        saved, first = by_rank[0], stop
    assert saved is not None
    for case, (parameters, state), (wanted, _) in zip(CASES, saved, straight, strict=True):
        assert relative(parameters, wanted) < TOLERANCE, case
        assert ("diagonal" in state) == (case.model == "scaled")
    sums = saved[0][1]["diagonal"]["sums"]
    assert {name: tuple(values.shape) for name, values in sums.items()} == {
        "gain": (2,),
        "mixing": (8, 8),
    }


def stopped_and_straight() -> float:
    """Largest difference between a run that was stopped at step 7 and one that wasn't."""
    worst = 0.0
    mesh = mesh_of((3,))
    for case in CASES:
        straight = Training(case, mesh)
        weights = straight.train(7)
        held = copy.deepcopy(straight.kfac.sharded_state_dict())
        local = straight.kfac.solver_access.local_statistics()
        resumed = Training(case, mesh, weights)
        resumed.kfac.load_sharded_state_dict(held)
        resumed.kfac.solver_access.load_local_statistics(local)
        wanted, found = straight.train(14, 7), resumed.train(14, 7)
        worst = max(worst, *(float((found[name] - value).abs().max()) for name, value in wanted.items()))
        straight.close()
        resumed.close()
    return worst


def test_a_resumed_run_has_the_same_bits() -> None:
    assert run_ranks(3, stopped_and_straight) == [0.0] * 3
