"""`train`: length, batches and evaluation of a run, and its reactions to steps that are not finite."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from kfac_dist.config.section import MOST, BelowOne, Count, CountOrZero, Positive, Section


class BatchGrowth(Section):
    """A batch that grows exponentially, from `train.batch_size` in the first step on (Martens & Grosse 2015, §13).

    A remainder of an epoch of less than half a batch joins the last batch, so that no batch is much smaller than the
    one before.

    Attributes:
        final: Final batch size, at most the number of samples in the data.
        steps: Number of steps until then.
    """

    final: Count
    steps: Count


class DivergenceConfig(Section):
    """Reactions to steps whose loss or gradients are not finite: all ranks skip them; more follows if they continue.

    A skipped step's gradients count as zeros, and its statistics as never measured. At the next logged step the damping
    of K-FAC is raised; later logged steps without a skip lower it again. Of a step that is taken, a rank may have to
    drop statistics that aren't finite: the logged window counts as one with a skip.

    Attributes:
        skips: Steps skipped in a row, or logged windows in a row with dropped statistics, after which the run goes back
            to its newest checkpoint.
        damping_factor: Factor by which a skip multiplies the damping; logged steps without a skip divide by it again.
        rollbacks: Number of returns to a checkpoint; then, or without a checkpoint, it ends as diverged.
    """

    skips: Count = 10
    damping_factor: Annotated[float, Field(ge=1, le=MOST, strict=True, allow_inf_nan=False)] = 10.0
    rollbacks: CountOrZero = 2


class TrainConfig(Section):
    """Length, batches and evaluation of the run.

    Attributes:
        batch_size: Samples of one optimizer step over all ranks and micro-batches, so that W does not change the run.
        batch_growth: Exponential growth of `batch_size`; null keeps it constant.
        accumulate: Micro-batches of one step.
        steps: Optimizer steps; give this or `epochs`.
        epochs: Passes over the data.
        evaluate_every: Steps between evaluations; 0 evaluates at the end only.
        log_every: Steps between lines of metrics.
        iterate_averaging: ξ of a running average of the weights, `θ̄ ← ξθ̄ + (1−ξ)θ`, ξ at most 1 − 1/k in step k. It is
            used in evaluations, including the last one, and saved beside the weights, whose training it doesn't change;
            null: none.
        clip_grad_norm: Norm to which the optimizer's gradient is clipped, after preconditioning.
        loader_workers: Processes per rank that load data which is not held in memory; 0 loads between steps.
        divergence: Handling of steps whose loss or gradients are not finite.
    """

    batch_size: Count
    batch_growth: BatchGrowth | None = None
    accumulate: Count = 1
    steps: Count | None = None
    epochs: Count | None = None
    evaluate_every: CountOrZero = 0
    log_every: Count = 10
    iterate_averaging: BelowOne | None = None
    clip_grad_norm: Positive | None = None
    loader_workers: Annotated[int, Field(ge=0, le=1024, strict=True)] = 0
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

    @model_validator(mode="after")
    def _batches_grow(self) -> Self:
        if self.batch_growth is not None and self.batch_growth.final <= self.batch_size:
            raise ValueError(
                f"batch_growth.final ({self.batch_growth.final}) must exceed batch_size ({self.batch_size}), "
                "from which the batch grows"
            )
        return self
