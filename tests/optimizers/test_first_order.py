"""The optimizer built from a section does what its name says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_dist.config.schema import OptimizerConfig
from kfac_dist.optimizers import build_optimizer, set_learning_rate
from kfac_dist.optimizers.dissected import MSSD, MSVAG, SSD, SVAG


def _parameter(value: float, grad: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.tensor([value]))
    parameter.grad = torch.tensor([grad])
    return parameter


def test_sgd_takes_momentum_and_weight_decay() -> None:
    parameter = _parameter(1.0, 0.5)
    optimizer = build_optimizer([parameter], OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=0.2))
    optimizer.step()
    assert parameter.item() == pytest.approx(1 - 0.1 * 0.7)
    optimizer.step()
    assert parameter.item() == pytest.approx(0.93 - 0.1 * (0.9 * 0.7 + 0.5 + 0.2 * 0.93))


def test_nesterov_looks_ahead() -> None:
    parameter = _parameter(0.0, 1.0)
    build_optimizer([parameter], OptimizerConfig(lr=1.0, momentum=0.5, nesterov=True)).step()
    assert parameter.item() == pytest.approx(-1.5)


def test_adamw_decouples_weight_decay() -> None:
    parameter = _parameter(1.0, 3.0)
    build_optimizer([parameter], OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.1)).step()
    assert parameter.item() == pytest.approx(1 - 0.01 * 0.1 - 0.01, abs=1e-6)


@pytest.mark.parametrize(("name", "kind"), [("mssd", MSSD), ("svag", SVAG), ("msvag", MSVAG)])
def test_dissected_adam_takes_its_options(name: str, kind: type[torch.optim.Optimizer]) -> None:
    config = OptimizerConfig.model_validate({"name": name, "lr": 0.01, "beta": 0.8, "weight_decay": 0.1})
    optimizer = build_optimizer([_parameter(1.0, 1.0)], config)
    assert type(optimizer) is kind
    assert optimizer.defaults == {"lr": 0.01, "beta": 0.8, "weight_decay": 0.1}


def test_sign_descent_has_no_average() -> None:
    parameter = _parameter(1.0, 3.0)
    optimizer = build_optimizer([parameter], OptimizerConfig(name="ssd", lr=0.01, weight_decay=0.1))
    optimizer.step()
    assert type(optimizer) is SSD
    assert parameter.item() == pytest.approx(1 - 0.01 * 0.1 - 0.01)


def test_frozen_parameters_stay_out() -> None:
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    optimizer = build_optimizer([frozen, _parameter(1.0, 1.0)], OptimizerConfig(lr=0.1))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def test_set_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer([_parameter(1.0, 1.0)], OptimizerConfig(lr=0.1))
    optimizer.add_param_group({"params": [_parameter(1.0, 1.0)]})
    set_learning_rate(optimizer, 0.7)
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.7]
