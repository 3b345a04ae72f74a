"""`optimizer`: the first-order optimizer that takes the step."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from kfac_dist.config.schedules import Schedule
from kfac_dist.config.section import BelowOne, Flag, NonNegative, Section


class OptimizerName(StrEnum):
    """First-order optimizers that may take the step."""

    SGD = "sgd"
    ADAMW = "adamw"
    SSD = "ssd"
    MSSD = "mssd"
    SVAG = "svag"
    MSVAG = "msvag"

    @property
    def options(self) -> tuple[str, ...]:
        """The options of a method that not every method has."""
        match self:
            case OptimizerName.SGD:
                return ("momentum", "nesterov")
            case OptimizerName.ADAMW:
                return ("betas",)
            case OptimizerName.SSD:
                return ()
            case OptimizerName.MSSD | OptimizerName.SVAG | OptimizerName.MSVAG:
                return ("beta",)


class OptimizerConfig(Section):
    """The first-order optimizer that takes the (preconditioned) step.

    Attributes:
        name: The optimizer; `ssd`, `mssd`, `svag` and `msvag` are those of "Dissecting Adam" (`optimizers.dissected`).
        lr: Learning rate; a number or a schedule over steps.
        momentum: Of `sgd`.
        nesterov: Of `sgd`.
        betas: Of `adamw`: for the mean, and for the mean square.
        beta: Of `mssd`, `svag` and `msvag`: for all averages.
        weight_decay: Part of the gradient for `sgd`; for all others it shrinks the parameters by lr·weight_decay.
    """

    name: OptimizerName = OptimizerName.SGD
    lr: Schedule
    momentum: BelowOne = 0.9
    nesterov: Flag = False
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    beta: Annotated[float, Field(gt=0, lt=1, strict=True, allow_inf_nan=False)] = 0.9
    weight_decay: NonNegative = 0.0

    @property
    def knows_variance(self) -> bool:
        """Whether it averages gradients and their squares with one β."""
        return self.name in (OptimizerName.SVAG, OptimizerName.MSVAG) or (
            self.name is OptimizerName.ADAMW and self.betas[0] == self.betas[1]
        )

    @model_validator(mode="after")
    def _options_belong_to_optimizer(self) -> Self:
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        own = self.name.options
        for option in dict.fromkeys(option for name in OptimizerName for option in name.options):
            if option not in own and getattr(self, option) != defaults[option]:
                raise ValueError(f"{option} has no effect on {self.name}: leave it out")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum > 0")
        return self
