"""The model's own predictive distribution: labels drawn from it, and the square root of its Hessian.

Both give vectors at the model's outputs that K-FAC sends back in passes of its own. `mc` draws one label a term;
`type2` backpropagates every column of a square root of the loss's Hessian, which makes the expectation exact.

Random numbers are a hash of (seed, step, global sample index, position), not a stream: the same sample gets the same
label whichever rank holds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kfac_dist.config.schema import Likelihood
from kfac_dist.errors import ModelError
from kfac_dist.precision import widened

# More columns than this means so many backward passes that `type2` was surely not meant.
MAX_COLUMNS = 1024


def label_gradient(likelihood: Likelihood, outputs: Tensor, *, seed: int, step: int, first_sample: int) -> Tensor:
    """Return ∂ℓ/∂s at labels drawn from the model, for every term.

    Args:
        likelihood: Predictive distribution with natural parameters `outputs`.
        outputs: `[B, ..., C]` logits (categorical), or `[B, ...]` logits (Bernoulli) or means (unit-variance Gaussian).
        seed: Seed of the run.
        step: Optimizer step.
        first_sample: Global index of the first row, so that W doesn't matter.

    Returns:
        A tensor of the outputs' shape and dtype: the gradient of each term's own negative log-likelihood.
    """
    outputs = outputs.detach()
    values = widened(outputs)
    match likelihood:
        case Likelihood.CATEGORICAL:
            probability = values.softmax(-1)
            label = drawn_classes(probability, seed=seed, step=step, first_sample=first_sample)
            gradient = probability.scatter_add(-1, label[..., None], -torch.ones_like(probability[..., :1]))
        case Likelihood.BERNOULLI:
            probability = values.sigmoid()
            draw = uniform(values, seed=seed, step=step, first_sample=first_sample)
            gradient = probability - (draw < probability).float()
        case Likelihood.GAUSSIAN:
            draw = uniform(values, seed=seed, step=step, first_sample=first_sample)
            gradient = torch.special.ndtri(draw.double()).float()
    return gradient.to(outputs.dtype)


def drawn_classes(probability: Tensor, *, seed: int, step: int, first_sample: int) -> Tensor:
    """Return the class `[B, ...]` that is drawn for each term of `[B, ..., C]`; see `label_gradient`."""
    draw = uniform(probability[..., 0], seed=seed, step=step, first_sample=first_sample)
    # First class whose cumulative probability exceeds the draw; the clamp covers a sum that rounds below 1.
    return (probability.cumsum(-1) <= draw[..., None]).sum(-1).clamp(max=probability.shape[-1] - 1)


def hessian_columns(likelihood: Likelihood, outputs: Tensor) -> Iterator[Tensor]:
    """Yield the columns of a square root of ∇²ℓ with respect to the outputs; Σ_c v_c v_cᵀ is the Hessian.

    Softmax: `√p_c (e_c − p)` for each class. Bernoulli: `√(p(1−p))` on one output at a time. Gaussian of unit variance:
    the unit vectors. Terms share a backward pass: column c is sent back for all of them at once.

    Raises:
        ModelError: The outputs have more than `MAX_COLUMNS` columns.
    """
    values = widened(outputs.detach())
    flat = values if likelihood is Likelihood.CATEGORICAL else values.flatten(1)
    columns = flat.shape[-1]
    if columns > MAX_COLUMNS:
        raise ModelError(
            f"kfac.curvature.fisher: type2 needs one backward pass for each of the {columns} outputs "
            f"(at most {MAX_COLUMNS}); use mc, which needs one in all"
        )
    match likelihood:
        case Likelihood.CATEGORICAL:
            probability = flat.softmax(-1)
            scale = probability.sqrt()
        case Likelihood.BERNOULLI:
            probability = flat.sigmoid()
            scale = (probability * (1 - probability)).sqrt()
        case Likelihood.GAUSSIAN:
            scale = torch.ones_like(flat)
    for index in range(columns):
        column = (
            -scale[..., index, None] * probability if likelihood is Likelihood.CATEGORICAL else torch.zeros_like(flat)
        )
        column[..., index] += scale[..., index]
        yield column.view_as(outputs).to(outputs.dtype)


def uniform(like: Tensor, *, seed: int, step: int, first_sample: int) -> Tensor:
    """Return fp32 numbers in (0, 1) of the shape of `like: [B, ...]`, a pure function of the arguments.

    Element (b, rest) hashes (seed, step, first_sample + b, rest) with the finaliser of SplitMix64 (Steele et al. 2014).
    """
    samples = torch.arange(like.shape[0], device=like.device) + first_sample
    key = _mix(_mix(torch.full((), seed, dtype=torch.int64, device=like.device)) + step)
    key = _mix(key + samples)
    if like.ndim > 1:
        rest = torch.arange(math.prod(like.shape[1:]), device=like.device)
        key = _mix(key[:, None] + rest)
    bits = _shift(key, 40)  # 24 bits: the size of an fp32 mantissa
    return ((bits.float() + 0.5) / 2**24).view(like.shape)


_GAMMA, _M1, _M2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _mix(x: Tensor) -> Tensor:
    x = x + _GAMMA
    x = (x ^ _shift(x, 30)) * _M1
    x = (x ^ _shift(x, 27)) * _M2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right and fill with zeros; torch's own shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
