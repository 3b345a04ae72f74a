"""Both estimators of the diagonal Fisher and their variances, by enumerating every label that a small net may get."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian

from kfac_dist.config.schema import Likelihood
from kfac_dist.curvature.fisher import label_gradient
from kfac_dist.doctor.fisher.diagonal_fisher import EstimatorMoments, estimates, moments
from kfac_dist.doctor.fisher.directional import Derivatives, OutputFunction

INPUTS, OUTPUTS, BATCH = 3, 3, 4


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), nn.Linear(4, OUTPUTS)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def derivatives(model: nn.Module, x: Tensor, name: str) -> Derivatives:
    indices = torch.arange(dict(model.named_parameters())[name].numel())
    [found] = OutputFunction(model, x).derivatives(name, indices, chunk=1000)
    return found


def labels(likelihood: Likelihood) -> Tensor:
    """All values of t(y)."""
    if likelihood is Likelihood.CATEGORICAL:
        return torch.eye(OUTPUTS, dtype=torch.double)
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=OUTPUTS)), dtype=torch.double)


def log_likelihood(likelihood: Likelihood, h: Tensor, t: Tensor) -> Tensor:
    if likelihood is Likelihood.CATEGORICAL:
        return t @ h - h.logsumexp(0)
    return t @ h - nn.functional.softplus(h).sum()


def enumerated(likelihood: Likelihood, model: nn.Module, sample: Tensor, name: str) -> EstimatorMoments:
    """Means and variances of (∂ℓ)² and −∂²ℓ over all labels, by autograd on the log-likelihood itself."""
    weights = {key: p.detach() for key, p in model.named_parameters()}
    first, second, probability = [], [], []
    for t in labels(likelihood):

        def ell(value: Tensor, t: Tensor = t) -> Tensor:
            h = functional_call(model, {**weights, name: value}, (sample[None],))[0]
            return log_likelihood(likelihood, h, t)

        first.append(torch.func.grad(ell)(weights[name]).flatten().square())
        matrix = hessian(ell)(weights[name])
        second.append(-matrix.reshape(weights[name].numel(), -1).diagonal())
        probability.append(ell(weights[name]).exp())
    p, one, two = torch.stack(probability), torch.stack(first), torch.stack(second)
    assert float(p.sum()) == pytest.approx(1)
    torch.testing.assert_close(p @ one, p @ two)  # both are unbiased for the same
    return EstimatorMoments(p @ one, p @ (one - p @ one).square(), p @ (two - p @ two).square())


@pytest.mark.parametrize("likelihood", [Likelihood.CATEGORICAL, Likelihood.BERNOULLI])
def test_closed_forms_equal_enumeration(likelihood: Likelihood) -> None:
    model, x = net(), torch.randn(BATCH, INPUTS, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    for name, _ in model.named_parameters():
        found = moments(likelihood, derivatives(model, x, name))
        for sample in range(BATCH):
            expected = enumerated(likelihood, model, x[sample], name)
            torch.testing.assert_close(found.fisher[:, sample], expected.fisher)
            torch.testing.assert_close(found.first[:, sample], expected.first)
            torch.testing.assert_close(found.second[:, sample], expected.second, atol=1e-12, rtol=1e-6)
        assert bool((found.first > 0).any())
        assert bool((found.second > 0).any()) != name.startswith("2")  # the last layer has no second derivative


def test_of_a_unit_gaussian_the_first_has_twice_the_square_over_n() -> None:
    model, x = net(), torch.randn(BATCH, INPUTS, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    along = derivatives(model, x, "0.weight")
    found = moments(Likelihood.GAUSSIAN, along)
    torch.testing.assert_close(found.fisher, along.slopes.square().sum(-1))
    torch.testing.assert_close(found.first, 2 * found.fisher.square())
    torch.testing.assert_close(found.second, along.bends.square().sum(-1))
    # And so it is of drawn labels: N of them have Var 2I²/N.
    drawn = [
        estimates(
            Likelihood.GAUSSIAN,
            along,
            label_gradient(Likelihood.GAUSSIAN, along.outputs, seed=0, step=k, first_sample=0),
        )
        for k in range(4000)
    ]
    for values, mean, variance in zip(
        zip(*drawn, strict=True), [found.fisher] * 2, [found.first, found.second], strict=True
    ):
        many = torch.stack(values)
        torch.testing.assert_close(many.mean(0), mean, rtol=0.15, atol=0.15 * float(mean.max()))
        assert float(many.var(0).sum() / variance.sum()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("likelihood", [Likelihood.CATEGORICAL, Likelihood.BERNOULLI])
def test_estimates_are_those_of_each_label(likelihood: Likelihood) -> None:
    """With the gradient of any label, weighted by its probability: the enumerated means and variances."""
    model, x = net(), torch.randn(1, INPUTS, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    along = derivatives(model, x, "0.weight")
    h = along.outputs[0]
    mean = h.softmax(0) if likelihood is Likelihood.CATEGORICAL else h.sigmoid()
    every = labels(likelihood)
    p = torch.stack([log_likelihood(likelihood, h, t) for t in every]).exp()
    first, second = (
        torch.stack(values)[..., 0]
        for values in zip(*(estimates(likelihood, along, (mean - t)[None]) for t in every), strict=True)
    )
    expected = enumerated(likelihood, model, x[0], "0.weight")
    for values, variance in ((first, expected.first), (second, expected.second)):
        torch.testing.assert_close(p @ values, expected.fisher)
        torch.testing.assert_close(p @ (values - p @ values).square(), variance)


def test_terms_of_a_sample_have_labels_of_their_own() -> None:
    """Two positions with softmaxes: one label of nine pairs."""
    model, x = net(), torch.randn(1, 2, INPUTS, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    along = derivatives(model, x, "0.weight")
    found = moments(Likelihood.CATEGORICAL, along)
    p = along.outputs[0].softmax(-1)
    eye = torch.eye(OUTPUTS, dtype=torch.double)
    mean, fourth = 0.0, 0.0
    for one, other in itertools.product(range(OUTPUTS), repeat=2):
        residual = torch.stack([p[0] - eye[one], p[1] - eye[other]])
        score, _ = estimates(Likelihood.CATEGORICAL, along, residual[None])
        mean = mean + p[0, one] * p[1, other] * score
        fourth = fourth + p[0, one] * p[1, other] * score.square()
    torch.testing.assert_close(found.fisher, mean)
    torch.testing.assert_close(found.first, fourth - mean.square())
