"""Loss and task metric of a model on held-out data, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.movement.broadcast import broadcast_all
from kfac_dist.engines import TrainingEngine
from kfac_dist.inputs import each
from kfac_dist.tasks.losses import Loss
from kfac_dist.tasks.scores import Score
from kfac_dist.training.data.batches import Source, evaluation_batches
from kfac_dist.training.passes import explained, forward, full_precision


@dataclass(frozen=True)
class Evaluation:
    """Means over the terms of the evaluated samples.

    Attributes:
        loss: Mean loss, or the value named by `Loss.evaluated`.
        metric: Mean of the task's figure, `Loss.metric`.
        scores: Further figures, by the data's own `Score`.
        references: Figures of the data alone, that the others are to be seen beside: the same at every evaluation.
        pictures: Samples to be looked at, `[n, ...]`; None where a task makes none.
    """

    loss: float
    metric: float
    scores: dict[str, float] = field(default_factory=dict)
    references: dict[str, float] = field(default_factory=dict)
    pictures: Tensor | None = None


def evaluate(
    engine: TrainingEngine,
    loss: Loss,
    source: Source,
    samples: int,
    batch_size: int,
    communicator: Communicator,
    score: Score | None = None,
) -> Evaluation:
    """Evaluate the first `samples` samples; collective.

    Every rank takes a part and evaluates rank 0's buffers (running averages of BatchNorm differ between ranks), so
    that the result is that of one model. Ranks take the same number of forward passes: under a sharded engine a pass is
    a collective, so that one with nothing left passes the first sample once more and doesn't count it.

    Args:
        engine: The model; its train/eval mode is put back.
        loss: Loss and metric.
        source: The data.
        samples: Number of its samples.
        batch_size: Samples of a forward pass on one rank.
        communicator: The ranks.
        score: Further scores; it sees each rank's part, and then the findings of all samples.
    """
    module = engine.module
    found: list[Any] = []
    share_buffers(module, communicator)
    was_training = module.training
    module.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=next(module.parameters()).device)
    with torch.no_grad():
        for counted, inputs, targets in evaluation_batches(
            source, samples, batch_size, communicator.rank, communicator.size
        ):
            with explained("evaluation", module, inputs, targets):
                prepared = each(engine.prepared, inputs)
                outputs = full_precision(forward(module, prepared))
                findings = [] if score is None else score.judge(module, prepared, targets, outputs)
                if counted:
                    found += findings
                    sums[0] += loss.total(outputs, targets)
                    sums[1] += loss.metric_sum(outputs, targets)
                    sums[2] += loss.count(targets)
    module.train(was_training)
    communicator.all_reduce(sums, label="evaluation").wait()
    total, metric, terms = sums.tolist()
    scores = {} if score is None else score.summarize(_gathered(found, communicator))
    return Evaluation(total / max(terms, 1), metric / max(terms, 1), scores)


def _gathered(found: Sequence[Any], communicator: Communicator) -> list[Any]:
    """Return all ranks' findings, in the samples' order: a rank's part follows that of the rank before it."""
    return [finding for part in communicator.gather_objects(list(found), label="scores") for finding in part]


def share_buffers(module: nn.Module, communicator: Communicator) -> None:
    """Broadcast rank 0's buffers, as DDP does before a forward pass; collective."""
    broadcast_all(communicator, [buffer for buffer in module.buffers() if buffer.is_contiguous()], 0, label="buffers")
