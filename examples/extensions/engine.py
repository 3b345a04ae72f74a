"""An engine: every rank holds the whole model, and one all-reduce of all gradients follows a step's last backward.

extensions: [examples.extensions.engine]
engine: {name: one_all_reduce}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_dist import extensions as ext


class OneAllReduce(ext.Engine):
    """Expects equal weights on every rank at the start, which a run's seed gives; leaves buffers to each rank."""

    def __init__(self, model: nn.Module, config: ext.EngineConfig, world: ext.World) -> None:
        self.model = self.module = model
        self._ranks = world.world_size
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def communicator(self, timeout_seconds: float, backend: ext.Backend = ext.Backend.TORCH) -> ext.Communicator:
        return ext.build_communicator(timeout_seconds, None, backend)

    def layout(self, names: Iterable[str]) -> ext.GradientLayout:
        whole = (ext.ParameterSlices.replicated(name, self._trained[name].shape) for name in names)
        return ext.GradientLayout(tuple(whole), 1)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self._trained.items() if p.grad is not None}

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._trained.items()}

    @contextmanager
    def synchronize(self, enabled: bool) -> Iterator[None]:
        yield
        if not enabled or self._ranks == 1:
            return
        for p in self._trained.values():  # every rank sends all: parameters that one of them left out are zero there
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = list(self.gradients().values())
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.div_(self._ranks).split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


ext.register_engine("one_all_reduce", OneAllReduce, api_version=1)
