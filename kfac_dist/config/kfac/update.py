"""`kfac.update`: what is done with the result."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, Self

from pydantic import model_validator

from kfac_dist.config.section import NonNegative, Positive, Section


class Graft(StrEnum):
    """Whose step's length a preconditioned gradient takes: plain descent's, or that of its sign."""

    GRADIENT = "gradient"
    SIGN = "sign"


class GraftScope(StrEnum):
    """What has that length: every layer's block by itself, or all of them together."""

    LAYER = "layer"
    GLOBAL = "global"


class UpdateConfig(Section):
    """What is done with the preconditioned gradient Δ.

    Attributes:
        kl_clip: κ of the trust region: Δ is scaled by min(1, sqrt(κ / (lr² Σ⟨Δ, ∇⟩))); null switches it off.
        kl_clip_lr: The lr of that formula. `current` is the optimizer's lr of this step: while the clip is active the
            step's length is then set by κ alone. A number fixes it, so that an lr schedule keeps its effect.
        graft: Δ takes the length of a first-order step: that of the gradient (`gradient`, as long as SGD's) or of its
            sign (`sign`, about as long as Adam's, so that its learning rates fit); what no block covers takes that step
            itself. null leaves Δ as long as the curvature says.
        graft_scope: Whether each `layer` gets its own length, or all together (`global`) get one.
        l2: Coefficient of a weight decay that is part of the loss: l2·θ joins the gradient before preconditioning and
            l2 joins the damping. (An optimizer's own weight_decay stays outside of K-FAC, as in AdamW.)
    """

    kl_clip: Positive | None = 0.001
    kl_clip_lr: Literal["current"] | Positive = "current"
    graft: Graft | None = None
    graft_scope: GraftScope = GraftScope.LAYER
    l2: NonNegative = 0.0

    @model_validator(mode="after")
    def _lr_belongs_to_clip(self) -> Self:
        if self.kl_clip is None and self.kl_clip_lr != "current":
            raise ValueError("kl_clip_lr has no effect while kl_clip is null: leave it out, or give kl_clip a value")
        return self

    @model_validator(mode="after")
    def _scope_belongs_to_graft(self) -> Self:
        if self.graft is None and self.graft_scope is not GraftScope.LAYER:
            raise ValueError("graft_scope has no effect while graft is null: leave it out, or set graft")
        return self
