"""`kfac.curvature`: measurement of the statistics."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from kfac_dist.config.section import BelowOne, Count, Flag, Pattern, Positive, Section, Seed, check_one_in_k


class Fisher(StrEnum):
    """The gradients that make the output factor G."""

    EMPIRICAL = "empirical"
    MC = "mc"
    TYPE2 = "type2"
    INPUT_ONLY = "input_only"


class Sharing(StrEnum):
    """Treatment of positions that share one weight (tokens, pixels) in the factors (Eschenhagen et al. 2023)."""

    EXPAND = "expand"
    REDUCE = "reduce"


class LossTerms(StrEnum):
    """The terms of the loss's mean: samples (one label each), or tokens (every position has a label)."""

    SAMPLE = "sample"
    TOKEN = "token"


class Likelihood(StrEnum):
    """The predictive distribution whose negative log-likelihood the loss is; needed by `mc` and `type2`."""

    CATEGORICAL = "categorical"
    BERNOULLI = "bernoulli"
    GAUSSIAN = "gaussian"


class Uncovered(StrEnum):
    """Treatment of parameters that no block covers."""

    PLAIN = "plain"
    DIAGONAL = "diagonal"
    DIAGONAL_MC = "diagonal_mc"

    @property
    def draws(self) -> bool:
        """Whether labels are drawn from the model for it."""
        return self is Uncovered.DIAGONAL_MC


class DType(StrEnum):
    """Floating-point formats that factors and inverses may be stored or sent in; `auto` follows the model."""

    AUTO = "auto"
    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class OnMismatch(StrEnum):
    """Treatment of a layer whose captured inputs and output gradients don't make its gradient.

    Attributes:
        PLAIN: It keeps its plain gradient from then on, and is named.
        ERROR: Training stops with an error that names it.
    """

    PLAIN = "plain"
    ERROR = "error"


_MOST_DECAY_IN_BF16 = 0.95


class ClassConditionalConfig(Section):
    """One A and one G for each class, combined into the Kronecker product that is nearest to Σ π_c A_c⊗G_c.

    `true` in YAML means all defaults, `false` is null.

    Attributes:
        classes: C, the number of classes. The training loop takes it from the model's outputs; a `KFAC` that is built
            by hand, and `kfac-dist plan`, need it.
        limit_gib: GiB that a rank may give to these statistics, C times the ordinary ones; more is refused before
            anything is allocated.
    """

    classes: Count | None = None
    limit_gib: Positive = 4.0


def from_flag(value: Any) -> Any:
    """Read `true` as a section of defaults and `false` as none."""
    if isinstance(value, bool):
        return {} if value else None
    return value


class CurvatureConfig(Section):
    """Measurement: the layers, the gradients that make G, intervals, precision.

    Attributes:
        fisher: Gradients that G is computed from. `mc` and `type2` give the true Fisher and need `likelihood`.
        likelihood: Predictive distribution of the model; the training loop sets it from the loss.
        loss_terms: Terms of the mean in the loss.
        sharing: Weight-sharing setting of every block that `sharing_overrides` does not match.
        sharing_overrides: Pattern (`fnmatch`, on module names) to setting; the first match wins.
        include: Patterns of module names that get K-FAC blocks.
        exclude: Patterns of module names that get none; wins over `include`.
        uncovered: A parameter without a block keeps its `plain` gradient, or is divided by a `diagonal` Fisher: of the
            data's labels, from the averaged gradient alone; `diagonal_mc` samples labels from the model, at the cost of
            a backward pass and a sum over the ranks in steps that measure.
        decay: β of the running average, applied once every `factor_every` steps.
        decay_ramp: Use β = min(1 − 1/k, decay) in the k-th regular measurement: at first the plain mean of all, then
            the running average (Martens & Grosse 2015, §5).
        factor_every: Steps between measurements of one layer.
        stagger: Parts in which layers take turns inside one `factor_every` window, so that steps take equally long; 1
            measures all in one step. `inversion.stagger` must be a multiple of it.
        sample_fraction: Share of rows (samples, or tokens) that enter the factors: 1/k, every k-th row.
        factor_dtype: Precision in which the running averages are kept. `auto` is float64 if a covered layer has
            parameters in it, else float32. With float64 everything else is measured and solved in it, too.
        class_conditional: Keep separate statistics for each class, and combine them at a refresh.
        on_mismatch: A layer whose captured inputs and output gradients don't reproduce its gradient (its class
            transforms the weight, its weight is also used directly, ...) keeps its `plain` gradient, or is an `error`.
            Each layer is checked once, in the first step that measures it.
        seed: Seed of the labels that `mc` samples.
    """

    questions: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Which layers?": ("include", "exclude", "uncovered", "on_mismatch"),
        "Whose gradients?": ("fisher", "likelihood", "loss_terms", "class_conditional", "seed"),
        "How are positions combined that share a weight?": ("sharing", "sharing_overrides"),
        "How often, and of how much?": ("factor_every", "stagger", "sample_fraction"),
        "For how long, and how precisely?": ("decay", "decay_ramp", "factor_dtype"),
    }

    fisher: Fisher = Fisher.EMPIRICAL
    likelihood: Likelihood | None = None
    loss_terms: LossTerms = LossTerms.SAMPLE
    sharing: Sharing = Sharing.EXPAND
    sharing_overrides: dict[str, Sharing] = Field(default_factory=dict)
    include: tuple[Pattern, ...] = ("*",)
    exclude: tuple[Pattern, ...] = ()
    uncovered: Uncovered = Uncovered.PLAIN
    decay: BelowOne = 0.95
    decay_ramp: Flag = False
    factor_every: Count = 10
    stagger: Count = 1
    sample_fraction: Annotated[float, Field(ge=1e-6, le=1, strict=True, allow_inf_nan=False)] = 1.0
    factor_dtype: DType = DType.AUTO
    class_conditional: ClassConditionalConfig | None = None
    on_mismatch: OnMismatch = OnMismatch.PLAIN
    seed: Seed = 0

    @field_validator("class_conditional", mode="before")
    @classmethod
    def _flag_is_section(cls, value: Any) -> Any:
        return from_flag(value)

    @model_validator(mode="after")
    def _classes_have_two_factors(self) -> Self:
        if self.class_conditional is not None and self.fisher is Fisher.INPUT_ONLY:
            raise ValueError(
                "class_conditional has no effect on fisher input_only, which has no G for A to go with: use another "
                "fisher, or leave class_conditional out"
            )
        return self

    @property
    def class_slots(self) -> int:
        """Number of classes whose statistics of a block are kept apart; 0 if they aren't.

        A token without a label (padding, `ignore_index`) has no gradient of its own loss term, but may have one from
        others': for token losses such positions are one class more.
        """
        if self.class_conditional is None or self.class_conditional.classes is None:
            return 0
        return self.class_conditional.classes + (self.loss_terms is LossTerms.TOKEN)

    @model_validator(mode="after")
    def _storage_can_follow(self) -> Self:
        if self.factor_dtype is DType.BFLOAT16 and self.decay > _MOST_DECAY_IN_BF16:
            raise ValueError(
                f"factor_dtype bfloat16 can't follow a decay of {self.decay}: steps of {1 - self.decay:.2g} round away "
                f"in eight bits; use float32, or a decay of at most {_MOST_DECAY_IN_BF16}"
            )
        return self

    @model_validator(mode="after")
    def _turns_cost_nothing(self) -> Self:
        if self.stagger > self.factor_every:
            raise ValueError(
                f"stagger ({self.stagger}) may be at most factor_every ({self.factor_every}): layers take turns inside "
                "one window, at different steps"
            )
        if self.stagger > 1 and self.fisher in (Fisher.MC, Fisher.TYPE2):
            raise ValueError(
                f"stagger ({self.stagger}) must be 1 while fisher is {self.fisher}, which takes backward passes of its "
                f"own at every step that measures: {self.stagger} times as many, if layers take turns"
            )
        return self

    @model_validator(mode="after")
    def _labels_are_drawn(self) -> Self:
        if self.uncovered.draws and self.fisher not in (Fisher.MC, Fisher.TYPE2):
            raise ValueError(
                f"uncovered diagonal_mc draws labels from the model, which fisher {self.fisher} doesn't: set fisher to "
                "mc or type2, or uncovered to diagonal"
            )
        return self

    @model_validator(mode="after")
    def _fraction_is_one_in_k(self) -> Self:
        check_one_in_k("sample_fraction", self.sample_fraction, "one row in k is measured")
        return self
