"""Figures of a task that are no mean over the loss's terms, such as how well decoded sentences match.

    each rank:   a batch of held-out samples ─▶ judge ─▶ a finding for each sample
    all ranks:   findings of all samples, in their order ─▶ summarize ─▶ named figures

A data source brings one in `DataSplits.score`. It runs wherever held-out data is evaluated: at `train.evaluate_every`,
and at the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

# Targets of a sequence that losses and scores ignore; `loss.ignore_index` is the same by default.
IGNORED = -100


class Score(ABC):
    """Judges a model on held-out samples."""

    @abstractmethod
    def judge(self, model: nn.Module, inputs: Any, targets: Tensor, outputs: Tensor) -> list[Any]:
        """Return the findings of each sample of a batch, without gradients; small, and picklable.

        Under engines that shard weights a forward pass is a collective: call the model itself, none of its parts, and
        as often for every batch.

        Args:
            model: The model, in evaluation mode.
            inputs: The model's inputs, as in the data: a tensor, or a tuple or dict of them.
            targets: The loss's targets.
            outputs: The model's outputs for these inputs.
        """

    @abstractmethod
    def summarize(self, findings: Sequence[Any]) -> dict[str, float]:
        """Return the figures by name, the main one first.

        Args:
            findings: Those of all evaluated samples, in the data's order; the same on every rank.
        """


class MaskedAccuracy(Score):
    """Share of the masked tokens that the model names."""

    def judge(self, model: nn.Module, inputs: Any, targets: Tensor, outputs: Tensor) -> list[Any]:
        """Return, of each sample, how many masked tokens it has and how many of them were named."""
        masked = targets != IGNORED
        right = (outputs.argmax(dim=-1) == targets) & masked
        return list(zip(masked.sum(dim=1).tolist(), right.sum(dim=1).tolist(), strict=True))

    def summarize(self, findings: Sequence[Any]) -> dict[str, float]:
        """Return the accuracy over all masked tokens."""
        masked, right = (sum(column) for column in zip(*findings, strict=True))
        return {"masked accuracy": right / max(masked, 1)}
