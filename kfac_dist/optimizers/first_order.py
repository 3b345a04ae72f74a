"""The first-order optimizer of a run, from its section of the configuration."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from kfac_dist.config.schema import OptimizerConfig, OptimizerName
from kfac_dist.optimizers.dissected import MSSD, MSVAG, SSD, SVAG


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer, in the `foreach` form: a fixed number of kernels for any number of parameters.

    The learning rate starts at the schedule's plain value; the training loop sets it before every step.

    Args:
        parameters: Parameters of the model; frozen ones are left out.
        config: The optimizer and its constants.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    match config.name:
        case OptimizerName.SGD:
            return torch.optim.SGD(
                trained,
                lr=config.lr.value,
                momentum=config.momentum,
                nesterov=config.nesterov,
                weight_decay=config.weight_decay,
                foreach=True,
            )
        case OptimizerName.ADAMW:
            return torch.optim.AdamW(
                trained, lr=config.lr.value, betas=config.betas, weight_decay=config.weight_decay, foreach=True
            )
        case OptimizerName.SSD:
            return SSD(trained, config.lr.value, config.weight_decay)
        case OptimizerName.MSSD:
            return MSSD(trained, config.lr.value, config.beta, config.weight_decay)
        case OptimizerName.SVAG:
            return SVAG(trained, config.lr.value, config.beta, config.weight_decay)
        case OptimizerName.MSVAG:
            return MSVAG(trained, config.lr.value, config.beta, config.weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group, times the group's own `lr_factor` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_factor", 1.0)
