"""The nearest Kronecker product against the dense Kronecker SVD, from sums as they are stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_dist.curvature.class_product import Summary, nearest, summarize
from tests.curvature.measured import assert_close


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
        monkeypatch.setattr("kfac_dist.curvature.class_product._STEPS", steps)
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
