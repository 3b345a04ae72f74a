"""Our factors against curvlinops, an independent implementation.

How the oracle scales, for a loss whose reduction runs over n = B·R terms (R terms a sample):
- `CrossEntropyLoss(mean)`: `G = n·Σ g gᵀ = (1/n) Σ ĝĝᵀ` with ĝ = n·g. The same as ours, in every Fisher type.
- `MSELoss(sum)` and `BCEWithLogitsLoss(sum)`: `G = Σ g gᵀ`, a sum over terms; ours is the mean: `oracle = n·ours`.
  Its squared error has no ½: ĝ = 2(f − y), and its type-2 Hessian is 2I where our unit-variance Gaussian has I.
- A is the mean over samples and positions, as ours, with the homogeneous column when weight and bias are joint.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from curvlinops import KFACLinearOperator
from torch import Tensor, nn

from kfac_dist.curvature.fisher import label_gradient
from tests.curvature.measured import assert_close, measure

FISHERS = {"empirical": "empirical", "type2": "type-2", "mc": "mc", "input_only": "forward-only"}
LOSSES = {
    # our name, the oracle's loss, and the factor of its gradient against our negative log-likelihood's
    "categorical": (nn.CrossEntropyLoss(reduction="mean"), 1.0),
    "gaussian": (nn.MSELoss(reduction="sum"), 2.0),
    "bernoulli": (nn.BCEWithLogitsLoss(reduction="sum"), 1.0),
}
SEED = 7


def mlp(bias: bool) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4, bias=bias)), torch.randn(9, 6)


class Pooled(nn.Module):
    """A token-shared layer, pooled to one output a sample."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5, bias=bias), nn.Linear(5, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh().mean(1))


def tokens_pooled(bias: bool) -> tuple[nn.Module, Tensor]:
    return Pooled(bias), torch.randn(5, 7, 6)


def convolutions(bias: bool) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=(1, 2), bias=bias),
        nn.Tanh(),
        nn.Conv2d(4, 3, (2, 3), dilation=(2, 1), padding=1, bias=bias),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 5 * 6, 4, bias=bias),
    )
    return model, torch.randn(5, 2, 9, 9)


def oracle_factors(
    model: nn.Module, inputs: Tensor, targets: Tensor, likelihood: str, fisher: str, sharing: str, labels: Tensor | None
) -> KFACLinearOperator:
    operator = KFACLinearOperator(
        model,
        LOSSES[likelihood][0],
        [p for p in model.parameters() if p.requires_grad],
        [(inputs, targets)],
        check_deterministic=False,
        fisher_type=FISHERS[fisher],
        kfac_approx=sharing,
        separate_weight_and_bias=False,
    )
    if labels is not None:
        operator.draw_label = lambda output: labels
    operator.compute_kronecker_factors()
    return operator


def our_labels(likelihood: str, outputs: Tensor) -> Tensor:
    """The labels that our `mc` draws at step 0, recovered from their gradients, in the oracle's format."""
    gradient = label_gradient(likelihood, outputs, seed=SEED, step=0, first_sample=0)
    match likelihood:
        case "categorical":
            return (outputs.softmax(-1) - gradient).argmax(-1)
        case "bernoulli":
            return (outputs.sigmoid() - gradient).round()
        case _:  # the oracle's gradient is 2(f − y)
            return outputs - gradient / 2


def random_targets(likelihood: str, outputs: Tensor) -> Tensor:
    match likelihood:
        case "categorical":
            return torch.randint(outputs.shape[-1], outputs.shape[:-1])
        case "bernoulli":
            return torch.randint(2, outputs.shape).to(outputs)
        case _:
            return torch.randn_like(outputs)


def mean_loss(likelihood: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss that a user of ours would take: a mean over terms."""
    loss, _ = LOSSES[likelihood]
    value = loss(outputs.flatten(0, -2), targets.flatten(0, -2) if targets.ndim == outputs.ndim else targets.flatten())
    return value if likelihood == "categorical" else value / outputs[..., 0].numel()


@pytest.mark.parametrize(("make", "bias"), [(mlp, True), (mlp, False), (tokens_pooled, True), (convolutions, True)])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("likelihood", LOSSES)
@pytest.mark.parametrize("fisher", FISHERS)
def test_factors_equal_the_oracle(make: Any, bias: bool, sharing: str, likelihood: str, fisher: str) -> None:
    torch.manual_seed(0)
    model, inputs = make(bias)
    model, inputs = model.double(), inputs.double()
    with torch.no_grad():
        outputs = model(inputs)
    targets = random_targets(likelihood, outputs)
    labels = our_labels(likelihood, outputs) if fisher == "mc" else None
    oracle = oracle_factors(model, inputs, targets, likelihood, fisher, sharing, labels)
    ours = measure(
        model,
        inputs,
        lambda out: mean_loss(likelihood, out, targets),
        fisher=fisher,
        likelihood=likelihood,
        sharing=sharing,
        seed=SEED,
    )

    n = outputs.shape[0]
    scale = 1.0 if likelihood == "categorical" else n
    # The oracle's type-2 Hessian is 2I for squared errors; its drawn labels above were made to give our gradient.
    scale *= LOSSES[likelihood][1] if fisher == "type2" else 1.0
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert {f"{name}/A" for name in names} <= set(ours)
    for name in names:
        assert_close(ours[f"{name}/A"][0], oracle._input_covariances[name])
        if fisher == "input_only":
            assert f"{name}/G" not in ours
            assert torch.equal(oracle._gradient_covariances[name], torch.eye(len(oracle._gradient_covariances[name])))
        else:
            assert_close(ours[f"{name}/G"][0] * scale, oracle._gradient_covariances[name])


class Tokens(nn.Module):
    """A model with one prediction a token."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.head = nn.Linear(6, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        hidden = hidden + self.mix(hidden.cumsum(1)).tanh()
        return self.head(hidden)


class ClassesSecond(nn.Module):
    """The same model with its outputs as `[B, C, T]`, which the oracle and `CrossEntropyLoss` expect."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).mT


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["empirical", "type2", "mc"])
def test_token_losses_equal_the_oracle(sharing: str, fisher: str) -> None:
    torch.manual_seed(0)
    model, inputs = Tokens().double(), torch.randn(5, 7, 6).double()
    targets = torch.randint(4, (5, 7))
    with torch.no_grad():
        labels = our_labels("categorical", model(inputs)).flatten()
    wrapped = ClassesSecond(model)
    oracle = oracle_factors(
        wrapped, inputs, targets, "categorical", fisher, sharing, labels if fisher == "mc" else None
    )
    ours = measure(
        model,
        inputs,
        lambda out: mean_loss("categorical", out, targets),
        fisher=fisher,
        likelihood="categorical",
        sharing=sharing,
        loss_terms="token",
        seed=SEED,
    )
    for name in ("first", "mix", "head"):
        assert_close(ours[f"{name}/A"][0], oracle._input_covariances[f"model.{name}"])
        assert_close(ours[f"{name}/G"][0], oracle._gradient_covariances[f"model.{name}"])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["empirical", "type2"])
def test_groups_are_the_diagonal_blocks_of_the_oracle(sharing: str, fisher: str) -> None:
    """The oracle knows one G for all groups (and averages the groups' inputs); ours are that G's diagonal blocks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 9, 3)).double()
    inputs, targets = torch.randn(5, 4, 5, 5).double(), torch.randint(3, (5,))
    oracle = oracle_factors(model, inputs, targets, "categorical", fisher, sharing, None)
    loss = nn.CrossEntropyLoss()
    ours = measure(
        model, inputs, lambda out: loss(out, targets), fisher=fisher, likelihood="categorical", sharing=sharing
    )
    whole = oracle._gradient_covariances["0"]
    for group in range(2):
        rows = slice(group * 3, group * 3 + 3)
        assert_close(ours["0/G"][group], whole[rows, rows])
        # A of a group is the oracle's A of a convolution that sees only this group's channels.
        alone = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 3)).double()
        part = inputs[:, 2 * group : 2 * group + 2]
        single = oracle_factors(alone, part, targets, "categorical", "input_only", sharing, None)
        assert_close(ours["0/A"][group], single._input_covariances["0"])
