"""The same global batches on any number of ranks, under any plan, give the same parameters."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from torch import Tensor

from tests.harness import run_ranks
from tests.preconditioner.workloads import Run, relative

STEPS = 12  # three refreshes, the last of which even a lag of three steps has used
TOLERANCE = 1e-5
# The bound that a reduction in bf16 leaves: eight bits of mantissa, through an inverse.
BF16_TOLERANCE = 5e-2


def configuration(
    solver: str = "cholesky",
    fisher: str = "empirical",
    *,
    curvature: Any = (),
    inversion: Any = (),
    **distribution: Any,
) -> dict[str, Any]:
    return {
        "curvature": {
            "fisher": fisher,
            "likelihood": "categorical",
            "factor_every": 2,
            "decay": 0.8,
            **dict(curvature),
        },
        "inversion": {"solver": solver, "inverse_every": 4, "damping": 0.05, **dict(inversion)},
        "distribution": distribution,
    }


def placements(size: int) -> list[dict[str, Any]]:
    hybrid = [{"placement": "hybrid", "grad_worker_fraction": 0.5}] if size % 2 == 0 else []
    return [{"placement": "replicated"}, {"placement": "owner"}, *hybrid]


def grid(size: int) -> list[tuple[str, dict[str, Any]]]:
    """Placements × assignments × reductions × times, with the solvers dealt over them; then single options."""
    solvers = itertools.cycle(["cholesky", "eigen", "newton_schulz"])
    combined = [
        (
            "mlp",
            configuration(next(solvers), assignment=assignment, reduction=reduction, reduce_every=every, **placement),
        )
        for placement, assignment, reduction, every in itertools.product(
            placements(size), ["round_robin", "balanced"], ["all_reduce", "reduce_scatter"], ["refresh", "step"]
        )
    ]
    single = [
        ("mlp", configuration(pack_triangles=True, reduction="reduce_scatter")),
        ("mlp", configuration(pack_triangles=True, overlap=False, buckets=1)),
        ("mlp", configuration("eigen", pack_triangles=True, placement="owner")),
        ("mlp", configuration(inversion={"max_factor_dim": 4}, reduction="reduce_scatter", placement="owner")),
        ("mlp", configuration("eigen", inversion={"max_factor_dim": 5})),
        ("mlp", configuration(inversion={"stagger": 2})),
        ("mlp", configuration(inversion={"stagger": 2}, reduction="reduce_scatter", placement="owner")),
        ("mlp", configuration(inversion={"inverse_lag": 2})),
        ("mlp", configuration(curvature={"stagger": 2}, inversion={"stagger": 4})),
        ("mlp", configuration(curvature={"stagger": 2}, inversion={"stagger": 2, "inverse_lag": 3})),
        (
            "mlp",
            configuration("newton_schulz", curvature={"stagger": 2}, inversion={"stagger": 4}, reduce_every="step"),
        ),
        (
            "conv",
            configuration(
                "eigen",
                curvature={"stagger": 2},
                inversion={"stagger": 4, "inverse_lag": 2},
                reduction="reduce_scatter",
                placement="owner",
            ),
        ),
        ("mlp", configuration(inversion={"stagger": 2, "inverse_lag": 1}, placement="owner", reduce_every="step")),
        ("mlp", configuration(fisher="mc")),
        ("mlp", configuration(fisher="type2", reduction="reduce_scatter")),
        ("mlp", configuration(fisher="input_only", placement="owner")),
        ("mlp", configuration("eigen", fisher="input_only")),
        ("mlp", configuration(curvature={"sample_fraction": 0.5})),
        ("conv", configuration()),
        ("conv", configuration("eigen", placement="owner", curvature={"sharing": "reduce"})),
        ("conv", configuration(curvature={"sharing": "reduce"}, fisher="mc", assignment="balanced")),
        ("token", configuration(curvature={"loss_terms": "token"})),
        ("token", configuration("eigen", curvature={"loss_terms": "token", "sharing": "reduce"}, placement="owner")),
        ("token", configuration(curvature={"loss_terms": "token"}, fisher="mc", reduction="reduce_scatter")),
    ]
    return combined + single if size < 4 else combined  # single options on up to three ranks, for time


def train_all(cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Tensor]]:
    results = []
    for name, config in cases:
        run = Run(name, config)
        results.append(run.train(STEPS))
        run.close()
    return results


def mathematics(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what is only about ranks."""
    return {key: value for key, value in config.items() if key != "distribution"}


@pytest.fixture(scope="module")
def alone() -> Any:
    """Results of one process, which knows nothing of distribution."""
    known: dict[str, dict[str, Tensor]] = {}

    def result(name: str, config: dict[str, Any]) -> dict[str, Tensor]:
        key = repr((name, mathematics(config)))
        if key not in known:
            [known[key]] = run_ranks(1, train_all, [(name, mathematics(config))], process_group=False)[0]
        return known[key]

    return result


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_and_plans_leave_the_parameters_alone(size: int, alone: Any) -> None:
    cases = grid(size)
    by_rank = run_ranks(size, train_all, cases, timeout=240)
    wrong = {}
    for index, (name, config) in enumerate(cases):
        errors = [relative(results[index], alone(name, config)) for results in by_rank]
        if max(errors) > TOLERANCE:
            wrong[f"{name} {config}"] = max(errors)
    assert not wrong


def test_ranks_hold_the_same_bits(alone: Any) -> None:
    cases = [("mlp", configuration(**placement)) for placement in placements(4)]
    for results in zip(*run_ranks(4, train_all, cases), strict=True):
        for other in results[1:]:
            assert all(bool((other[key] == value).all()) for key, value in results[0].items())


def test_bf16_on_the_wire_stays_close(alone: Any) -> None:
    cases = [
        ("mlp", configuration(communication_dtype="bfloat16")),
        ("mlp", configuration(communication_dtype="bfloat16", reduction="reduce_scatter", pack_triangles=True)),
        ("mlp", configuration(curvature={"factor_dtype": "bfloat16"})),
    ]
    exact = alone("mlp", configuration())
    for results in zip(*run_ranks(2, train_all, cases), strict=True):
        assert relative(results[0], results[1]) == 0
        assert 0 < relative(results[0], exact) < BF16_TOLERANCE
