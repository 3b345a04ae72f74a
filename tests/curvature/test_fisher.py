"""Drawn labels and Hessian roots against the distributions and their automatic derivatives."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal

from kfac_dist.config.schema import Likelihood
from kfac_dist.curvature.fisher import MAX_COLUMNS, hessian_columns, label_gradient, uniform
from kfac_dist.errors import ModelError
from tests.curvature.measured import assert_close

KEY = {"seed": 3, "step": 5, "first_sample": 0}
LIKELIHOODS = list(Likelihood)


def nll(likelihood: Likelihood, outputs: Tensor, label: Tensor) -> Tensor:
    match likelihood:
        case Likelihood.CATEGORICAL:
            return -Categorical(logits=outputs).log_prob(label)
        case Likelihood.BERNOULLI:
            return -Bernoulli(logits=outputs).log_prob(label).sum()
        case Likelihood.GAUSSIAN:
            return -Normal(outputs, 1.0).log_prob(label).sum()


def exact_hessian(likelihood: Likelihood, outputs: Tensor) -> Tensor:
    """∇² of the negative log-likelihood at any label; it doesn't depend on which, for natural parameters."""
    label = torch.zeros(()) if likelihood is Likelihood.CATEGORICAL else torch.zeros_like(outputs)
    return torch.autograd.functional.hessian(lambda s: nll(likelihood, s, label), outputs)


# ---- uniform numbers


def test_uniform_is_uniform_along_every_axis() -> None:
    """Kolmogorov–Smirnov over samples, positions, steps and seeds: no axis may be correlated with the draw."""
    like = torch.empty(200, 50)
    draws = uniform(like, **KEY)
    assert draws.dtype is torch.float32
    assert float(draws.min()) > 0
    assert float(draws.max()) < 1
    samples = {
        "all": draws.flatten(),
        "one position": uniform(torch.empty(5000, 1), **KEY).flatten(),
        "one sample": uniform(torch.empty(1, 5000), **KEY).flatten(),
        "no positions": uniform(torch.empty(5000), **KEY),
        "steps": torch.cat([uniform(torch.empty(1, 1), seed=3, step=s, first_sample=0).view(1) for s in range(2000)]),
        "seeds": torch.cat([uniform(torch.empty(1, 1), seed=s, step=5, first_sample=0).view(1) for s in range(2000)]),
    }
    for name, values in samples.items():
        assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3, name
        centred = values.double() - 0.5
        correlation = float((centred[1:] * centred[:-1]).mean() * 12)
        assert abs(correlation) < 4 / len(values) ** 0.5, name


def test_numbers_belong_to_the_global_sample() -> None:
    """Independent of how ranks and micro-batches split the batch, and fresh at every step and for every seed."""
    whole = uniform(torch.empty(13, 4), **KEY)
    parts = [
        uniform(torch.empty(stop - start, 4), seed=3, step=5, first_sample=start)
        for start, stop in ((0, 3), (3, 4), (4, 4), (4, 13))
    ]
    assert torch.equal(torch.cat(parts), whole)
    for other in ({"seed": 4}, {"step": 6}, {"first_sample": 13}):
        assert not (uniform(torch.empty(13, 4), **{**KEY, **other}) == whole).any()


# ---- labels


OUTPUTS = torch.tensor([0.5, -1.0, 2.0, 0.1])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_gradients_have_mean_zero_and_the_hessian_as_second_moment(likelihood: Likelihood) -> None:
    """Bartlett's identities, over many draws at the same outputs."""
    draws = 60_000
    gradients = label_gradient(likelihood, OUTPUTS.expand(draws, -1), **KEY).double()
    assert gradients.mean(0).abs().max() < 5 / draws**0.5
    assert_close(gradients.mT @ gradients / draws, exact_hessian(likelihood, OUTPUTS), 0.02)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_each_gradient_is_that_of_some_label(likelihood: Likelihood) -> None:
    outputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    for row, gradient in zip(outputs, label_gradient(likelihood, outputs, **KEY), strict=True):
        if likelihood is Likelihood.CATEGORICAL:
            label: Tensor = (row.softmax(0) - gradient).argmax()
        elif likelihood is Likelihood.BERNOULLI:
            label = (row.sigmoid() - gradient).round().clamp(0, 1)
        else:
            label = row - gradient
        leaf = row.clone().requires_grad_()
        (expected,) = torch.autograd.grad(nll(likelihood, leaf, label), leaf)
        assert_close(gradient, expected)


def test_gaussian_draws_are_normal() -> None:
    gradients = label_gradient(Likelihood.GAUSSIAN, torch.zeros(20_000, 1), **KEY).flatten()
    assert stats.kstest(gradients.numpy(), "norm").pvalue > 1e-3
    assert torch.isfinite(gradients).all()


def test_categorical_draws_follow_the_probabilities() -> None:
    gradients = label_gradient(Likelihood.CATEGORICAL, OUTPUTS.expand(20_000, -1), **KEY)
    counts = torch.bincount((OUTPUTS.softmax(0) - gradients).argmax(-1), minlength=4)
    assert stats.chisquare(counts.numpy(), (OUTPUTS.double().softmax(0) * 20_000).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("extreme", [60.0, -60.0])
def test_certain_predictions_have_no_gradient(extreme: float) -> None:
    """Also where probabilities round to 0 and 1: no class beyond the last, no label that can't be."""
    logits = torch.zeros(100, 5)
    logits[:, 4] = extreme
    gradient = label_gradient(Likelihood.CATEGORICAL, logits, **KEY)
    assert torch.isfinite(gradient).all()
    if extreme > 0:
        assert gradient.abs().max() < 1e-6
    else:
        assert (gradient[:, 4].abs() < 1e-6).all()
    assert label_gradient(Likelihood.BERNOULLI, logits[:, 4:], **KEY).abs().max() < 1e-6


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_shape_and_dtype(likelihood: Likelihood, dtype: torch.dtype) -> None:
    outputs = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    gradient = label_gradient(likelihood, outputs, **KEY)
    assert gradient.shape == outputs.shape
    assert gradient.dtype is dtype
    for column in hessian_columns(likelihood, outputs):
        assert column.shape == outputs.shape
        assert column.dtype is dtype


def test_labels_do_not_depend_on_how_the_batch_is_split() -> None:
    outputs = torch.randn(9, 2, 4, generator=torch.Generator().manual_seed(0))
    for likelihood in LIKELIHOODS:
        whole = label_gradient(likelihood, outputs, **KEY)
        parts = [
            label_gradient(likelihood, outputs[a:b], seed=3, step=5, first_sample=a)
            for a, b in ((0, 2), (2, 3), (3, 9))
        ]
        assert torch.equal(torch.cat(parts), whole)


# ---- Hessian roots


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_columns_are_a_root_of_the_hessian(likelihood: Likelihood) -> None:
    outputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns = torch.stack(list(hessian_columns(likelihood, outputs)), dim=-1)
    assert columns.shape == (6, 4, 4)
    for row, root in zip(outputs, columns, strict=True):
        assert_close(root @ root.mT, exact_hessian(likelihood, row))


def test_token_columns_serve_every_token() -> None:
    outputs = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns = torch.stack(list(hessian_columns(Likelihood.CATEGORICAL, outputs)), dim=-1)
    for b in range(2):
        for t in range(3):
            assert_close(columns[b, t] @ columns[b, t].mT, exact_hessian(Likelihood.CATEGORICAL, outputs[b, t]))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_too_many_columns_are_refused(likelihood: Likelihood) -> None:
    assert len(list(hessian_columns(likelihood, torch.zeros(1, MAX_COLUMNS)))) == MAX_COLUMNS
    with pytest.raises(ModelError, match=r"1025 outputs.*use mc"):
        next(iter(hessian_columns(likelihood, torch.zeros(1, MAX_COLUMNS + 1))))
