"""DeepSpeed by its public functions alone: slow, but independent of how ZeRO lays out what it holds.

Every gradient is gathered whole on every rank (one collective a parameter), preconditioned like DDP's, and set again:
`safe_get_full_grad`, `safe_set_full_grad`. It is the reference for `ZeroEngine` and for benchmarks, and what is left if
a release of DeepSpeed moves its partitions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.engines.base import Engine
from kfac_dist.engines.zero.engine import ZeroEngine
from kfac_dist.errors import ConfigError


class PublicZeroEngine(ZeroEngine):
    """A `DeepSpeedEngine` of stage 1, 2 or 3 whose gradients K-FAC gets whole; pass it to `KFAC` instead of the engine.

    Args:
        model: The `DeepSpeedEngine`.

    Raises:
        ModelError: See `ZeroEngine`.
        ConfigError: See `ZeroEngine`; or DeepSpeed's public functions go wrong with an option.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        engine = self._deepspeed
        if engine.zero_round_robin_gradients():
            raise ConfigError(
                "zero_optimization.round_robin_gradients: DeepSpeed's safe_get_full_grad hangs with it; set it to "
                "false, or pass KFAC the DeepSpeed engine itself"
            )
        if not self.sharded:
            raise ConfigError(
                "with zero_optimization.stage 0, and with stage 1 where data_types.grad_accum_dtype is fp32 and the "
                "model is bf16, every rank has whole gradients: pass KFAC the DeepSpeed engine itself"
            )
        self.sharded = False
        self._trained: dict[str, Any] = {
            name: p for p, name in self._names.items() if self._partitions.slices(p) is not None and p.requires_grad
        }
        self._whole: dict[str, Tensor] | None = None

    def gradients(self) -> dict[str, Tensor]:
        """See `Engine.gradients`: copies, which the step sets; the first call of a step is collective."""
        from deepspeed.utils import safe_get_full_grad

        if self._whole is None:
            found = ((name, safe_get_full_grad(p)) for name, p in self._trained.items())
            self._whole = {name: grad.float().clone() for name, grad in found if grad is not None}
        return dict(self._whole)

    def parameters(self) -> dict[str, Tensor]:
        """See `Engine.parameters`; collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).detach() for name, p in self._trained.items()}

    @property
    def gradient_dtype(self) -> torch.dtype:
        """See `Engine.gradient_dtype`."""
        return torch.float32

    def finite(self) -> Tensor:
        """See `Engine.finite`."""
        return Engine.finite(self)

    def _written(self) -> None:
        from deepspeed.utils import safe_set_full_grad

        for name, grad in (self._whole or {}).items():
            p = self._trained[name]
            if hasattr(p, "ds_shape"):
                # Of a size that isn't a multiple of W, it reads beyond the end on the last rank.
                padded = grad.new_zeros(p.partition_numel() * self._partitions.size)
                padded[: grad.numel()] = grad.view(-1)
                grad = padded
            safe_set_full_grad(p, grad)
        self._whole = None
        super()._written()
