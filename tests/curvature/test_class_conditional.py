"""Sums by class hold the rows of their class, and the nearest Kronecker product is its SVD's first term."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_dist.curvature.class_conditional import Classes, Members, Summary, nearest, summarize
from kfac_dist.errors import ModelError
from tests.curvature.measured import assert_close

LABELS = torch.tensor([2, 0, 0, 3, 2, 9, 2, -1])  # none of class 1; two without a class


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("slots", [4, 5])
def test_ordered_rows_masked_rows_and_the_textbook_agree(ones: bool, slots: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 8, 3, generator=generator)
    members = Classes.of(LABELS, 4, slots).members("layer", 8, inputs=True)
    width = 3 + ones
    ordered, masked = (torch.zeros(slots, 2, width, width) for _ in range(2))
    members.accumulate(ordered, rows, alpha=0.5, ones=ones)
    members.accumulate_masked(masked, rows, alpha=0.5, ones=ones)
    whole = torch.cat([rows, torch.ones(2, 8, 1)], dim=-1) if ones else rows
    for label in range(slots):
        own = label == LABELS if label < 4 else (LABELS < 0) | (LABELS > 3)
        expected = 0.5 * whole[:, own].mT @ whole[:, own]
        assert_close(ordered[label].triu(), expected.triu())
        assert_close(masked[label].triu(), expected.triu())
    assert members.counts(rows.device).tolist() == [2.0, 0.0, 3.0, 1.0, 2.0][:slots]


def test_shares_weigh_inputs_and_leave_gradients_which_have_them() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, shares = torch.randn(1, 6, 3, generator=generator), torch.rand(6, generator=generator)
    classes = Classes(3, index=1, shares=shares)
    for inputs in (True, False):
        out = torch.zeros(3, 1, 4, 4)
        members = classes.members("layer", 6, inputs=inputs)
        members.accumulate(out, rows, alpha=1.0, ones=True)
        whole = torch.cat([rows[0], torch.ones(6, 1)], dim=-1)
        weighed = whole * shares[:, None] if inputs else whole
        assert_close(out[1, 0].triu(), (weighed.mT @ whole).triu())
        assert not bool(out[[0, 2]].any())
        assert_close(members.counts(rows.device), torch.tensor([0.0, float(shares.sum()), 0.0]))


def test_a_label_a_sample_is_every_positions_and_a_label_a_position_its_own() -> None:
    by_sample = Classes.of(torch.tensor([1, 0]), 2, 2).members("layer", 6, inputs=True)
    assert by_sample.labels is not None
    assert by_sample.labels.tolist() == [1, 1, 1, 0, 0, 0]
    by_token = Classes.of(torch.tensor([[1, 0, 1], [0, 0, -100]]), 2, 3).members("layer", 6, inputs=True)
    assert by_token.labels is not None
    assert by_token.labels.tolist() == [1, 0, 1, 0, 0, 2]
    for rows, labels in ((5, torch.tensor([1, 0])), (2, torch.tensor([[1, 0, 1], [0, 0, 1]]))):
        with pytest.raises(ModelError, match=r"layer head has . rows for labels of shape"):
            Classes.of(labels, 2, 2).members("head", rows, inputs=True)


def test_frequencies_of_tokens_by_class() -> None:
    tokens = torch.tensor([4, 1, 1, 0, 4, 3, 4, 2])
    members = Classes.of(LABELS, 4, 4).members("layer", 8, inputs=True)
    found = members.frequencies(tokens, 5)
    assert found.tolist() == [[0, 2, 0, 0, 0], [0] * 5, [0, 0, 0, 0, 3], [1, 0, 0, 0, 0]]
    shared = Members(2, None, 1, torch.arange(8.0)).frequencies(tokens, 5)
    assert shared.tolist() == [[0] * 5, [3.0, 3.0, 7.0, 5.0, 10.0]]


def positive(classes: int, n: int, seed: int, batch: int = 1, rank: int | None = None) -> Tensor:
    """`[classes, batch, n, n]` positive semi-definite matrices that differ from class to class."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(classes, batch, rank or n + 2, n, generator=generator, dtype=torch.float64)
    rows = rows * torch.rand(classes, 1, 1, n, generator=generator, dtype=torch.float64) ** 3
    return rows.mT @ rows


def dense(a: Tensor, g: Tensor, pi: Tensor) -> Tensor:
    """Σ π_c A_c ⊗ G_c for `[C, n, n]` and `[C, m, m]`."""
    return torch.stack([p * torch.kron(x, y) for p, x, y in zip(pi, a, g, strict=True)]).sum(0)


def van_loan(product: Tensor, n: int, m: int) -> Tensor:
    """The nearest A⊗G by a dense SVD of the rearranged `[n·m, n·m]` matrix (Van Loan & Pitsianis 1993)."""
    rearranged = product.view(n, m, n, m).permute(0, 2, 1, 3).reshape(n * n, m * m)
    u, s, v = torch.linalg.svd(rearranged, full_matrices=False)
    return torch.kron((u[:, 0] * s[0]).view(n, n), v[0].view(m, m))


@pytest.mark.parametrize(("classes", "n", "m"), [(1, 4, 3), (2, 5, 4), (6, 3, 7), (40, 4, 4)])
def test_it_is_the_first_term_of_the_kronecker_svd(classes: int, n: int, m: int) -> None:
    a, g = positive(classes, n, 1), positive(classes, m, 2)
    pi = torch.rand(classes, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    pi /= pi.sum()
    ones = torch.ones(classes)
    alpha, beta = nearest(summarize(a.float(), ones).products, summarize(g.float(), ones).products, pi)
    found = torch.kron(torch.einsum("c,cij->ij", alpha[0], a[:, 0]), torch.einsum("c,cij->ij", beta[0], g[:, 0]))
    exact = dense(a[:, 0], g[:, 0], pi)
    assert_close(found, van_loan(exact, n, m), 1e-5)
    plain = torch.kron(torch.einsum("c,cij->ij", pi, a[:, 0]), torch.einsum("c,cij->ij", pi, g[:, 0]))
    assert (found - exact).norm() <= (plain - exact).norm() * (1 + 1e-6)
    assert bool((alpha >= 0).all() and (beta >= 0).all())
    for coefficients, factors in ((alpha, a), (beta, g)):
        combined = torch.einsum("c,cij->ij", coefficients[0], factors[:, 0])
        assert float(torch.linalg.eigvalsh(combined).min()) > -1e-6 * float(combined.norm())
    if classes == 1:
        assert_close(alpha, torch.ones(1, 1))
        assert_close(beta, torch.ones(1, 1))


def test_every_step_of_the_iteration_comes_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    a, g, pi = positive(5, 4, 4), positive(5, 6, 5), torch.full((5,), 0.2, dtype=torch.float64)
    exact, ones, distances = dense(a[:, 0], g[:, 0], pi), torch.ones(5), []
    for steps in range(6):
        monkeypatch.setattr("kfac_dist.curvature.class_conditional._STEPS", steps)
        alpha, beta = nearest(summarize(a.float(), ones).products, summarize(g.float(), ones).products, pi)
        found = torch.kron(torch.einsum("c,cij->ij", alpha[0], a[:, 0]), torch.einsum("c,cij->ij", beta[0], g[:, 0]))
        distances.append(float((found - exact).norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 1.05 * distances[-1]  # it begins at E[A] ⊗ E[G]


@pytest.mark.parametrize("n", [5, 300])
def test_inner_products_read_the_upper_triangle_alone(n: int) -> None:
    sums = positive(3, n, 6, batch=2, rank=4).float()
    weights = torch.tensor([2.0, 0.0, 5.0])
    stored = sums.triu() + torch.full_like(sums, 7.0).tril(-1)
    found = Summary.of_flat(summarize(stored, weights).flat(), 2, 3)
    factors = sums.double() * torch.tensor([0.5, 0.0, 0.2], dtype=torch.float64)[:, None, None, None]
    assert_close(found.products, torch.einsum("cbij,dbij->bcd", factors, factors))
    assert_close(found.traces, torch.einsum("cbii->bc", factors))


def test_inner_products_of_diagonals() -> None:
    diagonals = positive(4, 6, 7)[:, 0].diagonal(dim1=-2, dim2=-1)[:, None].float()
    found = summarize(diagonals, torch.full((4,), 2.0))
    assert_close(found.products[0], (diagonals[:, 0] @ diagonals[:, 0].mT) / 4)
    assert_close(found.traces[0], diagonals[:, 0].sum(-1) / 2)


def test_a_factor_of_zeros_leaves_the_frequencies() -> None:
    pi = torch.tensor([0.25, 0.75])
    a = summarize(positive(2, 4, 8).float(), torch.ones(2)).products
    alpha, beta = nearest(a, torch.zeros(1, 2, 2), pi)
    assert torch.equal(alpha[0], pi.double())
    assert bool(torch.isfinite(beta).all())
