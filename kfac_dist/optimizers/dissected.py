"""The four ways to combine Adam's two halves: the sign of a gradient, and the adaptation to its variance.

Adam's step is `sign(m) / sqrt(1 + η²)` up to its ε and unequal βs, with η² = s/m² the relative variance of a gradient's
element. Balles & Hennig ("Dissecting Adam", ICML 2018) take the two apart:

                        no adaptation          divided by 1 + η²
    magnitude           SGD                    SVAG  -lr·γ g        γ = 1 / (1 + s/m²)
    … with momentum     SGD with momentum      M-SVAG -lr·γ m       γ = 1 / (1 + ρ s/m²)
    sign                SSD  -lr·sign(g)
    … with momentum     M-SSD -lr·sign(m)      Adam

State, step t counted from 0 and starting at zero:    m̃ ← β m̃ + (1−β) g      ṽ ← β ṽ + (1−β) g²
    m = m̃ / (1−βᵗ⁺¹)    v = ṽ / (1−βᵗ⁺¹)    ρ = (1−β)(1+βᵗ⁺¹) / ((1+β)(1−βᵗ⁺¹))    s = (v − m²) / (1 − ρ)

so that `Var[m] = ρσ²` and `E[s] = σ²` for gradients that are independent with variance σ². At t = 0 there is nothing to
tell a variance from (v = m², ρ = 1): it counts as 0.

Everything is elementwise, so a rank may step any part of a parameter: rows of `fully_shard`, ranges of ZeRO. The number
of kernels does not depend on the number of parameters, and nothing waits for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, ParamsT

from kfac_dist.errors import ConfigError, ModelError

Tensors = list[Tensor]


def bias_correction(beta: float, step: int) -> float:
    """Return `1 − βᵗ⁺¹`, by which an average that started from zero is divided; t counted from 0."""
    return 1.0 - beta ** (step + 1)


def mean_variance(beta: float, step: int) -> float:
    """Return ρ, the variance of the averaged gradient m relative to that of one gradient (eq. 9 of the paper)."""
    power = beta ** (step + 1)
    return (1 - beta) * (1 + power) / ((1 + beta) * (1 - power))


def gradient_variance(mean: Tensor, square: Tensor, beta: float, step: int) -> tuple[Tensor, Tensor]:
    """Return m² and the estimate s of the gradient's variance, elementwise.

    Args:
        mean: m̃, any shape.
        square: ṽ, the same shape.
        beta: Of both.
        step: t, the number of updates of m̃ and ṽ before the last one.
    """
    correction = bias_correction(beta, step)
    squared_mean = (mean / correction).square()
    if step == 0:
        return squared_mean, torch.zeros_like(squared_mean)
    return squared_mean, (square / correction - squared_mean).clamp_(min=0) / (1 - mean_variance(beta, step))


class DissectedAdam(Optimizer, ABC):
    """Common parts of the four optimizers.

    Args:
        params: Parameters or groups of them.
        lr: Step size α.
        beta: β of all averages, in (0, 1); no part of `SSD`.
        weight_decay: Decoupled: parameters shrink by `1 − lr·weight_decay` before the step.

    Raises:
        ConfigError: A value is out of range.
    """

    # The averages that a method keeps, under the names that torch's Adam has for them.
    averages: ClassVar[tuple[str, ...]]

    def __init__(self, params: ParamsT, lr: float, beta: float = 0.9, weight_decay: float = 0.0) -> None:
        name = type(self).__name__
        if not lr >= 0:
            raise ConfigError(f"{name}: lr is {lr}, expected a number >= 0")
        if not weight_decay >= 0:
            raise ConfigError(f"{name}: weight_decay is {weight_decay}, expected a number >= 0")
        if self.averages and not 0 < beta < 1:
            raise ConfigError(f"{name}: beta is {beta}, expected a number > 0 and < 1: without an average there is SSD")
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "beta": beta} if self.averages else defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: Computes the loss anew and returns it.

        Raises:
            ModelError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameters in self._alike(trained):
                self._step_together(group, parameters)
        return loss

    def _alike(self, parameters: Tensors) -> Iterable[Tensors]:
        """Return parameters in lists that one kernel can step: a single one, unless some steps left some of them out.

        The counts of steps are on the host, as those of torch's Adam are.
        """
        found: dict[tuple[int, torch.device, torch.dtype], Tensors] = {}
        for parameter in parameters:
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state |= {name: torch.zeros_like(parameter) for name in self.averages}
            found.setdefault((int(state["step"]), parameter.device, parameter.dtype), []).append(parameter)
        return found.values()

    def _step_together(self, group: dict[str, Any], parameters: Tensors) -> None:
        gradients = [_dense(parameter.grad) for parameter in parameters if parameter.grad is not None]
        states = [self.state[parameter] for parameter in parameters]
        averages = [[_local(state[name]) for state in states] for name in self.averages]
        own = [_local(parameter) for parameter in parameters]
        step = int(states[0]["step"])
        torch._foreach_add_([state["step"] for state in states], 1)
        if group["weight_decay"]:
            torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
        self._descend(own, gradients, averages, group, step)

    @abstractmethod
    def _descend(
        self, parameters: Tensors, gradients: Tensors, averages: list[Tensors], group: dict[str, Any], step: int
    ) -> None:
        """Move the averages by the gradients, and the parameters by the method's step.

        Args:
            parameters: This rank's parts of them.
            gradients: Theirs.
            averages: In the order of `averages`.
            group: Their options.
            step: t, their number of earlier steps.
        """


class SSD(DissectedAdam):
    """Stochastic sign descent, `−lr·sign(g)`; an element whose gradient is 0 stays."""

    averages = ()

    def __init__(self, params: ParamsT, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay=weight_decay)

    def _descend(
        self, parameters: Tensors, gradients: Tensors, averages: list[Tensors], group: dict[str, Any], step: int
    ) -> None:
        torch._foreach_add_(parameters, torch._foreach_sign(gradients), alpha=-group["lr"])


class MSSD(DissectedAdam):
    """Stochastic sign descent with momentum, `−lr·sign(m)`."""

    averages = ("exp_avg",)

    def _descend(
        self, parameters: Tensors, gradients: Tensors, averages: list[Tensors], group: dict[str, Any], step: int
    ) -> None:
        (mean,) = averages
        torch._foreach_lerp_(mean, gradients, 1 - group["beta"])
        torch._foreach_add_(parameters, torch._foreach_sign(mean), alpha=-group["lr"])


class SVAG(DissectedAdam):
    """Stochastic variance-adapted gradient, `−lr·m²/(m²+s)·g`."""

    averages = ("exp_avg", "exp_avg_sq")

    def _descend(
        self, parameters: Tensors, gradients: Tensors, averages: list[Tensors], group: dict[str, Any], step: int
    ) -> None:
        mean, square = averages
        _average(mean, square, gradients, group["beta"])
        rho = mean_variance(group["beta"], step)
        factors = _adaptation(mean, square, bias_correction(group["beta"], step), 0.0 if step == 0 else 1 / (1 - rho))
        torch._foreach_addcmul_(parameters, factors, gradients, value=-group["lr"])


class MSVAG(DissectedAdam):
    """Stochastic variance-adapted gradient with momentum, `−lr·m²/(m²+ρs)·m`."""

    averages = ("exp_avg", "exp_avg_sq")

    def _descend(
        self, parameters: Tensors, gradients: Tensors, averages: list[Tensors], group: dict[str, Any], step: int
    ) -> None:
        mean, square = averages
        _average(mean, square, gradients, group["beta"])
        rho, correction = mean_variance(group["beta"], step), bias_correction(group["beta"], step)
        factors = _adaptation(mean, square, correction, 0.0 if step == 0 else rho / (1 - rho))
        torch._foreach_addcmul_(parameters, factors, mean, value=-group["lr"] / correction)


def _average(mean: Tensors, square: Tensors, gradients: Tensors, beta: float) -> None:
    torch._foreach_lerp_(mean, gradients, 1 - beta)
    torch._foreach_mul_(square, beta)
    torch._foreach_addcmul_(square, gradients, gradients, value=1 - beta)


def _adaptation(mean: Tensors, square: Tensors, correction: float, weight: float) -> Tensors:
    """Return the factors `m² / (m² + weight·(v − m²))`, in [0, 1]; 0/0 is 0.

    With numerator and denominator both times the squared bias correction c², `c²m² = m̃²` and `c²v = cṽ`.
    """
    squared_mean = torch._foreach_mul(mean, mean)
    denominator = torch._foreach_mul(square, correction)
    torch._foreach_sub_(denominator, squared_mean)
    torch._foreach_clamp_min_(denominator, 0.0)  # rounding may leave a variance below zero
    torch._foreach_mul_(denominator, weight)
    torch._foreach_add_(denominator, squared_mean)
    torch._foreach_clamp_min_(denominator, torch.finfo(denominator[0].dtype).tiny)
    torch._foreach_div_(squared_mean, denominator)
    return list(squared_mean)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's memory of a tensor: the methods are elementwise, so that no rank needs another's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _dense(gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        raise ModelError("the gradient is sparse, and this optimizer averages whole ones: use sgd, or sparse=False")
    return _local(gradient)
