"""`optimizer`: the first-order optimizer that takes the step."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import model_validator

from kfac_dist.config.schedules import Schedule
from kfac_dist.config.section import BelowOne, Flag, NonNegative, Section


class OptimizerName(StrEnum):
    """First-order optimizers that may take the step."""

    SGD = "sgd"
    ADAMW = "adamw"


class OptimizerConfig(Section):
    """The first-order optimizer that takes the (preconditioned) step."""

    name: OptimizerName = OptimizerName.SGD
    lr: Schedule
    momentum: BelowOne = 0.9
    nesterov: Flag = False
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0

    @model_validator(mode="after")
    def _options_belong_to_optimizer(self) -> Self:
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        foreign = ("momentum", "nesterov") if self.name is OptimizerName.ADAMW else ("betas",)
        for option in foreign:
            if getattr(self, option) != defaults[option]:
                raise ValueError(f"{option} has no effect on {self.name}: leave it out")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum > 0")
        return self
