"""Models of every layer type and every trap, each with batches that don't depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC
from tests.preconditioner.workloads import GLOBAL_BATCH, part, place, wrap

CLASSES = 5
IGNORED = -100


@dataclass(frozen=True)
class Case:
    """One model in training.

    Attributes:
        make: The model; it returns logits `[B, C]`, or `[B, T, C]` when there is a label for each token.
        inputs: The global batch `[GLOBAL_BATCH, ...]`.
        tokens: T, labels of a sample; 0 for one label a sample. A third of a token's labels is ignored, unevenly.
        curvature: Options of `kfac.curvature`.
        placement: Option of `kfac.distribution`.
        splits: Option of `kfac.inversion`.
        autocast: Precision of the forward pass.
        scaled: Whether the loss is scaled, as for fp16.
        steps: How many.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    tokens: int = 0
    curvature: Mapping[str, Any] = field(default_factory=dict)
    placement: str = "auto"
    splits: Mapping[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    scaled: bool = False
    steps: int = 6

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 + step)
        inputs = self.inputs(generator)
        if not self.tokens:
            return inputs, torch.randint(0, CLASSES, (GLOBAL_BATCH,), generator=generator)
        labels = torch.randint(0, CLASSES, (GLOBAL_BATCH, self.tokens), generator=generator)
        lengths = torch.randint(1, self.tokens + 1, (GLOBAL_BATCH, 1), generator=generator)
        return inputs, labels.where(torch.arange(self.tokens) < lengths, IGNORED)


def train(case: Case) -> dict[str, Tensor]:
    """Parameters after the case's steps; the ranks' shares of the batch are uneven."""
    rank, size = place()
    torch.manual_seed(1)
    model = case.make()
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=case.scaled)
    options: dict[str, Any] = {
        "curvature": {
            "factor_every": 2,
            "decay": 0.8,
            "likelihood": "categorical",
            "loss_terms": "token" if case.tokens else "sample",
            **case.curvature,
        },
        "inversion": {"inverse_every": 2, "damping": 0.05, "splits": dict(case.splits)},
        "distribution": {"placement": case.placement},
    }
    kfac = KFAC(wrapped, options, optimizer=optimizer, grad_scaler=scaler)
    for step in range(case.steps):
        inputs, labels = case.batch(step)
        own = part(rank, size)
        divisor = int((labels != IGNORED).sum()) / size
        kfac.micro_batch(first_sample=own.start, divisor=divisor, terms=float((labels[own] != IGNORED).sum()))
        optimizer.zero_grad()
        with nullcontext() if case.autocast is None else torch.autocast("cpu", case.autocast):
            outputs = wrapped(inputs[own])
        kfac.fisher_backward(outputs)
        loss = F.cross_entropy(outputs.float().flatten(0, -2), labels[own].flatten(), reduction="sum") / divisor
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        kfac.step()
        scaler.step(optimizer)
        scaler.update()
    kfac.remove()
    return {key: value.detach().clone() for key, value in model.named_parameters()}
