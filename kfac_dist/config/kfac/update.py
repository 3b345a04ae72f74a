"""`kfac.update`: length of the step, and further transforms of it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from kfac_dist.config.section import BelowOne, Count, Flag, Gone, NonNegative, Pattern, Positive, Section
from kfac_dist.errors import did_you_mean

# Registered by `kfac_dist.preconditioner.precondition.transforms.table.add_transform`.
TRANSFORM_NAMES: set[str] = set()


class Graft(StrEnum):
    """The step whose length a preconditioned gradient takes: plain descent's, or that of its sign."""

    GRADIENT = "gradient"
    SIGN = "sign"


class Direction(StrEnum):
    """The step of a weight matrix: the natural gradient's, or that of the orthogonalised, whitened momentum."""

    NATURAL = "natural"
    ORTHOGONAL = "orthogonal"


class Iteration(StrEnum):
    """Coefficients of the Newton-Schulz iteration that orthogonalises; `none` leaves the whitened momentum as it is."""

    MUON = "muon"
    POLAR_EXPRESS = "polar_express"
    NONE = "none"


class IterationDType(StrEnum):
    """Precision of that iteration; `auto` is bfloat16 on a GPU and the gradients' own elsewhere."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"


class Length(StrEnum):
    """Length of an orthogonal step of `[d_out, d_in]`.

    `spectral` is Muon's, sqrt(max(1, d_out/d_in)); `rms` is 0.2 sqrt(max(d_out, d_in)), as long as Adam's steps, so
    that its learning rates fit.
    """

    SPECTRAL = "spectral"
    RMS = "rms"
    NONE = "none"


class OrthogonalConfig(Section):
    """Steps `s · msign(G^(−q) M A^(−p))` of weight matrices; with p = q = 0 they are Muon's.

    Attributes:
        momentum: μ of M ← μM + (1 − μ)∇, kept where a layer is preconditioned.
        nesterov: Whether the step takes (1 − μ)∇ + μM in place of M.
        power_a: p, of the inputs' factor; 0 leaves inputs as they are, and measures none if `power_g` is 0, too.
        power_g: q, of the output gradients' factor; with 0 no output gradients are measured.
        damping: Damping of a factor's eigenvalues, as a share of their mean.
        iteration: Coefficients of the iteration that orthogonalises.
        iterations: Number of iterations.
        dtype: Its precision.
        length: s.
        weight_decay: Of these weights, beside the step: lr · weight_decay · θ is subtracted.
        exclude: Patterns (`fnmatch`, on module names) of layers that take the first-order step instead.
        head: Whether the model's last layer takes this step, too, unless its weight is tied to an embedding.
    """

    momentum: BelowOne = 0.95
    nesterov: Flag = True
    power_a: NonNegative = 0.5
    power_g: NonNegative = 0.5
    damping: Positive = 0.01
    iteration: Iteration = Iteration.MUON
    iterations: Count = 5
    dtype: IterationDType = IterationDType.AUTO
    length: Length = Length.SPECTRAL
    weight_decay: NonNegative = 0.0
    exclude: tuple[Pattern, ...] = ()
    head: Flag = False

    @property
    def whitens(self) -> bool:
        """Whether factors are needed at all."""
        return self.power_a > 0 or self.power_g > 0


class FirstOrderConfig(Section):
    """AdamW's steps (Loshchilov & Hutter 2019) of all parameters that are no orthogonalised weight matrix.

    Attributes:
        lr_ratio: Its learning rate, as a multiple of the optimizer's.
        betas: Decays of the averages of gradients and of their squares.
        eps: ε.
        weight_decay: Of these parameters: lr · lr_ratio · weight_decay · θ is subtracted.
    """

    lr_ratio: Positive = 0.15
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0


class UpdateConfig(Section):
    """The step made of the preconditioned gradient Δ.

    Attributes:
        direction: `orthogonal` takes weight matrices along their whitened, orthogonalised momentum, as `orthogonal`
            says, and everything else (embeddings, norms, biases, the last layer) along AdamW's step, as `first_order`
            says. The optimizer is then plain SGD without momentum; its lr, and the lr's schedule, are both steps'.
            The KL clip is off, and factors are solved by `eigen`.
        orthogonal: Steps of weight matrices under `direction: orthogonal`.
        first_order: Steps of everything else under it.
        kl_clip: κ of the trust region: Δ is scaled by min(1, sqrt(κ / (lr² Σ⟨Δ, ∇⟩))); null switches it off.
        kl_clip_lr: The lr of that formula. `current` is the optimizer's lr of this step: while the clip is active, κ
            alone then sets the step's length. A number fixes it, so that an lr schedule keeps its effect.
        graft: Scale each layer's Δ to the length of a first-order step: of the gradient (`gradient`, as long as SGD's)
            or of its sign (`sign`, about as long as Adam's, so that learning rates for Adam fit). Parameters without a
            block take that step itself. null keeps the length of Δ.
        l2: Coefficient of a weight decay that is part of the loss: l2·θ joins the gradient before preconditioning and
            l2 joins the damping. (An optimizer's own weight_decay stays outside of K-FAC, as in AdamW.)
        transforms: Registered transforms of a layer's gradient matrix at its owner, by name with their arguments, in
            this order within a stage.
    """

    gone: ClassVar[Mapping[str, Gone]] = {
        "graft_scope": Gone("layer", "leave it out; each layer gets its own length"),
    }

    direction: Direction = Direction.NATURAL
    orthogonal: OrthogonalConfig | None = None
    first_order: FirstOrderConfig | None = None
    kl_clip: Positive | None = 0.001
    kl_clip_lr: Literal["current"] | Positive = "current"
    graft: Graft | None = None
    l2: NonNegative = 0.0
    transforms: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("transforms")
    @classmethod
    def _transforms_are_registered(cls, transforms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in transforms:
            if name not in TRANSFORM_NAMES:
                known = ", ".join(sorted(TRANSFORM_NAMES)) or "none"
                raise ValueError(
                    f"found {name[:60]!r}{did_you_mean(name, TRANSFORM_NAMES)}; registered by the modules under "
                    f"extensions: {known}"
                )
        return transforms

    @model_validator(mode="before")
    @classmethod
    def _orthogonal_steps_have_their_length(cls, data: Any) -> Any:
        """Switch the KL clip, on by default, off for steps whose length is set otherwise."""
        if isinstance(data, Mapping) and data.get("direction") == Direction.ORTHOGONAL and "kl_clip" not in data:
            return {**data, "kl_clip": None}
        return data

    @model_validator(mode="after")
    def _sections_belong_to_direction(self) -> Self:
        if self.direction is Direction.NATURAL:
            for key in ("orthogonal", "first_order"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} has no effect while direction is natural: set direction to orthogonal")
            return self
        for key, found in (("kl_clip", self.kl_clip), ("graft", self.graft)):
            if found is not None:
                raise ValueError(
                    f"{key} ({found}) sets the length of natural steps; while direction is orthogonal, "
                    "orthogonal.length does: leave it out"
                )
        return self

    @property
    def orthogonal_options(self) -> OrthogonalConfig:
        """The section `orthogonal`, or its defaults."""
        return self.orthogonal or OrthogonalConfig()

    @property
    def first_order_options(self) -> FirstOrderConfig:
        """The section `first_order`, or its defaults."""
        return self.first_order or FirstOrderConfig()

    @model_validator(mode="after")
    def _lr_belongs_to_clip(self) -> Self:
        if self.kl_clip is None and self.kl_clip_lr != "current":
            raise ValueError("kl_clip_lr has no effect while kl_clip is null: leave it out, or give kl_clip a value")
        return self
