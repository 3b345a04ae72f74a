"""ZeRO under this package's own training loop, which says itself how a loss is divided and when a step ends."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_dist.config.schema import EngineConfig, Precision, TrainConfig
from kfac_dist.distributed.startup.bootstrap import World
from kfac_dist.engines.base import BackwardPass
from kfac_dist.engines.local_shards import LocalShard
from kfac_dist.engines.zero.config import deepspeed_settings, import_deepspeed
from kfac_dist.engines.zero.engine import ZeroEngine
from kfac_dist.engines.zero.state import load_zero_counters, use_restored_weights, zero_counters, zero_holdings

# DeepSpeed calls torch's collectives by their old names, in every step and on every rank: that is no one's business who
# trains. Not around the calls: filters belong to all threads.
_OLD_NAMES = r"`torch\.distributed\.\w+` is deprecated"

_DTYPES = {Precision.BFLOAT16: torch.bfloat16, Precision.FLOAT16: torch.float16}


class ZeroLoopEngine(ZeroEngine):
    """A DeepSpeed engine whose micro-batches a loop announces by `synchronize`, and whose losses it has divided.

    Args:
        model: The `DeepSpeedEngine`.
        dtype: Precision of its model, if not float32.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__(model)
        self._dtype = dtype
        self._index = 0
        self._last = False

    def backward_pass(self) -> BackwardPass:
        """See `Engine.backward_pass`: DeepSpeed adds its loss scale, and nothing else."""
        return BackwardPass(self.gradient_scale, self._index, self._last)

    def synchronize(self, enabled: bool) -> AbstractContextManager[None]:
        """See `TrainingEngine.synchronize`."""
        self._last = enabled
        self._deepspeed.set_gradient_accumulation_boundary(enabled)
        return nullcontext()

    def prepared(self, inputs: Tensor) -> Tensor:
        """See `TrainingEngine.prepared`."""
        return inputs if self._dtype is None or not inputs.is_floating_point() else inputs.to(self._dtype)

    def backward(self, loss: Tensor) -> None:
        """See `TrainingEngine.backward`."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        self._index += 1

    def take_step(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        """See `TrainingEngine.take_step`: DeepSpeed got the norm of clipping at its start."""
        self._deepspeed.step()
        self._index = 0

    def holdings(self) -> list[LocalShard]:
        """See `TrainingEngine.holdings`."""
        return zero_holdings(self._deepspeed)

    def restored(self) -> None:
        """See `TrainingEngine.restored`."""
        use_restored_weights(self._deepspeed)

    def counters(self) -> dict[str, Tensor]:
        """See `TrainingEngine.counters`."""
        return zero_counters(self._deepspeed)

    def close(self) -> None:
        """See `TrainingEngine.close`: DeepSpeed's hooks hold memory that the next run has no room for."""
        self._deepspeed.destroy()

    def load_counters(self, values: dict[str, Tensor]) -> None:
        """See `TrainingEngine.load_counters`."""
        load_zero_counters(self._deepspeed, values)


def build_zero(
    model: nn.Module,
    config: EngineConfig,
    train: TrainConfig,
    world: World,
    build_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
) -> tuple[ZeroLoopEngine, torch.optim.Optimizer]:
    """Initialise DeepSpeed with a section that has been checked; collective."""
    warnings.filterwarnings("ignore", message=_OLD_NAMES, category=FutureWarning)
    deepspeed: Any = import_deepspeed(config, on_cpu=world.device.type == "cpu")
    settings = deepspeed_settings(config, train, dist.get_world_size())
    optimizer = build_optimizer(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return ZeroLoopEngine(engine, _DTYPES.get(config.precision)), optimizer
