"""From a configuration with a `game` to its players, their one optimizer and their two K-FACs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.config.schema import GameConfig, KFACConfig, OptimizerConfig
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.movement.broadcast import broadcast_all
from kfac_dist.engines import TrainingEngine
from kfac_dist.engines.ddp import DDPEngine
from kfac_dist.errors import DataError, ModelError
from kfac_dist.optimizers import build_optimizer
from kfac_dist.preconditioner.kfac import KFAC
from kfac_dist.tasks import TwoPlayers
from kfac_dist.tasks.game import game_noise
from kfac_dist.tasks.judge import train_judge
from kfac_dist.training.data.batches import Source, evaluation_batches
from kfac_dist.training.game.passes import GameParts, one_tensor
from kfac_dist.training.game.players import PlayersKFAC

_BATCH = 256
# Runs with different seeds are compared, so that their judge must be one.
_JUDGE_SEED = 0


def check_players(name: str, model: nn.Module, data: Source) -> None:
    """Refuse models, data and settings that a game can't use.

    Args:
        name: The model's in the configuration.
        model: The model.
        data: The training data.

    Raises:
        ModelError: The model is no game's, or its samples aren't like the data's.
        DataError: The data's samples are no tensors.
    """
    if not isinstance(model, TwoPlayers):
        raise ModelError(
            f"model.name: {name} returned {type(model).__name__}; a game's model is a "
            "kfac_dist.tasks.TwoPlayers(generator, discriminator, latent)"
        )
    [(samples, _)] = data.fetch([torch.arange(1)], seed=0)
    if not isinstance(samples, Tensor):
        raise DataError(f"a game's samples are one tensor each, found {type(samples).__name__}")
    device = next(model.parameters()).device
    with torch.no_grad():
        made = model.generator(game_noise(0, 0, 2, model.latent).to(device))
    if made.shape[1:] != samples.shape[1:]:
        raise ModelError(
            f"the generator makes samples of shape {list(made.shape[1:])}, those of the data have "
            f"{list(samples.shape[1:])}"
        )


def build_game(game: GameConfig, model: nn.Module, train: Source, test: Source, seed: int) -> GameParts:
    """Train the judge of the players' samples: the same on every rank.

    Raises:
        DataError: The data has no class labels.
    """
    assert isinstance(model, TwoPlayers)
    samples, labels = _all(train)
    judge = train_judge(samples, labels, _JUDGE_SEED)
    accuracy = judge.accuracy(*_all(test))
    return GameParts(model, game, judge, accuracy, seed)


def share_judge(game: GameParts, communicator: Communicator) -> None:
    """Give every rank rank 0's judge: other processors round otherwise; collective."""
    broadcast_all(communicator, game.judge.parameters(), 0, label="buffers")


def build_players(
    game: GameParts, first_order: OptimizerConfig, kfac_config: KFACConfig, total_steps: int
) -> tuple[TrainingEngine, torch.optim.Optimizer, PlayersKFAC | None]:
    """Build an engine of both players, an optimizer with a group for each, and a K-FAC for each; collective."""
    players, own = game.players, game.config.discriminator
    optimizer = build_optimizer(players.generator.parameters(), first_order)
    optimizer.add_param_group({"params": list(players.discriminator.parameters()), "lr_factor": own.lr_factor})
    kfac = None
    if kfac_config.enabled:
        members = {
            name: KFAC(
                getattr(players, name),
                kfac_config,
                optimizer=_Group(optimizer, index),
                total_steps=total_steps,
                # The likelihood is that of the discriminator's logits, not of a generator's samples.
                check_scale=name == "discriminator",
            )
            for index, name in enumerate(("generator", "discriminator"))
        }
        kfac = PlayersKFAC(members, {"generator": 1.0, "discriminator": own.damping_factor})
    return DDPEngine(players), optimizer, kfac


@dataclass(frozen=True)
class _Group:
    """One group of an optimizer: where a player's K-FAC reads its learning rate."""

    optimizer: torch.optim.Optimizer
    index: int

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [self.optimizer.param_groups[self.index]]


def _all(source: Source) -> tuple[Tensor, Tensor]:
    """Return all samples and labels of a source, on the device."""
    batches = list(evaluation_batches(source, len(source), _BATCH, 0, 1))
    inputs = [one_tensor(inputs) for _, inputs, _ in batches]
    return torch.cat(inputs), torch.cat([targets for _, _, targets in batches])
