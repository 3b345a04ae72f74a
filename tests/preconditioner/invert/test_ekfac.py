"""EKFAC over ranks: the same parameters on one rank and on three, wherever blocks are preconditioned; exact resume."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_dist.errors import CheckpointError
from kfac_dist.preconditioner.memory import rank_bytes
from tests.harness import run_ranks
from tests.preconditioner.test_invariance import configuration, mathematics, train_all
from tests.preconditioner.test_state import go_on, interrupted
from tests.preconditioner.workloads import Run, relative

# Looser than other solvers': a basis follows the last bits of its factor as eigenvalues come close to each other, and
# measured second moments, unlike the eigenvalues themselves, depend on the basis.
TOLERANCE = 1e-4
TOKEN = {"curvature": {"loss_terms": "token"}}
EVERY_STEP = {"inversion": {"rescale_every": 1}}


def ekfac(**options: Any) -> dict[str, Any]:
    return configuration("ekfac", **options)


CASES = [
    *(
        ("mlp", ekfac(placement=placement, reduction=reduction, **EVERY_STEP))
        for placement, reduction in itertools.product(["replicated", "owner"], ["all_reduce", "reduce_scatter"])
    ),
    ("mlp", ekfac(inversion={"stagger": 2, "inverse_lag": 1}, placement="owner", reduce_every="step")),
    ("mlp", ekfac(inversion={"max_factor_dim": 5}, fisher="mc", assignment="balanced")),
    ("mlp", ekfac(fisher="type2", curvature={"sample_fraction": 0.5})),
    ("conv", ekfac(placement="owner", reduction="reduce_scatter")),
    ("conv", ekfac(curvature={"sharing": "reduce"}, fisher="mc")),
    ("token", ekfac(**TOKEN, placement="owner")),
    ("token", ekfac(curvature={"loss_terms": "token", "sharing": "reduce"})),
]
GRID = [
    ("mlp", ekfac(placement="hybrid", grad_worker_fraction=0.5, reduction=r)) for r in ("all_reduce", "reduce_scatter")
]
STATES = [
    {
        "curvature": {"factor_every": 2, "decay": 0.8},
        "inversion": {"solver": "ekfac", "inverse_every": 4, "damping": 0.05, **inversion},
        "distribution": distribution,
    }
    for inversion, distribution in [
        ({"stagger": 2, "inverse_lag": 1}, {}),
        ({"rescale_every": 1}, {"placement": "owner"}),
        ({"inverse_lag": 3}, {"placement": "owner", "reduction": "reduce_scatter"}),
        ({}, {"reduction": "reduce_scatter"}),
    ]
]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """Results of one process, which knows nothing of distribution."""
    unique = {repr((name, mathematics(config))): (name, mathematics(config)) for name, config in (*CASES, *GRID)}
    return dict(zip(unique, run_ranks(1, train_all, list(unique.values()), process_group=False)[0], strict=True))


@pytest.mark.parametrize(("size", "cases"), [(3, CASES), (4, GRID)])
def test_ranks_and_placements_leave_the_parameters_alone(
    size: int, cases: list[tuple[str, dict[str, Any]]], alone: dict[str, dict[str, Tensor]]
) -> None:
    by_rank = run_ranks(size, train_all, cases)
    for index, (name, config) in enumerate(cases):
        expected = alone[repr((name, mathematics(config)))]
        errors = [relative(results[index], expected) for results in by_rank]
        assert max(errors) < TOLERANCE, (name, config)
        assert all(relative(results[index], by_rank[0][index]) == 0 for results in by_rank), (name, config)


def test_it_is_another_method_than_eigen(alone: dict[str, dict[str, Tensor]]) -> None:
    name, config = CASES[0]
    [plain] = run_ranks(1, train_all, [(name, mathematics(configuration("eigen")))], process_group=False)[0]
    assert relative(alone[repr((name, mathematics(config)))], plain) > 0.01


def test_resuming_is_exact_and_goes_on_under_other_plans() -> None:
    by_rank = run_ranks(3, interrupted, STATES)
    for results in by_rank:
        assert [(full, sharded) for full, sharded, _, _ in results] == [(True, True)] * len(STATES)
    saved, wanted = by_rank[0][1][2:]
    for results in run_ranks(2, go_on, [({**STATES[1], "distribution": {}}, saved)]):
        assert relative(results[0], wanted) < TOLERANCE


def test_state_of_another_solver_has_no_moments() -> None:
    eigen, moments = (
        Run("mlp", {"inversion": {"solver": solver, "inverse_every": 10}}) for solver in ("eigen", "ekfac")
    )
    with pytest.raises(CheckpointError, match="no second moments of 32 values for '4'"):
        moments.kfac.load_state_dict(eigen.kfac.state_dict())


def plan_and_traffic(config: dict[str, Any]) -> tuple[int, dict[str, int], int]:
    """This rank's bytes by the plan; and calls in a step that measures, of as many layers."""
    run = Run("mlp", config)
    run.train(6)
    kept = rank_bytes(run.kfac.monitor.plan, run.kfac.solver_access.config, sharded=False)[run.rank]
    before = dict(run.kfac.communicator.traffic.calls)
    run.train(1, first=6)  # measures, and refreshes nothing
    calls = {key: count - before.get(key, 0) for key, count in run.kfac.communicator.traffic.calls.items()}
    assert run.kfac._parts.moments is not None
    numel = run.kfac._parts.moments.averages.average.numel()
    run.close()
    return kept.factors, calls, numel


def test_the_plan_counts_what_is_kept() -> None:
    moments = 9 * 11 + 12 * 7 + 8 * 4
    lean = ekfac(placement="owner", reduction="reduce_scatter", reduce_every="step", inversion={"early_refresh": 0})
    for config, owned in ((ekfac(), False), (lean, True)):
        plain = run_ranks(2, plain_factors, {**config, "inversion": {"solver": "eigen", "inverse_every": 4}})
        for (factors, calls, numel), without in zip(run_ranks(2, plan_and_traffic, config), plain, strict=True):
            assert factors - without == numel * (4 if owned else 8)
            assert calls["moments"] == 3 + 1  # a bucket a layer, of at most four; weights and votes in one
            assert (numel < moments) if owned else (numel == moments)


def plain_factors(config: dict[str, Any]) -> int:
    run = Run("mlp", config)
    kept = rank_bytes(run.kfac.monitor.plan, run.kfac.solver_access.config, sharded=False)[run.rank].factors
    run.close()
    return kept


def test_a_step_that_is_not_taken_leaves_no_trace() -> None:
    run = Run("mlp", {"curvature": {"factor_every": 1}, "inversion": {"solver": "ekfac", "inverse_every": 10}})
    run.train(2)
    assert run.kfac._parts.moments is not None
    before = run.kfac._parts.moments.averages.average.clone(), run.kfac._parts.moments.averages.scalars.clone()
    run.gradients(2)
    next(run.model.parameters()).grad.fill_(torch.inf)
    run.kfac.step()
    run.gradients(3)
    run.kfac.discard()
    after = run.kfac._parts.moments.averages.average, run.kfac._parts.moments.averages.scalars
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def quotients(**curvature: Any) -> list[Tensor]:
    """S/w of a layer after each of three measurements between two of the factors', at unmoved parameters."""
    inversion = {"solver": "ekfac", "inverse_every": 4, "rescale_every": 1, "early_refresh": 0}
    run = Run("mlp", {"curvature": {"factor_every": 4, **curvature}, "inversion": inversion})
    moments, found = run.kfac._parts.moments, []
    assert moments is not None
    for step in range(4):
        run.gradients(step)
        run.kfac.step()
        if step:
            found.append(moments._quotient(moments.plan.units[0]).clone())
    run.close()
    return found


def test_a_ramped_average_is_the_mean_of_what_was_measured_between_factors_too() -> None:
    one_by_one = quotients(decay=1e-9)
    ramped = quotients(decay=0.99, decay_ramp=True)
    for count in range(1, 4):
        torch.testing.assert_close(ramped[count - 1], torch.stack(one_by_one[:count]).mean(dim=0))
    assert not torch.allclose(one_by_one[0], one_by_one[1])
