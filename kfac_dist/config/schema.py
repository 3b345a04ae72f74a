"""The typed, frozen sections of a run: what a YAML file may say, and what every value means.

Each section answers one question, so that a constructor takes the few options that it needs:

    run  model  data  loss  optimizer  engine  train  checkpoint  metrics        the training run
    kfac = curvature (what is measured) + inversion (what is solved)
         + distribution (who does it) + update (what is done with the result)

Everything here is a plain value: nothing imports torch, so that a configuration can be checked in milliseconds.
Values out of range and unknown keys are refused here; `kfac_dist.config.load` turns a refusal into a message that
names the file, the line, the value found and the values allowed.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kfac_dist.config.divergence import DivergenceConfig as DivergenceConfig
from kfac_dist.config.engine import EngineConfig as EngineConfig
from kfac_dist.config.engine import EngineName as EngineName
from kfac_dist.config.engine import FSDP2Config as FSDP2Config
from kfac_dist.config.engine import Precision as Precision
from kfac_dist.config.metrics import MetricsConfig as MetricsConfig
from kfac_dist.config.section import (
    BelowOne,
    Count,
    CountOrZero,
    Flag,
    Fraction,
    NonNegative,
    Pattern,
    Positive,
    Seconds,
    Seed,
)
from kfac_dist.config.section import Section as Section

# ---------------------------------------------------------------------------------------------- schedules


class ScheduleKind(StrEnum):
    """How a scheduled value moves from its start to its end once the warm-up is over."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"
    EXPONENTIAL = "exponential"


class Schedule(Section):
    """A scalar as a function of the optimizer step.

    A bare number in YAML means a constant. With `steps` unset the schedule spans the whole run.
    """

    value: Positive
    kind: ScheduleKind = ScheduleKind.CONSTANT
    final: NonNegative | None = None
    steps: Count | None = None
    warmup_steps: CountOrZero = 0
    warmup_from: NonNegative = 0.0

    @model_validator(mode="before")
    @classmethod
    def _number_is_constant(cls, data: Any) -> Any:
        return {"value": data} if isinstance(data, int | float) and not isinstance(data, bool) else data

    @model_validator(mode="after")
    def _final_fits_kind(self) -> Self:
        if self.kind is ScheduleKind.CONSTANT and self.final is not None:
            raise ValueError("final has no effect on a constant schedule: set kind to linear, cosine or exponential")
        if self.kind is not ScheduleKind.CONSTANT and self.final is None:
            raise ValueError(f"kind {self.kind} needs final, the value at the schedule's end")
        if self.kind is ScheduleKind.EXPONENTIAL and self.final == 0:
            raise ValueError("final is 0, which an exponential schedule never reaches: give it a positive value")
        if self.kind is ScheduleKind.CONSTANT and self.steps is not None:
            raise ValueError("steps has no effect on a constant schedule: set kind to linear, cosine or exponential")
        if self.steps is not None and self.steps <= self.warmup_steps:
            raise ValueError(f"steps ({self.steps}) must exceed warmup_steps ({self.warmup_steps}), which it includes")
        if self.warmup_from and not self.warmup_steps:
            raise ValueError("warmup_from has no effect without a warm-up: set warmup_steps")
        return self


# --------------------------------------------------------------------------------------------------- kfac


class Fisher(StrEnum):
    """Whose gradients make the output factor G."""

    EMPIRICAL = "empirical"
    MC = "mc"
    TYPE2 = "type2"
    INPUT_ONLY = "input_only"


class Sharing(StrEnum):
    """How positions that share one weight (tokens, pixels) enter the factors (Eschenhagen et al. 2023)."""

    EXPAND = "expand"
    REDUCE = "reduce"


class LossTerms(StrEnum):
    """What the mean in the loss runs over: samples (one label each), or tokens (every position has a label)."""

    SAMPLE = "sample"
    TOKEN = "token"


class Likelihood(StrEnum):
    """The predictive distribution whose negative log-likelihood the loss is; needed by `mc` and `type2`."""

    CATEGORICAL = "categorical"
    BERNOULLI = "bernoulli"
    GAUSSIAN = "gaussian"


class Uncovered(StrEnum):
    """What happens to the gradients of parameters that no block covers."""

    PLAIN = "plain"
    DIAGONAL = "diagonal"


class DType(StrEnum):
    """Floating-point formats that factors may be stored or sent in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


_MOST_DECAY_IN_BF16 = 0.95


class CurvatureConfig(Section):
    """What is measured: which layers, whose gradients, how often, in which precision.

    Attributes:
        fisher: Whose gradients make G. `mc` and `type2` are the true Fisher and need `likelihood`.
        likelihood: Predictive distribution of the model; the training loop sets it from the loss.
        loss_terms: What the mean in the loss runs over.
        sharing: Weight-sharing setting of every block that `sharing_overrides` does not match.
        sharing_overrides: Pattern (`fnmatch`, on module names) to setting; the first match wins.
        include: Patterns of module names that get K-FAC blocks.
        exclude: Patterns of module names that get none; wins over `include`.
        uncovered: What no block covers keeps its `plain` gradient, or is divided by a `diagonal` Fisher.
        decay: β of the running average, applied once every `factor_every` steps.
        factor_every: Steps between measurements.
        sample_fraction: Share of rows (samples, or tokens) that enter the factors: 1/k, every k-th row.
        factor_dtype: Precision in which the running averages are kept.
        seed: Seed of the labels that `mc` draws.
    """

    fisher: Fisher = Fisher.EMPIRICAL
    likelihood: Likelihood | None = None
    loss_terms: LossTerms = LossTerms.SAMPLE
    sharing: Sharing = Sharing.EXPAND
    sharing_overrides: dict[str, Sharing] = Field(default_factory=dict)
    include: tuple[Pattern, ...] = ("*",)
    exclude: tuple[Pattern, ...] = ()
    uncovered: Uncovered = Uncovered.PLAIN
    decay: BelowOne = 0.95
    factor_every: Count = 10
    sample_fraction: Annotated[float, Field(ge=1e-6, le=1, strict=True, allow_inf_nan=False)] = 1.0
    factor_dtype: DType = DType.FLOAT32
    seed: Seed = 0

    @model_validator(mode="after")
    def _storage_can_follow(self) -> Self:
        if self.factor_dtype is DType.BFLOAT16 and self.decay > _MOST_DECAY_IN_BF16:
            raise ValueError(
                f"factor_dtype bfloat16 can't follow a decay of {self.decay}: steps of {1 - self.decay:.2g} round away "
                f"in eight bits; use float32, or a decay of at most {_MOST_DECAY_IN_BF16}"
            )
        return self

    @model_validator(mode="after")
    def _fraction_is_one_in_k(self) -> Self:
        rows = 1 / self.sample_fraction
        if abs(rows - round(rows)) > 0.02 * rows:
            raise ValueError(
                f"sample_fraction ({self.sample_fraction}) must be 1/k for a whole k, such as 0.5 or 0.1: one row "
                "in k is measured"
            )
        return self


class Solver(StrEnum):
    """How a damped factor is inverted."""

    CHOLESKY = "cholesky"
    EIGEN = "eigen"
    NEWTON_SCHULZ = "newton_schulz"


class InversionConfig(Section):
    """What is solved: the method, its damping, and when.

    Attributes:
        solver: `cholesky` and `newton_schulz` damp the factors (factored Tikhonov); `eigen` damps exactly.
        damping: λ; a number or a schedule over steps.
        inverse_every: Steps between refreshes of one block's inverses (T_inv); a multiple of `factor_every`.
        stagger: Slots over which the blocks' refreshes spread inside one T_inv window; 1 refreshes all at once.
        inverse_lag: Steps between the refresh of an inverse and its first use, so that sharing overlaps training.
        early_refresh: At the start, inverses also refresh at this step and at 2, 4, 8, … times it, until the regular
            refreshes begin; those steps measure, too. 0 keeps the first batch's inverses until then.
        max_factor_dim: Factors larger than this are cut into near-equal diagonal blocks (Block K-FAC).
        inverse_dtype: Precision in which inverses (eigenbases) are kept and multiplied with gradients; solved they are
            in fp32.
    """

    solver: Solver = Solver.CHOLESKY
    damping: Schedule = Schedule(value=0.003)
    inverse_every: Count = 100
    stagger: Count = 1
    inverse_lag: CountOrZero = 0
    early_refresh: CountOrZero = 1
    max_factor_dim: Annotated[int, Field(ge=2, strict=True)] | None = None
    inverse_dtype: DType = DType.FLOAT32


class AssignmentStrategy(StrEnum):
    """Which rank inverts what."""

    ROUND_ROBIN = "round_robin"
    BALANCED = "balanced"


class CostModel(StrEnum):
    """What the balanced assignment believes an inversion costs: n³, or seconds measured at start-up."""

    CUBIC = "cubic"
    MEASURED = "measured"


class Placement(StrEnum):
    """Who holds inverses and preconditions (COMM-OPT, MEM-OPT, and the grid between them)."""

    AUTO = "auto"
    REPLICATED = "replicated"
    OWNER = "owner"
    HYBRID = "hybrid"
    NODE = "node"


class Reduction(StrEnum):
    """How local statistics become global."""

    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"


class ReduceEvery(StrEnum):
    """When local statistics become global: the numbers are the same."""

    REFRESH = "refresh"
    STEP = "step"


class Backend(StrEnum):
    """What carries K-FAC's own collectives; gradients always travel as the engine sends them."""

    TORCH = "torch"
    MPI = "mpi"


class DistributionConfig(Section):
    """Who does it, and what crosses the network.

    Attributes:
        backend: What carries factors and inverses: `torch` (gloo, NCCL), or `mpi` for CPU clusters whose network only
            MPI drives; the ranks are then started by mpirun.
        assignment: Which rank inverts which unit.
        cost_model: Cost that `balanced` equalises.
        placement: Who holds inverses and preconditions; `auto` is `replicated` under DDP, `owner` when sharded.
        grad_worker_fraction: `hybrid` only: share of the ranks that precondition one block; times W it is a whole
            number that divides W.
        reduction: `all_reduce` gives every rank every factor, `reduce_scatter` only those that it inverts.
        reduce_every: `refresh` reduces when an inverse needs it, `step` at every measurement.
        communication_dtype: Precision of factors on the wire.
        pack_triangles: Send only one triangle of symmetric matrices: half the bytes for two copies; pays on slow links.
        buckets: Number of collectives that one reduction is cut into, so that it overlaps with backward.
        overlap: Start reducing during the backward that the loop has announced as the step's last, by
            `kfac.micro_batch(last=True)`; off, or without that word, reduces in `step()`.
        timeout_seconds: How long a collective of K-FAC may wait before it fails on every rank.
    """

    backend: Backend = Backend.TORCH
    assignment: AssignmentStrategy = AssignmentStrategy.ROUND_ROBIN
    cost_model: CostModel = CostModel.CUBIC
    placement: Placement = Placement.AUTO
    grad_worker_fraction: Fraction | None = None
    reduction: Reduction = Reduction.ALL_REDUCE
    reduce_every: ReduceEvery = ReduceEvery.REFRESH
    communication_dtype: DType = DType.FLOAT32
    pack_triangles: Flag = False
    buckets: Count = 4
    overlap: Flag = True
    timeout_seconds: Seconds = 600.0

    @model_validator(mode="after")
    def _fraction_belongs_to_hybrid(self) -> Self:
        hybrid = self.placement is Placement.HYBRID
        if hybrid and self.grad_worker_fraction is None:
            raise ValueError(
                "placement hybrid needs grad_worker_fraction, the share of ranks that precondition a block"
            )
        if not hybrid and self.grad_worker_fraction is not None:
            raise ValueError(f"grad_worker_fraction needs placement hybrid; with {self.placement} leave it out")
        if self.assignment is AssignmentStrategy.ROUND_ROBIN and self.cost_model is CostModel.MEASURED:
            raise ValueError("cost_model measured has no effect on round_robin: set assignment to balanced")
        return self


class UpdateConfig(Section):
    """What is done with the preconditioned gradient Δ.

    Attributes:
        kl_clip: κ of the trust region: Δ is scaled by min(1, sqrt(κ / (lr² Σ⟨Δ, ∇⟩))); null switches it off.
        kl_clip_lr: The lr of that formula. `current` is the optimizer's lr of this step: while the clip is active the
            step's length is then set by κ alone. A number fixes it, so that an lr schedule keeps its effect.
        l2: Coefficient of a weight decay that is part of the loss: l2·θ joins the gradient before preconditioning and
            l2 joins the damping. (An optimizer's own weight_decay stays outside of K-FAC, as in AdamW.)
    """

    kl_clip: Positive | None = 0.001
    kl_clip_lr: Literal["current"] | Positive = "current"
    l2: NonNegative = 0.0

    @model_validator(mode="after")
    def _lr_belongs_to_clip(self) -> Self:
        if self.kl_clip is None and self.kl_clip_lr != "current":
            raise ValueError("kl_clip_lr has no effect while kl_clip is null: leave it out, or give kl_clip a value")
        return self


class KFACConfig(Section):
    """Everything that `KFAC` needs besides the model."""

    enabled: Flag = True
    curvature: CurvatureConfig = Field(default_factory=CurvatureConfig)
    inversion: InversionConfig = Field(default_factory=InversionConfig)
    distribution: DistributionConfig = Field(default_factory=DistributionConfig)
    update: UpdateConfig = Field(default_factory=UpdateConfig)

    @model_validator(mode="after")
    def _intervals_fit(self) -> Self:
        statistics, refresh = self.curvature.factor_every, self.inversion.inverse_every
        if refresh % statistics:
            raise ValueError(
                f"inversion.inverse_every ({refresh}) must be a multiple of curvature.factor_every ({statistics}), "
                "so that a refresh has fresh statistics"
            )
        if self.inversion.stagger > refresh // statistics:
            raise ValueError(
                f"inversion.stagger ({self.inversion.stagger}) may be at most inverse_every / factor_every "
                f"({refresh // statistics}): every slot refreshes at a step that measures"
            )
        if self.inversion.inverse_lag >= refresh // self.inversion.stagger:
            raise ValueError(
                f"inversion.inverse_lag ({self.inversion.inverse_lag}) must be shorter than the time between two "
                f"refreshes ({refresh // self.inversion.stagger} steps)"
            )
        return self


# ---------------------------------------------------------------------------------------------------- run


class Target(Section):
    """A shipped name, or `package.module:callable`, with its keyword arguments."""

    name: Annotated[str, Field(min_length=1)]
    args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _string_is_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data


class RunConfig(Section):
    """Name, seed and place of a run; its files go to `directory/name`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    directory: str = "runs"
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_seconds: Seconds = 600.0


class LossName(StrEnum):
    """Losses of the shipped runs, as negative log-likelihoods averaged over their terms."""

    CROSS_ENTROPY = "cross_entropy"
    TOKEN_CROSS_ENTROPY = "token_cross_entropy"
    SIGMOID_CROSS_ENTROPY = "sigmoid_cross_entropy"
    MSE = "mse"

    @property
    def likelihood(self) -> Likelihood:
        """The predictive distribution whose negative log-likelihood this loss is."""
        match self:
            case LossName.CROSS_ENTROPY | LossName.TOKEN_CROSS_ENTROPY:
                return Likelihood.CATEGORICAL
            case LossName.SIGMOID_CROSS_ENTROPY:
                return Likelihood.BERNOULLI
            case LossName.MSE:
                return Likelihood.GAUSSIAN

    @property
    def loss_terms(self) -> LossTerms:
        """What this loss is a mean over."""
        return LossTerms.TOKEN if self is LossName.TOKEN_CROSS_ENTROPY else LossTerms.SAMPLE


class LossConfig(Section):
    """The loss; K-FAC takes its likelihood and its terms from here."""

    name: LossName
    ignore_index: Annotated[int, Field(strict=True)] = -100

    @model_validator(mode="after")
    def _index_belongs_to_labels(self) -> Self:
        if self.ignore_index != -100 and self.name.likelihood is not Likelihood.CATEGORICAL:
            raise ValueError(f"ignore_index has no effect on {self.name}, which has no class labels: leave it out")
        return self


class OptimizerName(StrEnum):
    """First-order optimizers that may take the step."""

    SGD = "sgd"
    ADAMW = "adamw"


class OptimizerConfig(Section):
    """The first-order optimizer that takes the (preconditioned) step."""

    name: OptimizerName = OptimizerName.SGD
    lr: Schedule
    momentum: BelowOne = 0.9
    nesterov: Flag = False
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0

    @model_validator(mode="after")
    def _options_belong_to_optimizer(self) -> Self:
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        foreign = ("momentum", "nesterov") if self.name is OptimizerName.ADAMW else ("betas",)
        for option in foreign:
            if getattr(self, option) != defaults[option]:
                raise ValueError(f"{option} has no effect on {self.name}: leave it out")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum > 0")
        return self


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


class CheckpointConfig(Section):
    """When to save, how many to keep, and what to start from.

    Attributes:
        every: Steps between checkpoints; 0 saves at the end only.
        every_minutes: Minutes after which rank 0's clock asks for one more; 0 never does. It leaves no trace in the
            run, and holds every rank's own statistics.
        asynchronous: Write while training goes on: it waits for the copy to host memory only, and, if the last write
            isn't over when the next one is due, for that.
        keep: Newest checkpoints that stay on disk.
        resume: `auto` takes the newest good checkpoint of this run, `never` starts afresh, else a checkpoint's path.
    """

    every: CountOrZero = 0
    every_minutes: NonNegative = 0.0
    asynchronous: Flag = True
    keep: Count = 2
    resume: str = "never"


class Config(Section):
    """A whole run."""

    run: RunConfig
    model: Target
    data: Target
    loss: LossConfig
    optimizer: OptimizerConfig
    kfac: KFACConfig = Field(default_factory=KFACConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    train: TrainConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    compare: dict[str, OptimizerConfig] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _curvature_fits_loss(self) -> Self:
        loss, curvature = self.loss.name, self.kfac.curvature
        if curvature.likelihood not in (None, loss.likelihood):
            raise ValueError(
                f"kfac.curvature.likelihood ({curvature.likelihood}) contradicts loss.name ({loss}), whose likelihood "
                f"is {loss.likelihood}: leave it out, it follows from the loss"
            )
        if "loss_terms" in curvature.model_fields_set and curvature.loss_terms is not loss.loss_terms:
            raise ValueError(
                f"kfac.curvature.loss_terms ({curvature.loss_terms}) contradicts loss.name ({loss}), a mean over "
                f"{loss.loss_terms}s: leave it out, it follows from the loss"
            )
        return self
