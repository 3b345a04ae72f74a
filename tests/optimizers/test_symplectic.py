"""The field of a game: against its dense Jacobian, on games whose orbits are known, and on several ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_dist.optimizers.symplectic import ALIGNMENT_BIAS, game_field
from tests.harness import run_ranks


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def losses(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A general game: both losses depend on both players, neither is the other's with its sign turned."""
    matrix = torch.tensor([[1.0, -0.5], [0.3, 2.0], [0.7, 0.1]], dtype=torch.float64)
    return (x @ matrix @ y).sin() + (x**3).sum() + x[0] * y[1] ** 2, (x.sin() @ matrix @ y) ** 2 + (y**4).sum()


def dense(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """ξ and its Jacobian, entry by entry."""

    def field(both: Tensor) -> Tensor:
        x, y = both[:3], both[3:]
        first, second = losses(x, y)
        parts = [torch.autograd.grad(loss, p, create_graph=True)[0] for loss, p in ((first, x), (second, y))]
        return torch.cat(parts)

    both = torch.cat([x, y]).detach().requires_grad_()
    return field(both).detach(), torch.autograd.functional.jacobian(field, both)


@pytest.mark.parametrize("align", [False, True])
def test_the_adjustment_is_that_of_the_dense_jacobian(align: bool) -> None:
    signs = set()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_() for n in (3, 2))
        xi, jacobian = dense(x, y)
        turn = (jacobian - jacobian.T).T / 2 @ xi
        slope = jacobian.T @ xi
        sign = math.copysign(1, float((xi @ slope) * (turn @ slope) / 5 + ALIGNMENT_BIAS)) if align else 1.0
        signs.add(sign)
        found = game_field(losses(x, y), ([x], [y]), adjustment=0.7, align=align)
        torch.testing.assert_close(found.field, xi)
        torch.testing.assert_close(found.adjustment, 0.7 * sign * turn)
        torch.testing.assert_close(found.total, xi + 0.7 * sign * turn)
    assert len(signs) == 1 + align, "both signs have to occur"


def play(adjustment: float, x: Tensor, y: Tensor, steps: int, lr: float, curvature: float = 0.0) -> list[float]:
    """Distances from the origin in the game ½c|x|² + xy against ½c|y|² − xy."""
    distances = []
    for _ in range(steps):
        loss = (curvature / 2 * x**2 + x * y).sum(), (curvature / 2 * y**2 - x * y).sum()
        game_field(loss, ([x], [y]), adjustment=adjustment).deliver()
        with torch.no_grad():
            for player in (x, y):
                player -= lr * player.grad
        distances.append(float((x.detach() ** 2 + y.detach() ** 2).sqrt()))
    return distances


def test_in_the_bilinear_game_plain_descent_leaves_and_adjusted_descent_arrives() -> None:
    """J = [[0, 1], [−1, 0]]: a plain step multiplies the distance by √(1 + lr²), an adjusted one by |1 − lr(λ + i)|."""
    plain = play(0.0, numbers(1.0), numbers(1.0), 200, 0.1)
    adjusted = play(1.0, numbers(1.0), numbers(1.0), 200, 0.1)
    assert plain[-1] == pytest.approx(math.sqrt(2) * (1 + 0.1**2) ** 100)
    assert adjusted[-1] == pytest.approx(math.sqrt(2) * abs(1 - 0.1 * (1 + 1j)) ** 200)
    assert plain[-1] > 3
    assert adjusted[-1] < 1e-8


def test_in_a_quadratic_game_the_rate_is_that_of_its_jacobian() -> None:
    """J = cI + N with Nᵀ = −N = N⁻¹: (I + λNᵀ)J = (c + λ)I + (1 − λc)N, of eigenvalues c + λ ± i(1 − λc)."""
    curvature, adjustment, lr = 0.3, 0.5, 0.1
    eigenvalue = curvature + adjustment + 1j * (1 - adjustment * curvature)
    found = play(adjustment, numbers(1.0), numbers(-1.0), 30, lr, curvature)
    assert found[-1] == pytest.approx(math.sqrt(2) * abs(1 - lr * eigenvalue) ** 30)


def test_players_that_do_nothing_to_each_other_are_not_adjusted() -> None:
    x, y = numbers(1.0, 2.0), numbers(3.0)
    found = game_field(((x**2).sum(), (y**3).sum()), ([x], [y]))
    torch.testing.assert_close(found.adjustment, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(found.field, torch.tensor([2.0, 4.0, 27.0], dtype=torch.float64))


def test_gradients_are_written_in_place() -> None:
    x, y = numbers(1.0), numbers(2.0)
    x.grad = torch.zeros_like(x)
    place = x.grad.data_ptr()
    game_field(((x * y).sum(), -(x * y).sum()), ([x], [y])).deliver()
    assert x.grad.data_ptr() == place
    torch.testing.assert_close(x.grad, torch.tensor([3.0], dtype=torch.float64))  # y + λx
    torch.testing.assert_close(y.grad, torch.tensor([1.0], dtype=torch.float64))  # −x + λy


@pytest.mark.parametrize(("adjustment", "align", "averages"), [(0.0, False, 1), (1.0, False, 2), (1.0, True, 2)])
def test_ranks_average_twice_whatever_the_number_of_parameters(adjustment: float, align: bool, averages: int) -> None:
    seen = []
    x, y = [numbers(1.0) for _ in range(4)], [numbers(2.0)]
    product = torch.cat(x).sum() * y[0]
    game_field((product.sum(), -product.sum()), (x, y), adjustment=adjustment, align=align, average=seen.append)
    assert len(seen) == averages


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    made = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    judged = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 1)).double()
    return made, judged


def field_of(rank: int, size: int, *, wrapped: bool, align: bool) -> list[Tensor]:
    """ξ and its adjustment in a small GAN of which every rank has every size-th pair."""
    generator, discriminator = nets()
    draw = torch.Generator().manual_seed(2)
    real, noise = (torch.randn(6, width, generator=draw, dtype=torch.float64)[rank::size] for width in (3, 2))
    calls = generator, discriminator
    if wrapped:
        calls = tuple(DistributedDataParallel(player) for player in calls)
        with calls[0].no_sync(), calls[1].no_sync():
            logits = calls[1](real), calls[1](calls[0](noise))
    else:
        logits = discriminator(real), discriminator(generator(noise))
    softplus = nn.functional.softplus
    pair = softplus(-logits[1]).mean(), softplus(-logits[0]).mean() + softplus(logits[1]).mean()
    found = game_field(pair, (list(generator.parameters()), list(discriminator.parameters())), align=align)
    return [found.field, found.adjustment]


def on_ranks() -> list[list[Tensor]]:
    place = dist.get_rank(), dist.get_world_size()
    return [field_of(*place, wrapped=wrapped, align=align) for wrapped in (False, True) for align in (False, True)]


def test_three_ranks_find_the_field_of_one_also_in_ddp() -> None:
    alone = [field_of(0, 1, wrapped=False, align=align) for align in (False, True)] * 2
    for rank in run_ranks(3, on_ranks):
        for found, wanted in zip(rank, alone, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
