"""K-FAC's state: resuming changes nothing, also under another number of ranks or another plan."""

from __future__ import annotations

import copy
import itertools
import time
import warnings
from typing import Any

import pytest
import torch

from kfac_dist import KFAC
from kfac_dist.errors import CheckpointError, CollectiveError, KFACError
from kfac_dist.preconditioner import state
from tests.harness import run_ranks
from tests.preconditioner.workloads import Run, mlp, relative

BEFORE, AFTER = 7, 9
BASE = {
    "curvature": {"factor_every": 2, "decay": 0.8},
    "inversion": {"inverse_every": 4, "damping": 0.05, "stagger": 2, "inverse_lag": 1},
}


def with_distribution(**distribution: Any) -> dict[str, Any]:
    return {**BASE, "distribution": distribution}


PLANS = [
    with_distribution(placement=placement, reduction=reduction, reduce_every=every)
    for placement, reduction, every in itertools.product(
        ["replicated", "owner"], ["all_reduce", "reduce_scatter"], ["refresh", "step"]
    )
]
# Saved after step 6: layers take turns, one refresh is being solved and another may be on its way.
FLAT = {
    "curvature": {"factor_every": 2, "decay": 0.8, "stagger": 2},
    "inversion": {"inverse_every": 4, "damping": 0.05, "stagger": 4, "inverse_lag": 3},
}
FLAT_PLANS = [FLAT, {**FLAT, "distribution": {"placement": "owner", "reduction": "reduce_scatter"}}]


def save(run: Run, *, sharded: bool = False) -> dict[str, Any]:
    state = run.kfac.sharded_state_dict() if sharded else run.kfac.state_dict()
    return copy.deepcopy({"kfac": state, "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()})


def resume(config: dict[str, Any], saved: dict[str, Any]) -> Run:
    saved = copy.deepcopy(saved)  # an optimizer goes on in the very tensors that it is given
    run = Run("mlp", config)
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.kfac.load_state_dict(saved["kfac"])
    return run


def interrupted(configs: list[dict[str, Any]]) -> list[tuple[bool, bool, dict[str, Any], Any]]:
    """For each plan: whether a resumed run, from the full and from the sharded state, equals the uninterrupted one."""
    results = []
    for config in configs:
        run = Run("mlp", config)
        run.train(BEFORE)
        full, sharded = save(run), save(run, sharded=True)
        wanted = run.train(AFTER, first=BEFORE)
        run.close()
        equal = []
        for saved in (full, sharded):
            again = resume(config, saved)
            got = again.train(AFTER, first=BEFORE)
            equal.append(all(torch.equal(got[key], wanted[key]) for key in wanted))
            again.close()
        results.append((equal[0], equal[1], full, wanted))
    return results


def go_on(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[Any]:
    """Resume each saved state under the plan beside it."""
    results = []
    for config, saved in pairs:
        run = resume(config, saved)
        results.append(run.train(AFTER, first=BEFORE))
        run.close()
    return results


@pytest.mark.parametrize("size", [1, 2, 3])
def test_resuming_is_exact_to_the_bit(size: int) -> None:
    for results in run_ranks(size, interrupted, [*PLANS, *FLAT_PLANS], timeout=120):
        assert all(full for full, _, _, _ in results)
        assert all(sharded for _, sharded, _, _ in results)


def test_state_resumes_under_another_plan_and_number_of_ranks() -> None:
    plans, others = [*PLANS, *FLAT_PLANS], [*reversed(PLANS), *reversed(FLAT_PLANS)]
    saved = run_ranks(3, interrupted, plans, timeout=120)[0]
    pairs = [(other, saved[index][2]) for index, other in enumerate(others)]
    for results in run_ranks(2, go_on, pairs, timeout=120):
        for index, got in enumerate(results):
            assert relative(got, saved[index][3]) < 1e-5, (others[index], plans[index])


def kfac_for(model: torch.nn.Module, **inversion: Any) -> KFAC:
    return KFAC(model, {"inversion": inversion}, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_state_of_another_model_is_refused_by_name() -> None:
    state = kfac_for(torch.nn.Sequential(torch.nn.Linear(8, 3))).state_dict()
    with pytest.raises(CheckpointError, match="4/A/0"):
        kfac_for(mlp()).load_state_dict(state)


def test_state_of_other_shapes_is_refused_by_name() -> None:
    state = kfac_for(torch.nn.Sequential(torch.nn.Linear(8, 3))).state_dict()
    with pytest.raises(CheckpointError, match=r"'0/A/0' has shape \(1, 9, 9\), this model's is \(1, 6, 6\)"):
        kfac_for(torch.nn.Sequential(torch.nn.Linear(5, 3))).load_state_dict(state)


def test_what_is_no_state_is_refused_by_the_key_that_it_lacks() -> None:
    for key in ("step", "shares", "refreshes"):
        state = kfac_for(mlp()).state_dict()
        del state[key]
        with pytest.raises(CheckpointError, match=f"no '{key}'"):
            kfac_for(mlp()).load_state_dict(state)


def test_state_of_another_solver_is_refused() -> None:
    with pytest.raises(CheckpointError, match="solver"):
        kfac_for(mlp(), solver="eigen").load_state_dict(kfac_for(mlp()).state_dict())


def test_state_resumes_with_other_slots_and_lag() -> None:
    saved = interrupted([{**BASE, "inversion": {**BASE["inversion"], "stagger": 1, "inverse_lag": 0}}])[0][2]
    run = resume(BASE, saved)
    assert all(bool(torch.isfinite(p).all()) for p in run.train(AFTER, first=BEFORE).values())


def test_state_is_weights_only_loadable(tmp_path: Any) -> None:
    run = Run("mlp", BASE)
    run.train(BEFORE)
    torch.save(run.kfac.state_dict(), tmp_path / "state.pt")
    again = Run("mlp", BASE).kfac
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.steps == BEFORE
    torch.testing.assert_close(again.state_dict(), run.kfac.state_dict(), rtol=0, atol=0)


def test_refreshes_are_counted_over_resumes() -> None:
    config = {"curvature": {"factor_every": 1}, "inversion": {"inverse_every": 2, "early_refresh": 0}}
    run = Run("mlp", config)
    run.train(BEFORE)
    again = resume(config, save(run))
    assert again.kfac.metrics()["refreshes"] == run.kfac.metrics()["refreshes"] == 4
    again.train(2, first=BEFORE)
    assert again.kfac.metrics()["refreshes"] == 5


def damped(*, old: bool = False) -> list[bool]:
    """Whether a resumed run goes on as the other does, whose damping was set and multiplied, with refreshes owed."""
    same = []
    for own in (None, 0.2):
        run = Run("mlp", BASE)
        run.train(BEFORE)
        run.kfac.solver_access.set_damping(own)
        run.kfac.solver_access.multiply_damping(10.0, refresh=True)
        saved = save(run)
        if old:
            del saved["kfac"]["damping"]
        again = resume(BASE, saved)
        same.append(again.kfac.solver_access.damping == run.kfac.solver_access.damping == 10 * (own or 0.05))
        wanted, found = run.train(AFTER, BEFORE), again.train(AFTER, BEFORE)
        same.append(all(torch.equal(found[name], value) for name, value in wanted.items()))
        again.kfac.solver_access.set_damping(None)
        same.append(again.kfac.solver_access.damping == again.kfac.solver_access.damping_factor * 0.05)
        run.close()
        again.close()
    return same


@pytest.mark.parametrize("size", [1, 2])
def test_what_a_run_has_made_of_its_damping_is_resumed(size: int) -> None:
    for same in run_ranks(size, damped, timeout=120):
        assert same == [True] * 6


def test_a_state_from_before_dampings_were_saved_leaves_them() -> None:
    run = Run("mlp", BASE)
    run.train(3)
    saved = save(run)
    del saved["kfac"]["damping"]
    again = Run("mlp", BASE)
    again.kfac.solver_access.multiply_damping(4.0)
    again.kfac.load_state_dict(saved["kfac"])
    assert again.kfac.solver_access.damping == pytest.approx(0.2)
    run.close()
    again.close()


def alone(call: str) -> tuple[str, list[str]]:
    """What rank 0 says that calls something alone, while rank 1 is elsewhere."""
    patience, state.PATIENCE = state.PATIENCE, 0.2
    run = Run("mlp", with_distribution(timeout_seconds=1.0))
    run.train(1)
    saved = run.kfac.state_dict()
    said = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if run.rank:
            time.sleep(1.5)
        else:
            try:
                method = getattr(run.kfac, call)
                method(saved) if call.startswith("load") else method()
            except CollectiveError as error:
                said = str(error)
    state.PATIENCE = patience
    return said, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("call", ["state_dict", "sharded_state_dict", "load_state_dict"])
def test_a_rank_that_is_alone_in_a_collective_call_says_so_soon(call: str) -> None:
    (said, warned), (nothing, quiet) = run_ranks(2, alone, call)
    assert f"rank 0 of 2 was alone in KFAC.{call}(), which every rank has to call" in said
    assert [text for text in warned if f"rank 0 of 2 has waited 0.2 s for the others in KFAC.{call}()" in text]
    assert (nothing, [text for text in quiet if "KFAC" in text]) == ("", [])


def differing() -> list[str]:
    """What each rank is told of calls that don't fit together; nobody waits."""
    run = Run("mlp", BASE)
    states = []
    for step in range(2):
        run.step(step)
        states.append(copy.deepcopy(run.kfac.state_dict()))
    broken = {key: value for key, value in states[0].items() if key != "units"}
    calls = [
        lambda: run.kfac.load_state_dict(states[0]) if run.rank else run.kfac.state_dict(),
        lambda: run.kfac.load_state_dict(states[run.rank]),
        lambda: run.kfac.load_state_dict(broken if run.rank else states[0]),
    ]
    said = []
    for call in calls:
        try:
            call()
            said.append("")
        except KFACError as error:
            said.append(f"{type(error).__name__}: {error}")
    run.kfac.load_state_dict(states[1])
    run.close()
    return said


def test_ranks_that_load_different_states_are_told_on_all_of_them() -> None:
    mine, theirs = run_ranks(2, differing)
    assert mine[0].startswith("CollectiveError: rank 0 called KFAC.state_dict(), rank 1 KFAC.load_state_dict()")
    assert theirs[0].startswith("CollectiveError: rank 1 called KFAC.load_state_dict(), rank 0 KFAC.state_dict()")
    different = "CheckpointError: ranks load K-FAC states of different steps: [1, 2], by rank; load one state on all"
    assert mine[1] == theirs[1] == different
    assert theirs[2].startswith("CheckpointError: the K-FAC state has no unit")
    assert mine[2].startswith("CheckpointError: rank 1: the K-FAC state has no unit")


def test_what_was_on_its_way_is_used_at_once_where_there_is_no_lag() -> None:
    """Saved after step 4, whose refresh of slot 0 a run with a lag of 3 uses from step 7 on."""
    inversion = {"inverse_every": 4, "damping": 0.05, "early_refresh": 0}
    run = Run("mlp", {**BASE, "inversion": {**inversion, "inverse_lag": 3}}, lr=0.0)
    run.train(5)
    again = resume({**BASE, "inversion": inversion}, save(run))
    old = run.kfac.solver_access.inverses()
    run.train(3, 5)
    again.step(5)
    for name, value in run.kfac.solver_access.inverses().items():
        assert not torch.equal(value, old[name])
        assert torch.equal(again.kfac.solver_access.inverses()[name], value)
    run.close()
    again.close()


def test_a_state_from_before_the_first_refresh_forgets_the_bases() -> None:
    config = {**BASE, "inversion": {"solver": "ekfac", "inverse_every": 4, "damping": 0.05}}
    run = Run("mlp", config)
    first = save(run)
    wanted = run.train(4)
    run.model.load_state_dict(first["model"])
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    run.kfac.load_state_dict(first["kfac"])
    found = run.train(4)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    run.close()
