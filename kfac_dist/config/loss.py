"""`loss`: the shipped losses, with their likelihood and loss terms."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from kfac_dist.config.kfac.curvature import Likelihood, LossTerms
from kfac_dist.config.section import MOST_COUNT, Section


class LossName(StrEnum):
    """Losses of the shipped runs, as negative log-likelihoods averaged over their terms."""

    CROSS_ENTROPY = "cross_entropy"
    TOKEN_CROSS_ENTROPY = "token_cross_entropy"
    SIGMOID_CROSS_ENTROPY = "sigmoid_cross_entropy"
    MSE = "mse"
    ADVERSARIAL = "adversarial"

    @property
    def likelihood(self) -> Likelihood:
        """The predictive distribution whose negative log-likelihood this loss is."""
        match self:
            case LossName.CROSS_ENTROPY | LossName.TOKEN_CROSS_ENTROPY:
                return Likelihood.CATEGORICAL
            case LossName.SIGMOID_CROSS_ENTROPY | LossName.ADVERSARIAL:
                return Likelihood.BERNOULLI
            case LossName.MSE:
                return Likelihood.GAUSSIAN

    @property
    def loss_terms(self) -> LossTerms:
        """The terms of this loss's mean."""
        return LossTerms.TOKEN if self is LossName.TOKEN_CROSS_ENTROPY else LossTerms.SAMPLE


class LossConfig(Section):
    """The loss; K-FAC takes its likelihood and its terms from here.

    Attributes:
        name: The loss.
        ignore_index: Label of terms that don't count.
    """

    name: LossName
    ignore_index: Annotated[int, Field(ge=-MOST_COUNT, le=MOST_COUNT, strict=True)] = -100

    @model_validator(mode="after")
    def _index_belongs_to_labels(self) -> Self:
        if self.ignore_index != -100 and self.name.likelihood is not Likelihood.CATEGORICAL:
            raise ValueError(f"ignore_index has no effect on {self.name}, which has no class labels: leave it out")
        return self
