"""`game`: two players instead of one model, with losses against each other."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from kfac_dist.config.section import Count, Flag, NonNegative, Positive, Section


class Objective(StrEnum):
    """The generator's objective: −log D (non-saturating), or the discriminator's loss with its sign turned."""

    NON_SATURATING = "non_saturating"
    MINIMAX = "minimax"


class DiscriminatorConfig(Section):
    """The discriminator's own settings; the generator has `optimizer` and `kfac`.

    Attributes:
        lr_factor: Its learning rate, in multiples of `optimizer.lr`.
        damping_factor: Its damping, in multiples of `kfac.inversion.damping`.
    """

    lr_factor: Positive = 1.0
    damping_factor: Positive = 1.0


class GameConfig(Section):
    """A game between a generator and a discriminator, each with a K-FAC of its own.

    Attributes:
        objective: Loss of the generator.
        adjustment: λ of the symplectic adjustment ξ + λNᵀξ (Balduzzi et al. 2018); 0 is plain simultaneous descent.
        align: Choose λ's sign at every step, so that the adjustment is drawn to stable fixed points only.
        discriminator: Settings of the discriminator that differ from the generator's.
        score_samples: Samples that the generator makes for the scores of each evaluation.
        grid: Rows and columns of the pictures of samples.
    """

    objective: Objective = Objective.NON_SATURATING
    adjustment: NonNegative = 1.0
    align: Flag = False
    discriminator: DiscriminatorConfig = Field(default_factory=DiscriminatorConfig)
    score_samples: Count = 1000
    grid: Annotated[int, Field(ge=1, le=100, strict=True)] = 8

    def without_damping(self) -> Self:
        """Return the same game for players without K-FAC."""
        return self.model_copy(update={"discriminator": self.discriminator.model_copy(update={"damping_factor": 1.0})})

    @model_validator(mode="after")
    def _alignment_needs_an_adjustment(self) -> Self:
        if self.align and not self.adjustment:
            raise ValueError("align has no effect while adjustment is 0: leave it out, or give adjustment a value")
        return self
