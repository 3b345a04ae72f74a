"""Applying payloads, against dense solves of the whole Kronecker matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kfac_dist.config.schema import CurvatureConfig, Fisher, Sharing, Solver
from kfac_dist.curvature.blocks import Block, find_blocks
from kfac_dist.curvature.factors import FactorKind, Side, Unit, units_of
from kfac_dist.curvature.inverses.precondition import Group, InverseGroup, build_groups
from kfac_dist.curvature.inverses.solvers import Task, solve
from tests.curvature.measured import assert_close

CPU = torch.device("cpu")
DAMPING = 0.3


def model_of(copies: int) -> nn.Module:
    """`copies` of every kind of block, interleaved."""
    layers: list[nn.Module] = []
    for _ in range(copies):
        layers += [
            nn.Linear(5, 4),
            nn.Conv2d(4, 6, 2, groups=2),
            nn.Embedding(6, 3),
            nn.LayerNorm(4),
            nn.RMSNorm(4),
            nn.Linear(5, 4, bias=False),
        ]
    return nn.Sequential(*layers)


def blocks_of(copies: int = 1, without_g: bool = False) -> tuple[tuple[Block, ...], dict[str, tuple[Unit, ...]]]:
    fisher = Fisher.INPUT_ONLY if without_g else Fisher.EMPIRICAL
    blocks = find_blocks(model_of(copies), CurvatureConfig(fisher=fisher, sharing=Sharing.EXPAND)).blocks
    kept = {b.name: tuple(f for f in b.factors if not (without_g and f.side is Side.G)) for b in blocks}
    return blocks, {name: units_of(name, factors, None) for name, factors in kept.items()}


def cut_units(blocks: tuple[Block, ...], limit: int) -> dict[str, tuple[Unit, ...]]:
    return {b.name: units_of(b.name, b.factors, limit) for b in blocks}


def random_factor(unit: Unit, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if unit.kind is FactorKind.DIAGONAL:
        return torch.rand(unit.shape, generator=generator)
    rows = torch.randn(unit.batch, unit.dim + 2, unit.dim, generator=generator)
    return rows.mT @ rows / unit.dim


def load_all(groups: list[Group], solver: Solver, damping: float) -> dict[str, Tensor]:
    """Solve a random factor for every unit, load it; returns the factors, dense and in float64."""
    known = {}
    seed = 0
    for group in groups:
        for unit in group.units:
            factor = random_factor(unit, seed)
            seed += 1
            known[unit.name] = (torch.diag_embed(factor) if unit.kind is FactorKind.DIAGONAL else factor).double()
            (payload,), failures = solve([Task(unit, factor.clone(), damping, None)], solver)
            assert payload is not None
            assert not failures
            group.load(unit, payload)
            assert torch.equal(group.payload(unit), payload)
    return known


def whole(block: Block, side: Side, units: tuple[Unit, ...], known: dict[str, Tensor]) -> Tensor:
    """The factor as its diagonal blocks, `[batch, n, n]`; the identity for a side that isn't measured."""
    batch, d_out, d_in = block.matrix_shape
    pieces = [unit for unit in units if unit.side is side]
    if not pieces:
        return torch.eye(d_out if side is Side.G else d_in).double().expand(batch, -1, -1)
    return torch.stack([torch.block_diag(*(known[unit.name][b] for unit in pieces)) for b in range(batch)])


def fill(groups: list[Group]) -> None:
    torch.manual_seed(5)
    for group in groups:
        group.gradient.normal_()


def each_block(groups: list[Group]) -> list[tuple[Block, Tensor, Tensor]]:
    updates = [group.apply(group.gradient, DAMPING) for group in groups]
    return [
        (block, group.matrix(group.gradient, index).double(), group.matrix(update, index))
        for group, update in zip(groups, updates, strict=True)
        for index, block in enumerate(group.blocks)
    ]


@pytest.mark.parametrize("limit", [None, 2, 3])
@pytest.mark.parametrize("without_g", [False, True])
def test_eigen_solves_the_exactly_damped_kronecker_matrix(limit: int | None, without_g: bool) -> None:
    """`(G ⊗ A + λI) vec Δ = vec ∇`, densely; cut factors are block-diagonal, an absent G is the identity."""
    if without_g and limit:
        pytest.skip("covered by each alone")
    blocks, units = blocks_of(2, without_g)
    units = units if limit is None else cut_units(blocks, limit)
    groups = build_groups(blocks, units, Solver.EIGEN, CPU)
    known = load_all(groups, Solver.EIGEN, DAMPING)
    fill(groups)
    for block, gradient, update in each_block(groups):
        if any(unit.side is Side.F for unit in units[block.name]):
            continue
        a, g = (whole(block, side, units[block.name], known) for side in (Side.A, Side.G))
        for index in range(block.matrix_shape[0]):
            matrix = torch.kron(g[index], a[index])
            expected = torch.linalg.solve(matrix + DAMPING * torch.eye(len(matrix)), gradient[index].flatten())
            assert_close(update[index].flatten(), expected, 1e-4)


@pytest.mark.parametrize("limit", [None, 2, 3])
@pytest.mark.parametrize("without_g", [False, True])
def test_inverses_solve_the_kronecker_matrix_of_damped_factors(limit: int | None, without_g: bool) -> None:
    if without_g and limit:
        pytest.skip("covered by each alone")
    blocks, units = blocks_of(2, without_g)
    units = units if limit is None else cut_units(blocks, limit)
    groups = build_groups(blocks, units, Solver.CHOLESKY, CPU)
    known = load_all(groups, Solver.CHOLESKY, DAMPING)
    fill(groups)
    for block, gradient, update in each_block(groups):
        sides = {unit.side for unit in units[block.name]}
        batch, _, d_in = block.matrix_shape
        if sides == {Side.F}:
            f = whole(block, Side.F, units[block.name], known) + DAMPING * torch.eye(d_in)
            assert_close(update.mT, torch.linalg.solve(f, gradient.mT), 1e-4)
            continue
        a, g = (whole(block, side, units[block.name], known) for side in (Side.A, Side.G))
        for index in range(batch):
            damped_g = g[index] + (DAMPING if Side.G in sides else 0.0) * torch.eye(len(g[index]))
            matrix = torch.kron(damped_g, a[index] + DAMPING * torch.eye(d_in))
            assert_close(update[index].flatten(), torch.linalg.solve(matrix, gradient[index].flatten()), 1e-4)


@pytest.mark.parametrize("solver", list(Solver))
def test_equal_shapes_are_one_batch_with_the_results_of_each_alone(solver: Solver) -> None:
    blocks, units = blocks_of(3)
    together = build_groups(blocks, units, solver, CPU)
    assert sorted(len(group.blocks) for group in together) == [3] * 6
    known_seed = load_all(together, solver, DAMPING)
    assert known_seed
    fill(together)
    of_block = {block.name: (gradient, update) for block, gradient, update in each_block(together)}
    holder = {unit.name: group for group in together for unit in group.units}
    for block in blocks:
        (alone,) = build_groups([block], {block.name: units[block.name]}, solver, CPU)
        for unit in units[block.name]:
            alone.load(unit, holder[unit.name].payload(unit))
        gradient, update = of_block[block.name]
        alone.gradient.copy_(gradient)
        assert_close(alone.apply(alone.gradient, DAMPING), update, 1e-6)


@pytest.mark.parametrize("without_g", [False, True])
@pytest.mark.parametrize("limit", [None, 2])
def test_identity_before_the_first_refresh(limit: int | None, without_g: bool) -> None:
    """The plain gradient stays: no damping is added to what was never measured."""
    blocks, units = blocks_of(without_g=without_g)
    units = units if limit is None or without_g else cut_units(blocks, limit)
    for solver in Solver:
        groups = build_groups(blocks, units, solver, CPU)
        fill(groups)
        for group in groups:
            assert torch.equal(group.apply(group.gradient, DAMPING), group.gradient)


@pytest.mark.parametrize("solver", Solver)
def test_a_unit_may_keep_what_it_has(solver: Solver) -> None:
    """What couldn't be solved is loaded as it was: from the group's own memory."""
    blocks, _ = blocks_of()
    for block in blocks:
        units = cut_units([block], 2)[block.name]
        (group,) = build_groups([block], {block.name: units}, solver, CPU)
        before = [group.payload(unit).clone() for unit in units]
        for unit in units:
            group.load(unit, group.payload(unit))
        for unit, payload in zip(units, before, strict=True):
            assert torch.equal(group.payload(unit), payload)


def test_apply_leaves_the_gradient_alone() -> None:
    blocks, units = blocks_of()
    for solver in (Solver.CHOLESKY, Solver.EIGEN):
        groups = build_groups(blocks, units, solver, CPU)
        fill(groups)
        for group in groups:
            before = group.gradient.clone()
            update = group.apply(group.gradient, DAMPING)
            assert torch.equal(group.gradient, before)
            assert update.data_ptr() != group.gradient.data_ptr() or isinstance(group, InverseGroup)
            update.zero_()
            assert torch.equal(group.gradient, before)
