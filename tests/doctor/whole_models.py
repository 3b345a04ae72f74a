"""Models as people bring them, with data that fits, for the doctor to examine: what a user's own module would hold."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

from kfac_dist.tasks import DataSplits
from tests.preconditioner.models import IGNORED

SAMPLES, TEST = 12, 4


def tokens(*, vocabulary: int, length: int, classes: int, labels: str = "token") -> DataSplits:
    """Sequences with a label each, or with one a position, of which the first sample's last is ignored."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, vocabulary, (SAMPLES + TEST, length), generator=generator)
    shape = (SAMPLES + TEST, *([length] if labels == "token" else []))
    targets = torch.randint(0, classes, shape, generator=generator)
    if labels == "token":
        targets[0, -1] = IGNORED
    return _splits(words, targets)


def images(*, size: int, classes: int, labels: str = "sample") -> DataSplits:
    """Images of two channels with a label each, or with one a pixel."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(SAMPLES + TEST, 2, size, size, generator=generator)
    shape = (SAMPLES + TEST, *([size * size] if labels == "token" else []))
    return _splits(pixels, torch.randint(0, classes, shape, generator=generator))


def _splits(inputs: torch.Tensor, targets: torch.Tensor) -> DataSplits:
    return DataSplits(
        TensorDataset(inputs[:SAMPLES], targets[:SAMPLES]), TensorDataset(inputs[SAMPLES:], targets[SAMPLES:])
    )
