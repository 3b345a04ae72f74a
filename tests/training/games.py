"""A small game for the tests of training: two players of a few weights on 4×4 pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from kfac_dist.config.schema import Config
from kfac_dist.config.yaml.load import resolve
from kfac_dist.tasks import DataSplits, TwoPlayers
from tests.training.runs import small_config


def small_players(latent: int = 3) -> TwoPlayers:
    generator = nn.Sequential(nn.Linear(latent, 8), nn.Tanh(), nn.Linear(8, 16), nn.Tanh(), nn.Unflatten(1, (1, 4, 4)))
    discriminator = nn.Sequential(nn.Conv2d(1, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1))
    return TwoPlayers(generator, discriminator, latent)


def bars(samples: int = 40, poisoned: int | None = None) -> DataSplits:
    """Pictures of a bright row or a bright column, with noise; the class tells which of the eight."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(samples + 16) % 8
    pictures = 0.2 * torch.randn(samples + 16, 1, 4, 4, generator=draw) - 0.8
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        (picture[0] if label < 4 else picture[0].T)[label % 4] += 1.6
    if poisoned is not None:
        pictures[poisoned] = torch.nan
    pictures = pictures.clamp(-1, 1)
    return DataSplits(
        TensorDataset(pictures[:samples], labels[:samples]), TensorDataset(pictures[samples:], labels[samples:])
    )


def small_game(directory: Path | str, **sections: dict[str, Any]) -> Config:
    """Twelve steps of the small game, in batches of 7 that no number of ranks divides evenly."""
    values: dict[str, dict[str, Any]] = {
        "model": {"name": "tests.training.games:small_players", "args": {}},
        "data": {"name": "tests.training.games:bars"},
        "loss": {"name": "adversarial"},
        "game": {"score_samples": 30, "grid": 3, "discriminator": {"lr_factor": 0.5, "damping_factor": 2.0}},
    }
    changed = sections.pop("kfac", {})
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    usual = small_config(directory, kfac=True, **values).model_dump(mode="json")
    return resolve(Config.model_validate({**usual, "kfac": {**usual["kfac"], **changed}}))
