"""Two K-FACs in one process: each measures the passes of its own player's loss, at their own scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from kfac_dist import KFAC
from kfac_dist.optimizers.symplectic import game_field
from kfac_dist.tasks import TwoPlayers
from kfac_dist.training.game.players import PlayersKFAC

PAIRS, LATENT, DAMPING = 5, 2, 0.3


def players() -> TwoPlayers:
    torch.manual_seed(0)
    discriminator = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return TwoPlayers(nn.Sequential(nn.Linear(LATENT, 3)), discriminator, LATENT).double()


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return tuple(torch.randn(PAIRS, width, generator=draw, dtype=torch.float64) for width in (3, LATENT))


def attach(game: TwoPlayers, fisher: str) -> PlayersKFAC:
    config: dict[str, Any] = {
        "curvature": {"factor_every": 1, "decay": 0.0, "fisher": fisher, "likelihood": "bernoulli"},
        "inversion": {"inverse_every": 1, "damping": DAMPING, "solver": "eigen"},
        "update": {"kl_clip": None},
    }
    members = {
        "generator": KFAC(game.generator, config, check_scale=False),
        "discriminator": KFAC(game.discriminator, config),
    }
    return PlayersKFAC(members, {"generator": 1.0, "discriminator": 2.0})


def play(game: TwoPlayers, kfac: PlayersKFAC, fisher: str, adjustment: float) -> None:
    """One step of the library in a person's own loop."""
    real, noise = batch()
    for member in kfac.members:
        member.micro_batch()
    logits = game.logits(real, game.generator(noise))
    with kfac["generator"].unobserved():
        kfac["discriminator"].fisher_backward(logits)
    with kfac["discriminator"].unobserved():
        kfac["generator"].fisher_backward(logits[:, 1:])
    losses = softplus(-logits[:, 1]).mean(), (softplus(-logits[:, 0]) + softplus(logits[:, 1])).mean()
    parameters = list(game.generator.parameters()), list(game.discriminator.parameters())
    pair = kfac["generator"], kfac["discriminator"]
    game_field(losses, parameters, adjustment=adjustment, kfacs=pair).deliver()


def with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)


def exact_factors(game: TwoPlayers, fisher: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and G of every layer, written down by hand: n pairs, of which the discriminator sees both samples."""
    real, noise = batch()
    low, high, made_by = game.discriminator[0], game.discriminator[2], game.generator[0]
    with torch.no_grad():
        made = made_by(noise)
        seen = torch.cat([real, made])
        hidden = low(seen).tanh()
        logit = high(hidden)
        p = logit.sigmoid()
        label = torch.cat([torch.ones(PAIRS, 1), torch.zeros(PAIRS, 1)]).double()
        # The gradient of −log p(label) at the logit, or the root of its variance: each sample's own, not divided by n.
        top = p - label if fisher == "empirical" else (p * (1 - p)).sqrt()
        below = top @ high.weight * (1 - hidden**2)
        # The generator wants its samples to be taken for real.
        wish = p[PAIRS:] - 1 if fisher == "empirical" else top[PAIRS:]
        made_grad = (wish @ high.weight * (1 - hidden[PAIRS:] ** 2)) @ low.weight

        def second_moment(rows: Tensor, count: int) -> Tensor:
            return rows.T @ rows / count

        both = 2 * PAIRS
        return {
            "generator.0": (second_moment(with_ones(noise), PAIRS), second_moment(made_grad, PAIRS)),
            "discriminator.0": (second_moment(with_ones(seen), both), second_moment(below, PAIRS)),
            "discriminator.2": (second_moment(with_ones(hidden), both), second_moment(top, PAIRS)),
        }


@pytest.mark.parametrize("fisher", ["empirical", "type2"])
@pytest.mark.parametrize("adjustment", [0.0, 1.0])
def test_each_players_blocks_are_the_enumerated_ones(fisher: str, adjustment: float) -> None:
    game = players()
    kfac = attach(game, fisher)
    play(game, kfac, fisher, adjustment)
    gradients = {name: p.grad.clone() for name, p in game.named_parameters()}
    kfac.step()
    for layer, (a, g) in exact_factors(game, fisher).items():
        player, _, _ = layer.partition(".")
        damping = DAMPING * (2.0 if player == "discriminator" else 1.0)
        gradient = torch.cat([gradients[f"{layer}.weight"], gradients[f"{layer}.bias"][:, None]], dim=1)
        block = torch.kron(g, a) + damping * torch.eye(gradient.numel(), dtype=torch.float64)
        wanted = torch.linalg.solve(block, gradient.flatten()).view_as(gradient)
        module = game.get_submodule(layer)
        found = torch.cat([module.weight.grad, module.bias.grad[:, None]], dim=1)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6, msg=lambda text, at=layer: f"{at}: {text}")


def test_the_usual_loop_measures_the_discriminator_on_its_own_loss_alone() -> None:
    """Two `backward`s, as in most GAN code; without the pause the generator's would double what is measured."""

    def gradients(*, pause: bool, generator_first: bool = False) -> list[Tensor]:
        game = players()
        kfac = attach(game, "empirical")["discriminator"]
        real, noise = batch()

        def own() -> None:
            game.discriminator.zero_grad()
            logits = game.logits(real, game.generator(noise).detach())
            (softplus(-logits[:, 0]) + softplus(logits[:, 1])).mean().backward()

        def other() -> None:
            softplus(-game.discriminator(game.generator(noise))).mean().backward()

        kfac.micro_batch()
        if generator_first and pause:
            with kfac.unobserved():
                other()
        elif generator_first:
            other()
        own()
        kfac.step()
        return [p.grad for p in game.discriminator.parameters()]

    alone = gradients(pause=True)
    torch.testing.assert_close(gradients(pause=True, generator_first=True), alone)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradients(pause=False, generator_first=True), alone)


def test_state_and_statistics_are_each_players_own() -> None:
    game, other = players(), players()
    kfac, fresh = attach(game, "empirical"), attach(other, "empirical")
    play(game, kfac, "empirical", 1.0)
    kfac.step()
    fresh.load_sharded_state_dict(kfac.sharded_state_dict())
    fresh.load_local_statistics(kfac.solver_access.local_statistics())
    assert [member.steps for member in fresh.members] == [1, 1]
    for model, preconditioner in ((game, kfac), (other, fresh)):
        play(model, preconditioner, "empirical", 1.0)
        preconditioner.step()
    for mine, theirs in zip(game.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    shown = kfac.metrics()
    assert shown["damping"] == shown["generator/damping"] == DAMPING
    assert shown["discriminator/damping"] == 2 * DAMPING
    assert shown["refreshes"] == sum(member.metrics()["refreshes"] for member in kfac.members)
    kfac.solver_access.multiply_damping(10.0)
    assert [member.solver_access.damping for member in kfac.members] == pytest.approx([10 * DAMPING, 20 * DAMPING])
    kfac.remove()
