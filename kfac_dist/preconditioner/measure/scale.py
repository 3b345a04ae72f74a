"""The scale of a loss, read off its gradient at the model's outputs.

K-FAC's statistics need the gradient of each *term* of the loss, and have only that of the whole: ĝ = d·∂L/∂s, with the
number d by which the sum of the terms was divided. A loss that is a sum where a mean is expected makes G too large by
n², and nothing fails. But the gradient of a negative log-likelihood says itself how it was scaled:

    categorical   ∂L/∂s = c (softmax(s) − e_y)        Bernoulli   ∂L/∂s = c (σ(s) − y),  y ∈ {0, 1}

The label is where the gradient is negative, so that c follows from outputs and gradient alone, and every row has to
agree on it. Other losses (smoothed or soft labels, weights, a temperature) don't fit the form and are left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_dist.config.schema import Likelihood

# Rows that are looked at, and how closely they have to fit; half-precision outputs round at about 1 %.
ROWS = 256
# Fewer values would fit by chance: one alone always does.
_VALUES = 8
_FIT = 0.03


def gradient_scale(outputs: Tensor, gradient: Tensor, likelihood: Likelihood | None) -> float | None:
    """Return c, by which the gradients of the terms were multiplied; waits for the device.

    Args:
        outputs: The model's outputs, `[B, ..., C]` or `[B, C, ...]` for classes.
        gradient: The loss's gradient there.
        likelihood: Only try this one; None tries both that have labels.

    Returns:
        None if the gradient isn't that of a plain negative log-likelihood with hard labels.
    """
    found: float | None = None
    if likelihood in (None, Likelihood.CATEGORICAL) and outputs.ndim >= 2:
        found = _categorical(outputs, gradient)
        if found is None and outputs.ndim > 2:
            found = _categorical(outputs.movedim(1, -1), gradient.movedim(1, -1))
    if likelihood in (None, Likelihood.BERNOULLI) and found is None:
        found = _bernoulli(outputs, gradient)
    return found


def _categorical(outputs: Tensor, gradient: Tensor) -> float | None:
    classes = outputs.shape[-1]
    if classes < 2:
        return None
    values, grads = outputs.reshape(-1, classes)[:ROWS].double(), gradient.reshape(-1, classes)[:ROWS].double()
    terms = grads.abs().amax(dim=1) > 0  # positions that the loss ignores have no gradient
    values, grads = values[terms], grads[terms]
    if grads.numel() < _VALUES:
        return None
    label = grads.argmin(dim=1, keepdim=True)
    unit = values.softmax(dim=1)
    unit.scatter_add_(1, label, -torch.ones_like(unit[:, :1]))
    return _common_factor(grads, unit)


def _bernoulli(outputs: Tensor, gradient: Tensor) -> float | None:
    if outputs.ndim == 1:
        outputs, gradient = outputs[:, None], gradient[:, None]
    values, grads = outputs.flatten(1)[:ROWS].double(), gradient.flatten(1)[:ROWS].double()
    if grads.numel() < _VALUES:
        return None
    return _common_factor(grads, values.sigmoid() - (grads < 0).double())


def _common_factor(grads: Tensor, unit: Tensor) -> float | None:
    """Return c if `grads = c·unit` in every row, with one c that is positive."""
    norm = unit.square().sum()
    if not norm > 0:
        return None
    factor = (grads * unit).sum() / norm
    misfit = (grads - factor * unit).norm(dim=1)
    # Against the row's own size, but not where the model is sure of its label: there both are rounding.
    size = (factor * unit).norm(dim=1).clamp(min=_FIT * float(factor * norm.sqrt()) / len(unit) ** 0.5)
    return float(factor) if factor > 0 and bool((misfit <= _FIT * size).all()) else None
