"""Losses are sums of negative log-likelihoods: checked against torch.distributions, term by term."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal

from kfac_dist.config.schema import LossConfig, LossName
from kfac_dist.errors import DataError
from kfac_dist.tasks.losses import build_loss

OUTPUTS = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))


def test_cross_entropy_is_categorical() -> None:
    loss, labels = build_loss(LossConfig(name="cross_entropy")), torch.tensor([0, 6, 3, 3, 1])
    torch.testing.assert_close(loss.total(OUTPUTS, labels), -Categorical(logits=OUTPUTS).log_prob(labels).sum())
    assert loss.count(labels) == 5
    assert loss.metric_sum(OUTPUTS, OUTPUTS.argmax(1)) == 5
    assert loss.metric_sum(OUTPUTS, (OUTPUTS.argmax(1) + 1) % 7) == 0


def test_sigmoid_cross_entropy_is_bernoulli_summed_over_pixels() -> None:
    loss, pixels = build_loss(LossConfig(name="sigmoid_cross_entropy")), (OUTPUTS > 0.3).float()
    torch.testing.assert_close(loss.total(OUTPUTS, pixels), -Bernoulli(logits=OUTPUTS).log_prob(pixels).sum())
    torch.testing.assert_close(loss.metric_sum(OUTPUTS, pixels), (OUTPUTS.sigmoid() - pixels).square().sum())
    assert loss.count(pixels) == 5


def test_squared_error_is_a_unit_gaussian() -> None:
    loss, targets = build_loss(LossConfig(name="mse")), torch.zeros(5, 7)
    constant = targets.numel() * math.log(2 * math.pi) / 2
    expected = -Normal(OUTPUTS, 1.0).log_prob(targets).sum() - constant
    torch.testing.assert_close(loss.total(OUTPUTS, targets), expected)
    torch.testing.assert_close(loss.metric_sum(OUTPUTS, targets), 2 * expected)


def test_tokens_count_only_valid_positions() -> None:
    loss = build_loss(LossConfig(name="token_cross_entropy", ignore_index=-1))
    outputs = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([[0, -1, 2], [-1, -1, 3]])
    picked = outputs[targets >= 0].log_softmax(-1).gather(1, targets[targets >= 0][:, None])
    torch.testing.assert_close(loss.total(outputs, targets), -picked.sum())
    torch.testing.assert_close(loss.metric_sum(outputs, targets), -picked.sum() / math.log(2))
    count = loss.count(targets)
    assert count == 3


@pytest.mark.parametrize("name", list(LossName))
def test_every_name_has_a_loss_and_a_metric(name: LossName) -> None:
    assert build_loss(LossConfig(name=name)).metric


@pytest.mark.parametrize("name", ["mse", "sigmoid_cross_entropy"])
def test_targets_of_another_shape_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"shape \(5, 7\), the targets \(5,\)"):
        build_loss(LossConfig(name=name)).total(OUTPUTS, torch.zeros(5))
