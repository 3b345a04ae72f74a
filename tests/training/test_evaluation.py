"""Evaluation: exact means, in evaluation mode, of one model."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

from kfac_dist.config.schema import LossConfig
from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.engines.ddp import DDPEngine
from kfac_dist.tasks import build_loss
from kfac_dist.training.data.batches import InMemorySource
from kfac_dist.training.evaluation import Evaluation, evaluate
from tests.harness import run_ranks

INPUTS = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(11) % 3


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))


def _source() -> InMemorySource:
    return InMemorySource(TensorDataset(INPUTS, LABELS), torch.device("cpu"))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_means_do_not_depend_on_the_batches(batch_size: int) -> None:
    model, loss = _model(), build_loss(LossConfig(name="cross_entropy"))
    result = evaluate(DDPEngine(model), loss, _source(), 9, batch_size, SoloCommunicator())
    assert model.training, "the mode is put back"
    outputs = model.eval()(INPUTS[:9])
    assert result.loss == pytest.approx(nn.functional.cross_entropy(outputs, LABELS[:9]).item(), rel=1e-6)
    assert result.metric == pytest.approx((outputs.argmax(1) == LABELS[:9]).float().mean().item())


def _evaluate_on_rank(samples: int) -> Evaluation:
    communicator = build_communicator(20.0)
    model = _model()
    model[0].running_mean += 10.0 * dist.get_rank()  # type: ignore[index, operator]  # as training leaves it
    result = evaluate(
        DDPEngine(model), build_loss(LossConfig(name="cross_entropy")), _source(), samples, 2, communicator
    )
    communicator.close()
    return result


def test_ranks_evaluate_the_model_of_rank_zero_even_where_some_have_no_samples() -> None:
    for samples in (11, 2):
        alone = evaluate(
            DDPEngine(_model()), build_loss(LossConfig(name="cross_entropy")), _source(), samples, 2, SoloCommunicator()
        )
        for result in run_ranks(3, _evaluate_on_rank, samples):
            assert (result.loss, result.metric) == pytest.approx((alone.loss, alone.metric), rel=1e-6)
