"""A toy translation: the translation is the source. Sources of different lengths, so that both sides are padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kfac_dist.tasks import DataSplits
from kfac_dist.tasks.decoding import decode
from kfac_dist.tasks.scores import IGNORED, Score

PAD, END, START, FIRST = 0, 1, 2, 3
LENGTH, VOCABULARY = 5, 9


def pairs(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(FIRST, VOCABULARY, (count, LENGTH - 1), generator=generator)
    lengths = torch.randint(1, LENGTH, (count, 1), generator=generator)
    beyond = torch.arange(LENGTH - 1) >= lengths
    source = letters.masked_fill(beyond, PAD)
    prefix = torch.cat([torch.full((count, 1), START), source], dim=1)
    target = torch.cat([letters.masked_fill(beyond, IGNORED), torch.full((count, 1), IGNORED)], dim=1)
    return TensorDataset(source, prefix, target.scatter(1, lengths, END))


class Copied(Score):
    """Which samples were decoded to themselves."""

    def judge(self, model: nn.Module, inputs: Any, targets: Tensor, outputs: Tensor) -> list[Any]:
        assert outputs.shape == (*targets.shape, VOCABULARY)
        source, prefix = inputs
        found = decode(model, source, prefix[:, 0], end=END, length=LENGTH)
        wanted = targets.masked_fill(targets == IGNORED, PAD)
        return [(row.tolist(), bool(right)) for row, right in zip(source, (found == wanted).all(1), strict=True)]

    def summarize(self, findings: Sequence[Any]) -> dict[str, float]:
        rows = [row for row, _ in findings]
        assert rows == [source.tolist() for source, *_ in held_out()], "all samples, once, in the data's order"
        return {"copied": sum(right for _, right in findings) / len(findings), "samples": len(findings)}


def held_out() -> TensorDataset:
    return pairs(11, 1)


def copying(samples: int = 200) -> DataSplits:
    return DataSplits(pairs(samples, 0), held_out(), Copied())
