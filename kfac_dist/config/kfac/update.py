"""`kfac.update`: length of the step, and further transforms of it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from kfac_dist.config.section import Gone, NonNegative, Positive, Section
from kfac_dist.errors import did_you_mean

# Registered by `kfac_dist.preconditioner.precondition.transforms.table.add_transform`.
TRANSFORM_NAMES: set[str] = set()


class Graft(StrEnum):
    """The step whose length a preconditioned gradient takes: plain descent's, or that of its sign."""

    GRADIENT = "gradient"
    SIGN = "sign"


class UpdateConfig(Section):
    """The step made of the preconditioned gradient Δ.

    Attributes:
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

    @model_validator(mode="after")
    def _lr_belongs_to_clip(self) -> Self:
        if self.kl_clip is None and self.kl_clip_lr != "current":
            raise ValueError("kl_clip_lr has no effect while kl_clip is null: leave it out, or give kl_clip a value")
        return self
