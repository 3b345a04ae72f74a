"""The block-tridiagonal inverse against dense matrices, and exact where the layers are a chain of Gaussians."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kfac_dist.curvature.block_tridiagonal import ChainLink, apply_inverse, regression, root_and_told

SIZES = ((4, 3), (3, 5), (2, 4), (5, 2))  # (n, m) of each layer


def _joint(sizes: tuple[int, ...], seed: int) -> list[list[Tensor]]:
    """Blocks of one positive definite matrix."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    root = torch.randn(total, 2 * total, generator=generator, dtype=torch.float64)
    joint = root @ root.T / total + 0.1 * torch.eye(total, dtype=torch.float64)
    return [list(rows.split(sizes, dim=1)) for rows in joint.split(sizes)]


def _links(a: list[list[Tensor]], g: list[list[Tensor]]) -> list[ChainLink]:
    links = []
    for i in range(len(a)):
        if i + 1 == len(a):
            (root_a, told_a), (root_g, told_g) = root_and_told(a[i][i]), root_and_told(g[i][i])
            links.append(ChainLink(root_a, root_g, told_a, told_g))
            continue
        (root_a, told_a), (root_g, told_g) = (root_and_told(m[i][i], m[i + 1][i + 1], m[i][i + 1]) for m in (a, g))
        nexts = (regression(m[i + 1][i + 1], m[i][i + 1]) for m in (a, g))
        links.append(ChainLink(root_a, root_g, told_a, told_g, *nexts))
    return links


def _applied(links: list[ChainLink], sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """The dense matrix of `apply_inverse`, column by column; vec stacks rows, so that F is G ⊗ A."""
    widths = [n * m for n, m in sizes]
    columns = []
    for unit in torch.eye(sum(widths), dtype=torch.float64):
        parts = [part.view(m, n) for part, (n, m) in zip(unit.split(widths), sizes, strict=True)]
        columns.append(torch.cat([out.flatten() for out in apply_inverse(links, parts)]))
    return torch.stack(columns, dim=1)


def _fisher(a: list[list[Tensor]], g: list[list[Tensor]]) -> list[list[Tensor]]:
    count = range(len(a))
    return [[torch.kron(g[i][j].contiguous(), a[i][j].contiguous()) for j in count] for i in count]


def _dense(f: list[list[Tensor]]) -> Tensor:
    """Ξᵀ Λ Ξ as the paper writes it, from the blocks of F̃ by plain algebra."""
    count, widths = len(f), [len(f[i][i]) for i in range(len(f))]
    xi = torch.eye(sum(widths), dtype=torch.float64)
    lam = torch.zeros_like(xi)
    starts = [0, *itertools.accumulate(widths)]
    place = [slice(a, b) for a, b in itertools.pairwise(starts)]
    for i in range(count):
        if i + 1 == count:
            lam[place[i], place[i]] = torch.linalg.inv(f[i][i])
            continue
        psi = f[i][i + 1] @ torch.linalg.inv(f[i + 1][i + 1])
        xi[place[i], place[i + 1]] = -psi
        lam[place[i], place[i]] = torch.linalg.inv(f[i][i] - psi @ f[i + 1][i + 1] @ psi.T)
    return xi.T @ lam @ xi


def dense_inverse(a: list[list[Tensor]], g: list[list[Tensor]]) -> Tensor:
    """The paper's F̂⁻¹ of A_ij and G_ij, whose vec stacks rows."""
    return _dense(_fisher(a, g))


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_it_is_the_dense_matrix_of_the_paper(layers: int) -> None:
    sizes = SIZES[:layers]
    a, g = _joint(tuple(n for n, _ in sizes), 0), _joint(tuple(m for _, m in sizes), 1)
    inverse, dense = _applied(_links(a, g), sizes), dense_inverse(a, g)
    torch.testing.assert_close(inverse, dense)
    torch.testing.assert_close(inverse, inverse.T)
    assert torch.linalg.eigvalsh(inverse).min() > 0


def test_its_inverse_agrees_with_the_three_middle_diagonals_and_is_tridiagonal_itself() -> None:
    sizes = SIZES[:3]
    a, g = _joint(tuple(n for n, _ in sizes), 2), _joint(tuple(m for _, m in sizes), 3)
    inverse, fisher = _applied(_links(a, g), sizes), _fisher(a, g)
    widths = [n * m for n, m in sizes]
    found = [list(rows.split(widths, dim=1)) for rows in torch.linalg.inv(inverse).split(widths)]
    for i, j in itertools.product(range(3), repeat=2):
        if abs(i - j) <= 1:
            torch.testing.assert_close(found[i][j], fisher[i][j])
    corner = inverse.split(widths)[0].split(widths, dim=1)[2]
    torch.testing.assert_close(corner, torch.zeros_like(corner))


def test_two_layers_and_gaussian_chains_are_inverted_exactly() -> None:
    sizes = SIZES[:2]
    a, g = _joint(tuple(n for n, _ in sizes), 4), _joint(tuple(m for _, m in sizes), 5)
    fisher = torch.cat([torch.cat(row, dim=1) for row in _fisher(a, g)])
    torch.testing.assert_close(_applied(_links(a, g), sizes), torch.linalg.inv(fisher))
    # Three layers in which the first knows of the third only by the second: the corner block is what that implies.
    sizes = SIZES[:3]
    a, g = _joint(tuple(n for n, _ in sizes), 6), _joint(tuple(m for _, m in sizes), 7)
    for m in (a, g):
        m[0][2] = m[0][1] @ torch.linalg.inv(m[1][1]) @ m[1][2]
        m[2][0] = m[0][2].T.contiguous()
    fisher = torch.cat([torch.cat(row, dim=1) for row in _fisher(a, g)])
    torch.testing.assert_close(_applied(_links(a, g), sizes), torch.linalg.inv(fisher))


def test_layers_that_tell_nothing_of_each_other_are_the_block_diagonal_inverse() -> None:
    sizes = SIZES[:3]
    a, g = _joint(tuple(n for n, _ in sizes), 8), _joint(tuple(m for _, m in sizes), 9)
    for i, j in ((0, 1), (1, 2)):
        a[i][j] = torch.zeros_like(a[i][j])
    expected = torch.block_diag(*(torch.linalg.inv(torch.kron(g[i][i], a[i][i])) for i in range(3)))
    torch.testing.assert_close(_applied(_links(a, g), sizes), expected)
