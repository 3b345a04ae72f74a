"""Running averages against the formula of the method: bias-corrected by their weights, transactional, linear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_dist.curvature.factors import FactorKind, FactorSpec, Side, units_of
from kfac_dist.curvature.gram import complete
from kfac_dist.curvature.statistics import RunningAverages
from tests.curvature.measured import assert_close

SPECS = {
    "linear": (FactorSpec(Side.A, 6), FactorSpec(Side.G, 3)),
    "grouped": (FactorSpec(Side.A, 5, 2), FactorSpec(Side.G, 2, 2)),
    "table": (FactorSpec(Side.A, 9, kind=FactorKind.DIAGONAL), FactorSpec(Side.G, 4)),
    "norm": (FactorSpec(Side.F, 2, 7),),
}
TAKEN, SKIPPED = torch.tensor(True), torch.tensor(False)


def build(decay: float = 0.9, max_dim: int | None = None, **options: object) -> RunningAverages:
    units = [unit for name, specs in SPECS.items() for unit in units_of(name, specs, max_dim)]
    return RunningAverages(units, units, decay=decay, device=torch.device("cpu"), **options)  # type: ignore[arg-type]


def everything(averages: RunningAverages) -> slice:
    return averages.layout.span(0, len(averages.layout.units))


def window(seed: int, rows: int) -> dict[tuple[str, Side], tuple[Tensor, float]]:
    """Rows of one step and their counts, for every factor."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (name, spec.side): (torch.randn(spec.batch, rows, spec.dim, generator=generator), float(rows))
        for name, specs in SPECS.items()
        for spec in specs
    }


def add(averages: RunningAverages, step: dict[tuple[str, Side], tuple[Tensor, float]]) -> None:
    for (name, side), (rows, count) in step.items():
        kind = next(spec.kind for spec in SPECS[name] if spec.side is side)
        if kind is FactorKind.DIAGONAL:
            averages.add_values(name, side, rows.square().sum(1))
        elif side is Side.F:
            averages.add_values(name, side, rows.mT @ rows)
        else:
            averages.add_rows(name, side, rows, scale=1.0, ones=False)
        averages.add_count(name, side, count)


def exact_sum(name: str, side: Side, rows: Tensor) -> Tensor:
    rows = rows.double()
    diagonal = any(spec.kind is FactorKind.DIAGONAL for spec in SPECS[name] if spec.side is side)
    return rows.square().sum(1) if diagonal else rows.mT @ rows


def take(averages: RunningAverages, taken: Tensor = TAKEN) -> None:
    span = everything(averages)
    averages.close(span)
    averages.advance(span, taken)
    averages.release()


def assert_factors(averages: RunningAverages, sums: dict, weights: dict, tolerance: float = 1e-5) -> None:
    for unit in averages.layout.units:
        key = unit.block, unit.side
        found = averages.sums(unit).double().clone()
        weight, trace = averages.scalars[:, averages.layout.index(unit)].double()
        expected = sums[key][..., unit.start : unit.stop]
        if unit.kind is FactorKind.DENSE:
            found, expected = complete(found), expected[:, unit.start : unit.stop]
            total = expected.diagonal(dim1=1, dim2=2).sum()
        else:
            total = expected.sum()
        assert_close(found / weight, expected / weights[key], tolerance)
        assert_close(weight[None], torch.tensor([weights[key]], dtype=torch.float64))
        assert_close(trace[None], total[None])


@settings(max_examples=15, deadline=None)
@given(
    decay=st.sampled_from([0.0, 0.5, 0.95]),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    max_dim=st.sampled_from([None, 2, 4]),
    transient=st.booleans(),
)
def test_average_is_the_formula(decay: float, sizes: list[int], max_dim: int | None, transient: bool) -> None:
    """`S ← βS + (1−β)Σ, w ← βw + (1−β)count` with uneven counts, whole or in pieces."""
    averages = build(decay, max_dim, transient_window=transient)
    sums = dict.fromkeys(window(0, 1), 0.0)
    weights = dict.fromkeys(sums, 0.0)
    for seed, size in enumerate(sizes):
        step = window(seed, size)
        add(averages, step)
        take(averages)
        for key, (rows, count) in step.items():
            sums[key] = decay * sums[key] + (1 - decay) * exact_sum(*key, rows)
            weights[key] = decay * weights[key] + (1 - decay) * count
    assert_factors(averages, sums, weights)


def test_the_first_average_is_the_first_batch() -> None:
    """Bias-corrected from the first step on: no identity, no shrinkage, whatever the decay."""
    averages, step = build(0.99), window(3, 8)
    add(averages, step)
    take(averages)
    assert_factors(
        averages,
        {key: exact_sum(*key, rows) * 0.01 for key, (rows, _) in step.items()},
        {key: count * 0.01 for key, (_, count) in step.items()},
    )


def test_several_micro_batches_make_one_window() -> None:
    averages, one, two = build(0.0), window(1, 5), window(2, 3)
    add(averages, one)
    add(averages, two)
    take(averages)
    sums = {key: exact_sum(*key, one[key][0]) + exact_sum(*key, two[key][0]) for key in one}
    assert_factors(averages, sums, dict.fromkeys(one, 8.0))


def test_a_layer_that_did_not_run_decays_its_sum_and_its_weight_alike() -> None:
    averages, step = build(0.8), window(1, 5)
    add(averages, step)
    take(averages)
    rest = {key: value for key, value in window(2, 4).items() if key[0] != "grouped"}
    add(averages, rest)
    take(averages)
    for unit in averages.layout.units:
        if unit.block == "grouped":
            rows, count = step[unit.block, unit.side]
            weight = averages.scalars[0, averages.layout.index(unit)]
            assert_close(weight[None], torch.tensor([0.8 * 0.2 * count]))
            assert_close(
                complete(averages.sums(unit).double().clone()) / weight, exact_sum(unit.block, unit.side, rows) / count
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_window_that_is_not_finite_is_dropped_from_sum_and_weight(bad: float, dtype: torch.dtype) -> None:
    """The factor afterwards is what it was: both halves of the quotient only decayed."""
    averages, step = build(0.5, dtype=dtype), window(1, 5)
    add(averages, step)
    take(averages)
    before, scalars = averages.average.clone(), averages.scalars.clone()
    poisoned = window(2, 5)
    poisoned["norm", Side.F][0][2, 1, 0] = bad
    add(averages, poisoned)
    take(averages)
    assert torch.equal(averages.average, before * 0.5)
    assert torch.equal(averages.scalars, scalars * 0.5)
    # And nothing of it lingers in the next window.
    clean = window(3, 4)
    add(averages, clean)
    take(averages)
    assert torch.isfinite(averages.average).all()
    assert torch.isfinite(averages.scalars).all()


def test_a_count_that_is_not_finite_is_dropped_too() -> None:
    averages = build(0.5)
    add(averages, window(1, 5))
    averages.add_count("norm", Side.F, torch.tensor(float("nan")))
    take(averages)
    assert not averages.average.any()
    assert not averages.scalars.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poisoned", [False, True])
def test_a_skipped_step_leaves_everything_bit_for_bit(dtype: torch.dtype, poisoned: bool) -> None:
    averages = build(0.9, dtype=dtype)
    for seed in range(3):
        add(averages, window(seed, 5))
        take(averages)
    average, scalars = averages.average.clone(), averages.scalars.clone()
    step = window(9, 7)
    if poisoned:
        step["linear", Side.A][0].fill_(float("inf"))
    add(averages, step)
    take(averages, SKIPPED)
    assert torch.equal(averages.average, average)
    assert torch.equal(averages.scalars, scalars)
    # The window starts afresh: the next step is as if the skipped one had never been measured.
    other = build(0.9, dtype=dtype)
    for seed in (0, 1, 2, 4):
        add(other, window(seed, 5))
        take(other)
    add(averages, window(4, 5))
    take(averages)
    assert torch.equal(averages.average, other.average)
    assert torch.equal(averages.scalars, other.scalars)


def test_discard_forgets_the_window() -> None:
    averages, expected = build(0.0), build(0.0)
    add(averages, window(1, 5))
    averages.discard()
    for each in (averages, expected):
        add(each, window(2, 3))
        take(each)
    assert torch.equal(averages.average, expected.average)
    assert torch.equal(averages.scalars, expected.scalars)


def test_blend_and_adopt_equal_advance() -> None:
    """The deferred path: W ranks blend their share, add up and adopt; the sum of two halves is the whole."""
    blended, advanced = build(0.7), build(0.7)
    for seed in range(4):
        for averages in (blended, advanced):
            add(averages, window(seed, 3 + seed))
        take(advanced)
        span = everything(blended)
        blended.close(span)
        blended.blend(span, 0.5)
        blended.window.mul_(2)  # the sum over two ranks that hold the same
        blended.window_scalars.mul_(2)
        blended.adopt(span)
    assert_close(blended.average, advanced.average, 1e-6)
    assert_close(blended.scalars, advanced.scalars, 1e-6)


def test_blend_leaves_the_average_alone_until_it_is_adopted() -> None:
    averages = build(0.7)
    add(averages, window(0, 3))
    take(averages)
    before = averages.average.clone()
    add(averages, window(1, 3))
    averages.close(everything(averages))
    averages.blend(everything(averages), 1.0)
    assert torch.equal(averages.average, before)


def test_spans_close_and_advance_independently() -> None:
    averages, whole, step = build(0.5), build(0.5), window(0, 5)
    for each in (averages, whole):
        add(each, step)
    take(whole)
    count = len(averages.layout.units)
    for first, last in ((3, count), (0, 3)):
        span = averages.layout.span(first, last)
        averages.close(span)
        averages.advance(span, TAKEN)
    assert torch.equal(averages.average, whole.average)
    assert torch.equal(averages.scalars, whole.scalars)


def test_held_units_only() -> None:
    """The memory-lean mode: a rank keeps the averages of the units it owns."""
    full = build(0.5)
    units = full.layout.units
    held = [units[1], units[4]]
    lean = RunningAverages(units, held, decay=0.5, device=torch.device("cpu"), transient_window=True)
    for seed in range(2):
        for averages in (full, lean):
            add(averages, window(seed, 4))
        take(full)
        span = everything(lean)
        lean.close(span)
        own = torch.cat([lean.layout.view(lean.window, unit).flatten() for unit in held])
        lean.advance(span, TAKEN, own)
        lean.release()
    assert lean.average.numel() == sum(unit.numel for unit in held)
    for unit in held:
        assert torch.equal(lean.sums(unit), full.sums(unit))


@pytest.mark.parametrize("decay", [0.9, 0.95])  # the schema refuses a slower one in bfloat16
def test_bfloat16_storage_does_not_lose_the_scale(decay: float) -> None:
    """A constant factor must be found however slowly the average moves: increments below its precision add up."""
    averages = build(decay, dtype=torch.bfloat16)
    step = window(0, 6)
    for _ in range(int(3 / (1 - decay))):
        add(averages, step)
        take(averages)
    for unit in averages.layout.units:
        rows, count = step[unit.block, unit.side]
        expected = exact_sum(unit.block, unit.side, rows) / count
        found = averages.sums(unit).double().clone() / averages.scalars[0, averages.layout.index(unit)].double()
        assert_close(complete(found) if unit.kind is FactorKind.DENSE else found, expected, 0.05)
