"""Gram matrices in upper block-triangles against the plain product in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_dist.curvature import gram as gram_module
from kfac_dist.curvature.gram import accumulate_gram, asymmetry, complete, gram, traces
from tests.curvature.measured import assert_close


def with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)


def exact(rows: Tensor, alpha: float) -> Tensor:
    rows = rows.double()
    return alpha * rows.mT @ rows


# One less than, equal to and more than where the matrix is cut into panels, with sizes that four doesn't divide.
@pytest.mark.parametrize("n", [1, 2, 7, 254, 255, 256, 257, 259, 514])
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_plain_product(n: int, ones: bool, batch: int) -> None:
    torch.manual_seed(n)
    width = n - ones
    first, second = torch.randn(batch, 11, width), torch.randn(batch, 4, width)
    # What lies below the diagonal blocks may be stale: nothing reads it.
    out = torch.full((batch, n, n), float("nan"))
    accumulate_gram(out, first, alpha=0.5, beta=0.0, ones=ones)
    accumulate_gram(out, second, alpha=2.0, beta=1.0, ones=ones)
    accumulate_gram(out, second, alpha=1.0, beta=0.25, ones=ones)
    one, two = (with_ones(rows) if ones else rows for rows in (first, second))
    expected = 0.25 * (exact(one, 0.5) + exact(two, 2.0)) + exact(two, 1.0)
    assert_close(traces(out)[None], expected.diagonal(dim1=1, dim2=2).sum()[None])
    found = complete(out)
    assert torch.equal(found, found.mT)
    assert_close(found, expected)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20),
    rows=st.integers(0, 9),
    batch=st.integers(1, 3),
    ones=st.booleans(),
    half=st.booleans(),
    alpha=st.floats(0.01, 100),
    beta=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_shape(n: int, rows: int, batch: int, ones: bool, half: bool, alpha: float, beta: float, seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.randn(batch, rows, n)
    values = values.bfloat16() if half else values
    start = torch.randn(batch, n + ones, n + ones)
    start = start + start.mT
    out = start.clone()
    accumulate_gram(out, values, alpha=alpha, beta=beta, ones=ones)
    expected = exact(with_ones(values) if ones else values, alpha) + beta * start.double()
    assert_close(complete(out), expected, 1e-5 if float(expected.norm()) else 1.0)


# ---- bf16 rows as they are: a GPU's product, and here one in its place


def product(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    assert left.dtype is right.dtype is torch.bfloat16
    return torch.matmul(left.double(), right.double()).to(out_dtype)


def rounded(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """A product whose sums are in bf16."""
    return product(left, right, torch.bfloat16).to(out_dtype)


def check_halves(device: str, n: int, ones: bool, batch: int) -> None:
    torch.manual_seed(n)
    first, second = (torch.randn(batch, 2 * m, n - ones + 3).bfloat16()[:, ::2, 3:] for m in (300, 4))  # strided rows
    out = torch.full((batch, n, n + 5), float("nan"), device=device)[..., :n]
    accumulate_gram(out, first.to(device), alpha=0.5, beta=0.0, ones=ones)
    accumulate_gram(out, second.to(device), alpha=2.0, beta=1.0, ones=ones)
    accumulate_gram(out, second.to(device), alpha=1.0, beta=0.25, ones=ones)
    accumulate_gram(out, second.to(device)[:, :0], alpha=1.0, beta=1.0, ones=ones)
    one, two = (with_ones(rows) if ones else rows for rows in (first, second))
    assert_close(complete(out.clone()).cpu(), 0.25 * (exact(one, 0.5) + exact(two, 2.0)) + exact(two, 1.0))


def use_product(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor]) -> None:
    monkeypatch.setattr(torch, "mm", kernel)
    monkeypatch.setattr(torch, "bmm", kernel)


@pytest.mark.parametrize("n", [1, 7, 259, 514])
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_halves_equal_the_plain_product(n: int, ones: bool, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_module, "multiplies_halves", lambda device: True)
    use_product(monkeypatch, product)
    check_halves("cpu", n, ones, batch)


@pytest.mark.parametrize(("kernel", "taken"), [(product, True), (rounded, False), (None, False)])
def test_only_a_product_that_is_exact_is_taken(
    kernel: Callable[..., Tensor] | None, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is what a CPU does: torch has no such product for it."""
    if kernel is not None:
        use_product(monkeypatch, kernel)
    cpu = torch.device("cpu")
    assert gram_module._adds_up_exactly(cpu) is taken
    assert not gram_module.multiplies_halves(cpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("n", [2, 7, 259, 514])
@pytest.mark.parametrize("batch", [1, 3])
def test_halves_equal_the_plain_product_on_a_gpu(n: int, batch: int) -> None:
    check_halves("cuda", n, True, batch)


def test_strided_output_and_rows() -> None:
    torch.manual_seed(0)
    buffer = torch.zeros(2, 300, 320)
    out = buffer[:, :, 10:310]
    rows = torch.randn(2, 299, 40).mT[:, ::2]
    accumulate_gram(out, rows, alpha=1.0, beta=0.0, ones=True)
    assert_close(complete(out.clone()), exact(with_ones(rows), 1.0))
    assert not buffer[:, :, :10].any()
    assert not buffer[:, :, 310:].any()


@pytest.mark.parametrize("n", [3, 300])
def test_complete_reads_the_upper_triangle_only(n: int) -> None:
    torch.manual_seed(0)
    upper = torch.randn(2, n, n).triu()
    stale = torch.where(torch.ones(n, n).tril(-1).bool(), torch.nan, upper)
    assert torch.equal(complete(stale), upper + upper.triu(1).mT)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("column", [0, 150, 299])
def test_the_trace_tells_of_anything_not_finite(bad: float, column: int) -> None:
    """Also of finite values whose squares overflow."""
    rows = torch.randn(1, 5, 300)
    rows[0, 3, column] = bad
    out = torch.zeros(1, 301, 301)
    accumulate_gram(out, rows, alpha=1.0, beta=0.0, ones=True)
    assert not torch.isfinite(traces(out))


def test_gram_is_complete_and_fp32() -> None:
    rows = torch.randn(2, 5, 3).bfloat16()
    found = gram(rows)
    assert found.dtype is torch.float32
    assert_close(found, exact(rows, 1.0))


@pytest.mark.parametrize(("n", "ones"), [(9, True), (300, False), (515, True)])
def test_asymmetry_looks_where_both_halves_are(n: int, ones: bool) -> None:
    rows = torch.randn(1, 7, n - ones, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(1, n, n)
    accumulate_gram(out, rows, alpha=1.0, beta=0.0, ones=ones)
    assert float(asymmetry(out, n - ones)) < 1e-6  # though panels below the diagonal, and the border's row, are empty
    whole = complete(out.clone())
    assert float(asymmetry(whole)) == 0.0
    largest = float(out.diagonal(dim1=-2, dim2=-1).max())
    out[0, 2, 1] += 0.5 * largest
    assert float(asymmetry(out, n - ones)) == pytest.approx(0.5, rel=1e-4)
