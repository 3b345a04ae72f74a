"""Refreshing beside training: the same inverses as at once, later; failures that hang nobody."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_dist.preconditioner.invert import unit_solver as solving
from tests.harness import run_ranks
from tests.preconditioner.workloads import Run

LAG = 3


def config(lag: int, *, solver: str = "cholesky", **distribution: Any) -> dict[str, Any]:
    return {
        "curvature": {"factor_every": 2, "decay": 0.5},
        "inversion": {
            "solver": solver,
            "inverse_every": 4,
            "inverse_lag": lag,
            "early_refresh": 0,
            "damping": 0.05,
        },
        "distribution": distribution,
    }


def inverses_by_step(lag: int, solver: str, steps: int, distribution: dict[str, Any]) -> list[dict[str, Tensor]]:
    """What preconditions after each step, while the parameters stay where they are."""
    run = Run("mlp", config(lag, solver=solver, **distribution), lr=0.0)
    found = []
    for step in range(steps):
        run.step(step)
        found.append(run.kfac.solver_access.inverses())
    run.close()
    return found


def late_and_at_once(distribution: dict[str, Any]) -> list[bool]:
    same = []
    for solver in ("cholesky", "eigen", "newton_schulz"):
        once = inverses_by_step(0, solver, 12, distribution)
        late = inverses_by_step(LAG, solver, 12, distribution)
        for step in range(4, 12):
            # Refreshed after steps 4 and 8; the first inverses, of step 0, are used at once.
            begun = max(begun for begun in (0, 4, 8) if begun == 0 or begun + LAG <= step)
            same += [torch.equal(late[step][name], value) for name, value in once[begun].items()]
    return same


@pytest.mark.parametrize("size", [1, 2])
def test_lagging_inverses_are_those_of_the_step_that_began_them(size: int) -> None:
    for same in run_ranks(size, late_and_at_once, {"placement": "replicated"}, timeout=120):
        assert len(same) > 0
        assert all(same)


def test_training_goes_on_while_inverses_are_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("mlp", config(LAG))
    for step in range(4):
        run.step(step)
    went_on = threading.Event()
    seen: list[bool] = []
    solve = solving.solve

    def patient(*args: Any) -> Any:
        seen.append(went_on.wait(timeout=10))
        return solve(*args)

    monkeypatch.setattr(solving, "solve", patient)
    run.step(4)
    run.step(5)
    went_on.set()
    run.step(6)  # sends what has been solved, which waits for it
    assert seen == [True]
    run.close()


def fails_beside() -> tuple[bool, float, list[bool], list[bool]]:
    """Fail on rank 1 in the second refresh: what its last inverses were stays, on both ranks, and training goes on."""
    import torch.distributed as dist

    from kfac_dist.curvature.inverses import solvers

    run = Run("mlp", config(LAG))
    run.step(0)
    before = run.kfac.solver_access.inverses()
    for step in range(1, 4):
        run.step(step)
    solve_batch = solvers._solve_batch

    def out_of_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("planted")

    if dist.get_rank() == 1:
        solvers._solve_batch = out_of_memory
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4, 8):
            run.step(step)
    solvers._solve_batch = solve_batch
    after = run.kfac.solver_access.inverses()
    for step in range(8, 12):
        run.step(step)
    last = run.kfac.solver_access.inverses()
    said = any("planted" in str(warning.message) for warning in caught)
    failures = run.kfac.metrics()["failed_inversions"]
    owners = run.kfac.monitor.plan.assignment.owners
    names = [name for name in before if owners[name] == 1]
    run.close()
    kept = [torch.equal(before[name], after[name]) for name in names]
    return said, failures, kept, [torch.equal(after[name], last[name]) for name in names]


def test_a_solve_that_fails_beside_training_is_reported_and_the_same_on_all_ranks() -> None:
    (quiet, none, kept, stale), (said, some, kept_there, stale_there) = run_ranks(2, fails_beside, timeout=120)
    assert (quiet, none) == (False, 0)
    assert said
    assert some == len(kept) > 0
    assert all(kept)
    assert all(kept_there)
    assert not any(stale)
    assert not any(stale_there)


def test_a_layer_is_measured_in_its_turn_alone() -> None:
    """With no memory, each factor is that of the layer's last turn."""
    inversion = {"inverse_every": 4, "early_refresh": 0, "damping": 0.05}
    every = Run("mlp", {"curvature": {"factor_every": 1, "decay": 0.0}, "inversion": inversion}, lr=0.0)
    curvature = {"factor_every": 2, "decay": 0.0, "stagger": 2}
    turns = Run("mlp", {"curvature": curvature, "inversion": {**inversion, "stagger": 2}}, lr=0.0)
    wanted: list[dict[str, Tensor]] = []
    for step in range(5):
        every.step(step)
        wanted.append(every.factors())
        turns.step(step)
    plan = turns.kfac.monitor.plan
    found = turns.factors()
    assert {block.slot for block in plan.blocks.values()} == {0, 1}
    for unit in plan.units:
        measured = 4 if plan.blocks[unit.block].slot == 0 else 3
        torch.testing.assert_close(found[unit.name], wanted[measured][unit.name])
        assert not torch.allclose(found[unit.name], wanted[7 - measured][unit.name])
    every.close()
    turns.close()


SLOTS: dict[str, Any] = {
    "curvature": {"factor_every": 1, "decay": 0.5},
    "inversion": {"inverse_every": 8, "stagger": 4, "early_refresh": 0, "damping": 0.05},
}


def owed(solver: str, lag: int) -> tuple[list[dict[str, Tensor]], dict[str, int], bool]:
    """What preconditions after each step, where all refreshes are owed at step 17; each layer's slot.

    At last: whether a run that is resumed in the midst of it goes on with the same.
    """
    inversion = {**SLOTS["inversion"], "inverse_lag": lag, "solver": solver}
    run = Run("conv", {**SLOTS, "inversion": inversion}, lr=0.0)
    found, same = [], True
    again: Run | None = None
    for step in range(26):
        if step == 17:
            run.kfac.solver_access.multiply_damping(10.0, refresh=True)
        run.step(step)
        found.append(run.kfac.solver_access.inverses())
        if again is not None:
            again.step(step)
            same = same and all(
                torch.equal(value, found[-1][name]) for name, value in again.kfac.solver_access.inverses().items()
            )
        if step == 18:
            again = Run("conv", {**SLOTS, "inversion": inversion}, lr=0.0)
            again.kfac.load_state_dict(run.kfac.state_dict())
    slots = {unit.name: run.kfac.monitor.plan.blocks[unit.block].slot for unit in run.kfac.monitor.plan.units}
    run.close()
    assert again is not None
    again.close()
    return found, slots, same


def late_and_owed(solver: str) -> Any:
    once, slots, _ = owed(solver, 0)
    late, _, same = owed(solver, LAG)
    return once, late, slots, same


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("solver", ["cholesky", "eigen"])
def test_a_refresh_loses_none_that_are_on_their_way_for_others(size: int, solver: str) -> None:
    for once, late, slots, resumed in run_ranks(size, late_and_owed, solver, timeout=120):
        assert resumed
        assert set(slots.values()) == {0, 1, 2, 3}
        for name, slot in slots.items():
            assert not torch.equal(once[17][name], once[16][name]), "all are owed at step 17"
            # Slot 1 is due at step 18 anyway, when it goes over to what is on its way.
            first = 18 if slot == 1 else 20
            assert not torch.equal(late[first - 1][name], once[17][name])
            assert torch.equal(late[first][name], once[17][name])
            regular = 16 + 2 * slot if slot else 24
            for step in range(first, 26):
                begun = regular if regular + LAG <= step else 17
                assert torch.equal(late[step][name], once[begun][name]), (name, step)


def spoiled(solver: str, lag: int) -> tuple[list[str], float, bool]:
    """Warnings, counts and whether inverses are finite, where a layer's factor has a negative eigenvalue."""
    inversion = {"solver": solver, "inverse_every": 2, "inverse_lag": lag, "early_refresh": 0, "damping": 1e-4}
    run = Run("mlp", {"curvature": {"factor_every": 1, "decay": 0.5}, "inversion": inversion}, lr=0.0)
    run.step(0)
    unit = next(unit for unit in run.kfac.monitor.plan.units if unit.block == "0" and str(unit.side) == "A")
    said = []
    for step in range(1, 8):
        sums = run.kfac._parts.averages.sums(unit)
        values, vectors = torch.linalg.eigh(sums[0].triu() + sums[0].triu(1).T)
        values[0] = -20.0  # so much that half of it outweighs what the step measures
        sums[0].copy_(vectors @ values.diag() @ vectors.T)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.step(step)
        said += [str(warning.message) for warning in caught if "positive definite" in str(warning.message)]
    finite = all(bool(torch.isfinite(value).all()) for value in run.kfac.solver_access.inverses().values())
    count = run.kfac.metrics()["raised_dampings"]
    owner = run.kfac.monitor.plan.assignment.owners[unit.name] == run.rank
    run.close()
    return (said, count, finite) if owner else (["another's"], count, finite)


def all_spoiled() -> list[tuple[list[str], float, bool]]:
    return [spoiled(solver, lag) for solver in ("cholesky", "newton_schulz", "eigen", "ekfac") for lag in (0, 1)]


@pytest.mark.parametrize("size", [1, 2])
def test_factors_that_are_not_positive_definite_are_counted_and_told_of_once(size: int) -> None:
    by_rank = run_ranks(size, all_spoiled, timeout=120)
    for index in range(len(by_rank[0])):
        said, count, finite = next(own[index] for own in by_rank if own[index][0] != ["another's"])
        assert finite
        assert len(said) == 1
        assert "0/A/0 (" in said[0]
        assert "kfac.inversion.damping" in said[0]
        assert count >= 3
        for others, none, _ in (own[index] for own in by_rank if own[index][0] == ["another's"]):
            assert (others, none) == (["another's"], 0)
