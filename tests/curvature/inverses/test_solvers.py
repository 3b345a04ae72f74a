"""Solvers against dense inverses in float64, and what happens to matrices that can't be inverted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kfac_dist.config.schema import Solver
from kfac_dist.curvature.factors import FactorKind, Side, Unit
from kfac_dist.curvature.inverses import solvers
from kfac_dist.curvature.inverses.solvers import Task, is_eigen, newton_schulz, payload_numel, solve, tikhonov
from tests.curvature.measured import assert_close

NAN, INF = float("nan"), float("inf")
INVERTERS = [Solver.CHOLESKY, Solver.NEWTON_SCHULZ]
DECOMPOSERS = [Solver.EIGEN, Solver.EKFAC]


def unit_of(n: int, batch: int = 1, side: Side = Side.A, kind: FactorKind = FactorKind.DENSE, index: int = 0) -> Unit:
    return Unit("layer", side, index, 0, n, batch, kind)


def positive(n: int, batch: int = 1, condition: float = 50.0, seed: int = 0) -> Tensor:
    """Symmetric positive definite matrices with eigenvalues from 1/condition to 1."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(batch, n, n, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(-math.log10(condition), 0, n, dtype=torch.float64) if n > 1 else torch.ones(1).double()
    return q @ torch.diag(values) @ q.mT


def stale_below(matrix: Tensor) -> Tensor:
    """Only the upper triangle counts; the rest may hold anything."""
    return torch.where(torch.ones_like(matrix).tril(-1).bool(), 7.0, matrix).float()


def solve_one(matrix: Tensor, solver: Solver, damping: float, previous: Tensor | None = None, **unit: object) -> Tensor:
    own = unit_of(matrix.shape[-1], matrix.shape[0], **unit)  # type: ignore[arg-type]
    (payload,), failures = solve([Task(own, matrix, damping, previous)], solver)
    assert failures == 0
    assert payload is not None
    assert payload.numel() == payload_numel(own, solver)
    return payload


def damped_inverse(matrix: Tensor, damping: float) -> Tensor:
    return torch.linalg.inv(matrix.double() + damping * torch.eye(matrix.shape[-1], dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 257])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("solver", INVERTERS)
def test_inverses(n: int, batch: int, solver: Solver) -> None:
    matrix = positive(n, batch)
    assert_close(solve_one(stale_below(matrix), solver, 0.1).view(batch, n, n), damped_inverse(matrix, 0.1), 1e-4)


@pytest.mark.parametrize("n", [1, 2, 17, 257])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("solver", DECOMPOSERS)
def test_eigenbases(n: int, batch: int, solver: Solver) -> None:
    """Q is orthogonal and `Q diag(d) Qᵀ` is the matrix itself: damping comes later."""
    matrix = positive(n, batch)
    payload = solve_one(stale_below(matrix), solver, 0.0)
    vectors, values = payload[: batch * n * n].view(batch, n, n), payload[batch * n * n :].view(batch, 1, n)
    assert_close(vectors @ vectors.mT, torch.eye(n).expand(batch, -1, -1))
    assert_close((vectors * values) @ vectors.mT, matrix)
    assert (values >= 0).all()


def test_negative_rounding_of_eigenvalues_is_clamped() -> None:
    row = torch.randn(1, 1, 9, generator=torch.Generator().manual_seed(0))
    payload = solve_one(row.mT @ row, Solver.EIGEN, 0.0)  # rank one: eight eigenvalues round to either side of zero
    assert (payload[81:] >= 0).all()


@pytest.mark.parametrize("solver", list(Solver))
def test_unit_wise_blocks_are_inverted_by_every_solver(solver: Solver) -> None:
    matrix = positive(2, 40)
    payload = solve_one(stale_below(matrix), solver, 0.2, side=Side.F)
    assert_close(payload.view(40, 2, 2), damped_inverse(matrix, 0.2))


@pytest.mark.parametrize("solver", list(Solver))
def test_diagonals(solver: Solver) -> None:
    values = torch.tensor([[0.0, 0.5, 2.0]])
    payload = solve_one(values.clone(), solver, 0.25, kind=FactorKind.DIAGONAL)
    expected = values if solver in DECOMPOSERS else 1 / (values + 0.25)
    assert_close(payload, expected.flatten())


def test_equal_sizes_share_a_batch_without_mixing_anything() -> None:
    """Different dampings, batches and sides of one size; another size and a diagonal between them."""
    makers: Sequence[tuple[int, int, float, Side]] = [
        (5, 1, 0.1, Side.A),
        (5, 3, 1.0, Side.G),
        (2, 1, 0.3, Side.A),
        (5, 2, 0.01, Side.A),
        (5, 4, 0.5, Side.F),
    ]
    for solver in Solver:
        matrices = [positive(n, batch, seed=i) for i, (n, batch, _, _) in enumerate(makers)]
        tasks = [
            Task(unit_of(n, batch, side, index=i), stale_below(m), damping, None)
            for i, ((n, batch, damping, side), m) in enumerate(zip(makers, matrices, strict=True))
        ]
        tasks.insert(2, Task(unit_of(4, kind=FactorKind.DIAGONAL), torch.ones(1, 4), 1.0, None))
        matrices.insert(2, torch.ones(1, 4, 4))
        payloads, failures = solve(tasks, solver)
        assert failures == 0
        for task, matrix, payload in zip(tasks, matrices, payloads, strict=True):
            assert payload is not None
            if task.unit.kind is FactorKind.DENSE and not is_eigen(task.unit, solver):
                assert_close(payload.view(task.unit.shape), damped_inverse(matrix, task.damping), 1e-4)


@pytest.mark.parametrize("n", [40, 300])
@pytest.mark.parametrize("solver", list(Solver))
def test_sums_are_divided_by_their_weight_and_left_alone(n: int, solver: Solver) -> None:
    """The running average is what is handed over: nothing may write into it."""
    sums = stale_below(positive(n) * 8)
    before = sums.clone()
    (payload,), _ = solve([Task(unit_of(n), sums, 0.1, None, weight=8.0)], solver)
    (plain,), _ = solve([Task(unit_of(n), sums / 8, 0.1, None)], solver)
    assert payload is not None
    assert plain is not None
    assert torch.equal(payload, plain)
    assert torch.equal(sums, before)


# ---- failures


def broken(kind: str, n: int = 4) -> Tensor:
    matrix = positive(n).float()
    match kind:
        case "nan":
            matrix[0, 0, 1] = NAN
        case "nan on the diagonal":
            matrix[0, 2, 2] = NAN
        case "inf":
            matrix[0, 1, 1] = INF
        case _:
            matrix -= 1e6 * torch.eye(n)
    return matrix


@pytest.mark.parametrize("kind", ["nan", "nan on the diagonal", "inf", "indefinite"])
@pytest.mark.parametrize("solver", list(Solver))
@pytest.mark.parametrize("known", [True, False])
def test_a_failure_keeps_the_last_payload_and_harms_nobody(kind: str, solver: Solver, known: bool) -> None:
    if solver in DECOMPOSERS and kind == "indefinite":
        pytest.skip("an eigendecomposition doesn't mind")
    good, bad = positive(4).float(), broken(kind)
    previous = torch.arange(float(payload_numel(unit_of(4), solver))) if known else None
    tasks = [
        Task(unit_of(4, index=0), good.clone(), 0.1, None),
        Task(unit_of(4, index=1), bad, 0.1, previous),
        Task(unit_of(4, index=2), good.clone(), 0.1, None),
        # One bad matrix among the groups of a unit: the unit fails whole.
        Task(unit_of(4, 2, index=3), torch.cat([good, bad]), 0.1, None),
    ]
    (first, second, third, fourth), failures = solve(tasks, solver)
    assert failures == 2
    assert fourth is None
    assert second is previous
    (alone,), _ = solve([Task(unit_of(4), good.clone(), 0.1, None)], solver)
    for payload in (first, third):
        assert payload is not None
        assert alone is not None
        assert_close(payload, alone)


@pytest.mark.parametrize("value", [NAN, INF, -1e6])
def test_a_large_unit_that_fails_keeps_its_last_payload(value: float) -> None:
    matrix = positive(300).float()
    matrix[0, 200, 200] = value
    previous = torch.ones(300 * 300)
    (payload,), failures = solve([Task(unit_of(300), matrix, 0.1, previous)], Solver.CHOLESKY)
    assert payload is previous
    assert failures == 1


@pytest.mark.parametrize("solver", list(Solver))
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_diagonal_that_is_not_finite_keeps_the_last_payload(solver: Solver, bad: float) -> None:
    previous = torch.ones(3)
    unit = unit_of(3, kind=FactorKind.DIAGONAL)
    (payload,), failures = solve([Task(unit, torch.tensor([[1.0, bad, 2.0]]), 0.1, previous)], solver)
    assert payload is previous
    assert failures == 1


@pytest.mark.parametrize("solver", INVERTERS)
def test_what_fp32_cannot_factorise_float64_can(solver: Solver) -> None:
    """Rank one, with a damping below fp32's resolution of its trace."""
    row = torch.full((1, 1, 30), 1e3)
    matrix, damping = row.mT @ row, 1e-3
    payload = solve_one(matrix.clone(), solver, damping).view(1, 30, 30)
    exact = damped_inverse(matrix, damping)
    probe = torch.zeros(30, 1, dtype=torch.float64)
    probe[0], probe[1] = 1, -1  # orthogonal to the row: only the damping acts
    assert_close(payload.double() @ probe, exact @ probe, 1e-3)


@pytest.mark.parametrize("solver", INVERTERS)
def test_slightly_indefinite_matrices_get_more_damping(solver: Solver) -> None:
    """Eigenvalue −0.5 at damping 0.1: ten times the damping makes it positive, and that is what is inverted."""
    matrix = torch.diag(torch.tensor([2.0, -0.5, 1.0]))[None]
    payload = solve_one(matrix.clone(), solver, 0.1).view(1, 3, 3)
    assert_close(payload, damped_inverse(matrix, 1.0))


# ---- Tikhonov


@given(
    a=st.floats(1e-6, 1e6),
    g=st.floats(1e-6, 1e6),
    dim_a=st.integers(1, 5000),
    dim_g=st.integers(1, 5000),
    damping=st.floats(1e-8, 10),
)
def test_tikhonov_splits_by_mean_eigenvalues(a: float, g: float, dim_a: int, dim_g: int, damping: float) -> None:
    on_a, on_g = tikhonov(a, dim_a, g, dim_g, damping)
    assert on_a * on_g == pytest.approx(damping)
    assert on_a / on_g == pytest.approx((a / dim_a) / (g / dim_g))


@pytest.mark.parametrize(
    ("a", "g"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (-1.0, 1.0)]
)
def test_tikhonov_without_usable_traces(a: float, g: float) -> None:
    assert tikhonov(a, 3, g, 5, 0.04) == pytest.approx((0.2, 0.2))


# ---- Newton–Schulz


def iterations(matrix: Tensor, start: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many iterations are needed: the smallest limit under which the result is good."""
    for limit in range(1, 100):
        monkeypatch.setattr(solvers, "_NEWTON_SCHULZ_STEPS", limit)
        if bool(newton_schulz(matrix, start)[1].all()):
            return limit
    return 100


@pytest.mark.parametrize("condition", [1.5, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("n", [2, 30])
def test_newton_schulz_converges_cold(condition: float, n: int) -> None:
    matrix = positive(n, 2, condition)
    inverse, good = newton_schulz(matrix, torch.zeros_like(matrix))
    assert good.all()
    assert_close(inverse, torch.linalg.inv(matrix), 1e-3)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e5])
@pytest.mark.parametrize("n", [30, 100])
def test_newton_schulz_converges_in_fp32(condition: float, n: int) -> None:
    """It is for GPUs, which work in fp32: no residual may be asked that rounding doesn't allow."""
    matrix = positive(n, 2, condition)
    inverse, good = newton_schulz(matrix.float(), torch.zeros(2, n, n))
    assert good.all()
    assert_close(inverse, torch.linalg.inv(matrix), 1e-6 * condition)


def test_newton_schulz_warm_start_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = positive(12, 1, 1e3)
    cold = iterations(matrix, torch.zeros_like(matrix), monkeypatch)
    moved = 0.95 * matrix + 0.05 * positive(12, 1, 1e3, seed=1) * 1e-2
    warm = iterations(moved, torch.linalg.inv(matrix), monkeypatch)
    assert cold <= 2 * math.log2(1e3) + 6
    assert warm <= 6 < cold


def test_newton_schulz_starts_cold_where_the_last_inverse_is_useless() -> None:
    matrix = positive(8, 3)
    start = torch.stack([torch.linalg.inv(matrix[0]), -torch.eye(8).double(), torch.full((8, 8), NAN).double()])
    inverse, good = newton_schulz(matrix, start)
    assert good.all()
    assert_close(inverse, torch.linalg.inv(matrix))


def drifted(n: int, share: float) -> tuple[Tensor, Tensor]:
    """Two factors as training makes them: the later one has a share of other rows; spectra fall as 1/k."""
    generator = torch.Generator().manual_seed(0)
    scales = (1 / torch.arange(1, n + 1)).sqrt()
    before, other = (
        rows.mT @ rows / len(rows) for rows in (torch.randn(4 * n, n, generator=generator) * scales for _ in range(2))
    )
    mean = before.diagonal().mean()
    return before[None] / mean, torch.lerp(before, other, share)[None] / mean


@pytest.mark.parametrize(("n", "share", "limit"), [(64, 0.05, 4), (512, 0.05, 4), (512, 0.15, 6)])
def test_newton_schulz_starts_warm_at_any_size(
    n: int, share: float, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At n = 512 the residual's spectrum has a radius of 0.2 and 0.6, but its Frobenius norm is 2 and 7."""
    before, matrix = (factor + 1e-3 * torch.eye(n) for factor in drifted(n, share))
    start = torch.linalg.inv(before)
    monkeypatch.setattr(solvers, "_NEWTON_SCHULZ_STEPS", limit)
    inverse, good = newton_schulz(matrix, start)
    assert good.all()
    assert_close(inverse, torch.linalg.inv(matrix.double()), 1e-3)
    assert not newton_schulz(matrix, torch.zeros_like(matrix))[1].any()


def test_newton_schulz_starts_cold_from_what_would_diverge() -> None:
    """In one batch with a start that helps: a spectrum half in and half out of the unit circle, and others far away."""
    n = 512
    matrix = torch.cat([factor + 1e-3 * torch.eye(n) for factor in drifted(n, 0.05)] * 2 + [torch.eye(n)[None]])
    start = torch.linalg.inv(matrix)
    start[0] *= torch.linspace(0.5, 2.5, n)
    start[1] *= 1e12
    start[2] = NAN
    start[4] -= torch.diag(torch.full((n - 1,), 2.05), 1)  # the residual has no spectrum, and powers that overflow
    inverse, good = newton_schulz(matrix, start)
    assert good.all()
    assert_close(inverse, torch.linalg.inv(matrix.double()), 1e-3)


def test_newton_schulz_that_leaves_a_warm_start_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trusted at first, then spoilt as rounding might: the result is found from nothing, not given up."""
    matrix = positive(30, 2, 1e3)
    calls, exact = 0, torch.baddbmm

    def spoilt(*operands: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return exact(*operands) * (-1e3 if calls == 4 else 1)

    monkeypatch.setattr(torch, "baddbmm", spoilt)
    monkeypatch.setattr(solvers, "_NEWTON_SCHULZ_RESIDUAL", 1e-12)
    inverse, good = newton_schulz(matrix, 0.8 * torch.linalg.inv(matrix))
    assert calls > 10
    assert good.all()
    assert_close(inverse, torch.linalg.inv(matrix))


def test_newton_schulz_uses_the_previous_payload_of_solve() -> None:
    matrix = positive(6, 2).float()
    first = solve_one(matrix.clone(), Solver.NEWTON_SCHULZ, 0.1)
    again = solve_one(matrix.clone(), Solver.NEWTON_SCHULZ, 0.1, previous=first)
    assert_close(again.view(2, 6, 6), damped_inverse(matrix, 0.1), 1e-5)


@pytest.mark.parametrize("solver", [*INVERTERS, *DECOMPOSERS])
@pytest.mark.parametrize("kind", [FactorKind.DENSE, FactorKind.DIAGONAL])
def test_what_is_not_positive_definite_with_its_damping_is_told_of(solver: Solver, kind: FactorKind) -> None:
    values = torch.tensor([[2.0, -0.5, 1.0]])
    sums = torch.diag_embed(values) if kind is FactorKind.DENSE else values
    good = torch.diag_embed(values.abs()) if kind is FactorKind.DENSE else values.abs()
    raised: dict[str, str] = {}
    tasks = [Task(unit_of(3, kind=kind), sums, 0.01, None), Task(unit_of(3, kind=kind, index=1), good, 0.01, None)]
    (payload, _), failures = solve(tasks, solver, None, raised)
    assert failures == 0
    assert payload is not None
    assert list(raised) == ["layer/A/0"]
    if solver in INVERTERS:
        assert raised["layer/A/0"] == "inverted with 100 times its damping 0.01"
        found = payload.view(3, 3).diagonal() if kind is FactorKind.DENSE else payload
        torch.testing.assert_close(found, 1 / (values[0] + 1.0))
    else:
        assert raised["layer/A/0"] == "its eigenvalue -0.5 taken for 0"
        assert (payload[-3:] >= 0).all()


@pytest.mark.parametrize("solver", [*INVERTERS, *DECOMPOSERS])
def test_rounding_is_not_told_of(solver: Solver) -> None:
    rows = torch.randn(1, 5, 40, generator=torch.Generator().manual_seed(0))
    raised: dict[str, str] = {}
    solve([Task(unit_of(40), rows.mT @ rows, 1e-3, None)], solver, None, raised)
    assert raised == {}
