"""Two estimators of the Fisher matrix's diagonal, and their variances (Soen & Sun 2024).

For p(y|x) ∝ exp(t(y)ᵀh_θ(x) − F(h)) with η = E[t] and C = Cov(t), labels drawn from the model, N of them:

    Î1_ii = (1/N) Σ (∂_iℓ)²           N·Var[Î1_ii | x] = E[((t − η)ᵀ∂_ih)⁴] − I_ii²
    Î2_ii = (1/N) Σ (−∂²_iiℓ)         N·Var[Î2_ii | x] = (∂²_iih)ᵀ C (∂²_iih)

both unbiased for `I_ii = ∂_ihᵀ C ∂_ih`. The expectations are exact: over the classes of a softmax, and for independent
outputs by cumulants, which add up. Where a sample has several terms (tokens, pixels), they have labels of their own,
independent given x; everything here is of the whole sample.

Shapes: outputs `[B, ...]`, slopes ∂_ih and bends ∂²_iih `[n, B, ...]` for n parameters i; results `[n, B]`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kfac_dist.config.schema import Likelihood
from kfac_dist.doctor.fisher.directional import Derivatives


@dataclass(frozen=True)
class EstimatorMoments:
    """Exact figures of one sample's diagonal Fisher.

    Attributes:
        fisher: I_ii, `[n, B]`.
        first: N·Var[Î1_ii | x], `[n, B]`.
        second: N·Var[Î2_ii | x], `[n, B]`.
    """

    fisher: Tensor
    first: Tensor
    second: Tensor


def moments(likelihood: Likelihood, derivatives: Derivatives) -> EstimatorMoments:
    """Return the diagonal Fisher of every sample, and both estimators' variances for one label.

    Args:
        likelihood: Predictive distribution with natural parameters (or, Gaussian of unit variance, means) `outputs`.
        derivatives: Outputs, slopes and bends.
    """
    outputs, slopes, bends = (x.double() for x in (derivatives.outputs, derivatives.slopes, derivatives.bends))
    match likelihood:
        case Likelihood.CATEGORICAL:
            p = outputs.softmax(-1)
            centred, bent = (x - (p * x).sum(-1, keepdim=True) for x in (slopes, bends))
            square = (p * centred.square()).sum(-1)
            fourth_cumulant = (p * centred**4).sum(-1) - 3 * square.square()
            second = (p * bent.square()).sum(-1)
        case Likelihood.BERNOULLI:
            p = outputs.sigmoid()
            variance = p * (1 - p)
            square = variance * slopes.square()
            fourth_cumulant = variance * (1 - 6 * variance) * slopes**4
            second = variance * bends.square()
        case Likelihood.GAUSSIAN:
            square = slopes.square()
            fourth_cumulant = slopes.new_zeros(slopes.shape)
            second = bends.square()
    fisher = _of_samples(square)
    # E[z⁴] = κ₄ + 3 E[z²]²; cumulants of independent terms add up.
    return EstimatorMoments(fisher, _of_samples(fourth_cumulant) + 2 * fisher.square(), _of_samples(second))


def estimates(likelihood: Likelihood, derivatives: Derivatives, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return both estimators with one label a sample, `[n, B]` each.

    Args:
        likelihood: As above.
        derivatives: Outputs, slopes and bends.
        gradient: −(t − η), the gradient of −ℓ at the outputs for the labels; see `fisher.label_gradient`.
    """
    drawn = gradient.double()
    slopes, bends = derivatives.slopes.double(), derivatives.bends.double()
    score, bent = _of_samples(drawn * slopes), _of_samples(drawn * bends)
    # −∂²ℓ = ∂hᵀ C ∂h − (t − η)ᵀ∂²h, and the first of these doesn't depend on the label.
    return score.square(), moments(likelihood, derivatives).fisher + bent


def _of_samples(values: Tensor) -> Tensor:
    return values.flatten(2).sum(2) if values.ndim > 2 else values
