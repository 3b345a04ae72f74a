"""`train`: length, batches and evaluation of a run."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from kfac_dist.config.divergence import DivergenceConfig
from kfac_dist.config.section import Count, CountOrZero, Positive, Section


class TrainConfig(Section):
    """Length, batches and evaluation of the run.

    Attributes:
        batch_size: Samples of one optimizer step over all ranks and micro-batches, so that W does not change the run.
        accumulate: Micro-batches of one step.
        steps: Optimizer steps; give this or `epochs`.
        epochs: Passes over the data.
        evaluate_every: Steps between evaluations; 0 evaluates at the end only.
        log_every: Steps between lines of metrics.
        clip_grad_norm: Norm to which the gradient that the optimizer sees is clipped.
        loader_workers: Processes a rank that load data which is not held in memory; 0 loads between steps.
        divergence: What is done about steps whose loss or gradients are not finite.
    """

    batch_size: Count
    accumulate: Count = 1
    steps: Count | None = None
    epochs: Count | None = None
    evaluate_every: CountOrZero = 0
    log_every: Count = 10
    clip_grad_norm: Positive | None = None
    loader_workers: CountOrZero = 0
    divergence: DivergenceConfig = Field(default_factory=DivergenceConfig)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give steps or epochs, one of the two (null takes one back that an included file gives)")
        if self.batch_size < self.accumulate:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be at least accumulate ({self.accumulate}): "
                "each micro-batch needs a sample"
            )
        return self
