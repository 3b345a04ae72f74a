"""DDP, and its special case of a bare module: every rank holds every gradient whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_dist.compat.torch import uncompiled
from kfac_dist.config.schema import Backend
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.distributed.communicators.traffic import all_reduce_bytes
from kfac_dist.distributed.movement.gradient_layout import GradientLayout, ParameterSlices
from kfac_dist.engines.training_engine import TrainingEngine


class DDPEngine(TrainingEngine):
    """A `DistributedDataParallel` model, or a bare module (with several ranks, the user averages its gradients)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        bare = uncompiled(model)
        self._ddp = bare if isinstance(bare, DistributedDataParallel) else None
        self.module = bare if self._ddp is None else uncompiled(self._ddp.module)
        self.take_parameters()

    def communicator(self, timeout_seconds: float, backend: Backend = Backend.TORCH) -> Communicator:
        """See `Engine.communicator`."""
        return build_communicator(timeout_seconds, None if self._ddp is None else self._ddp.process_group, backend)

    def layout(self, names: Iterable[str]) -> GradientLayout:
        """See `Engine.layout`."""
        whole = (ParameterSlices.replicated(name, self._trained[name].shape) for name in names)
        return GradientLayout(tuple(whole), 1)

    def gradients(self) -> dict[str, Tensor]:
        """See `Engine.gradients`."""
        return {name: grad for name, p in self._trained.items() if (grad := p.grad) is not None}

    def parameters(self) -> dict[str, Tensor]:
        """See `Engine.parameters`."""
        return {name: p.detach() for name, p in self._trained.items()}

    def trained(self) -> Iterable[nn.Parameter]:
        """See `Engine.trained`."""
        return self._trained.values()

    def take_parameters(self) -> bool:
        """See `Engine.take_parameters`."""
        self._trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        return True

    def unused(self) -> list[str]:
        """See `TrainingEngine.unused`: DDP waits, unless it has `find_unused_parameters`."""
        if self._ddp is None or self._ddp.find_unused_parameters:
            return []
        return [name for name, parameter in self._trained.items() if parameter.grad is None]

    def settle(self, backward: Callable[[], None]) -> None:
        """See `TrainingEngine.settle`: DDP rebuilds its buckets in the order in which the first gradients came.

        A ring sums an element in an order that depends on its place in the bucket, which shows from three ranks on.
        """
        if self._ddp is None:
            return
        kept = [buffer.clone() for buffer in self.module.buffers()]
        with torch.random.fork_rng(devices=[p.device for p in self._trained.values() if p.is_cuda][:1]):
            backward()
        for buffer, value in zip(self.module.buffers(), kept, strict=True):
            buffer.copy_(value)
        for parameter in self._trained.values():
            parameter.grad = None

    def synchronize(self, enabled: bool) -> AbstractContextManager[None]:
        """See `TrainingEngine.synchronize`."""
        return nullcontext() if enabled or self._ddp is None else self._ddp.no_sync()

    def averaging_bytes(self, size: int) -> int:
        """See `TrainingEngine.averaging_bytes`: DDP all-reduces its buckets, whose bytes add up to the gradients'."""
        if self._ddp is None:
            return 0
        return all_reduce_bytes(sum(p.numel() * p.element_size() for p in self._trained.values()), size)
