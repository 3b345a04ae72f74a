"""An engine for tests that shards without any library: DDP averages, each rank then counts only its slices.

Boundaries fall anywhere, as ZeRO's do: all parameters end to end, cut into ranges of uneven length, the last of which
may be empty. `share_size` ranks hold each gradient once; with more ranks there are replicas, as under hybrid FSDP.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_dist.distributed.movement.gradient_layout import GradientLayout, ParameterSlices, Slice
from kfac_dist.engines.ddp import DDPEngine
from tests.preconditioner.workloads import place


class SlicedEngine(DDPEngine):
    """Gradients and parameters as flat slices of what DDP has whole."""

    sharded = True

    def __init__(self, model: nn.Module, shard_size: int, weights: Iterable[int]) -> None:
        super().__init__(model)
        self._shard_size = shard_size
        self._whole = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        total, parts = sum(p.numel() for p in self._whole.values()), list(weights)
        bounds = [total * sum(parts[:rank]) // sum(parts) for rank in range(shard_size + 1)]
        parameters, first = [], 0
        for name, parameter in self._whole.items():
            cuts = [min(max(bound - first, 0), parameter.numel()) for bound in bounds]
            slices = [Slice(rank, cuts[rank], cuts[rank + 1]) for rank in range(shard_size)]
            parameters.append(ParameterSlices.sharded(name, parameter.shape, slices))
            first += parameter.numel()
        self._layout = GradientLayout(tuple(parameters), shard_size)

    def shard_size(self, size: int) -> int:
        return self._shard_size

    def layout(self, names: Iterable[str]) -> GradientLayout:
        return GradientLayout(tuple(self._layout[name] for name in names), self._shard_size)

    def gradients(self) -> dict[str, Tensor]:
        return self._slices({name: p.grad for name, p in self._whole.items() if p.grad is not None})

    def parameters(self) -> dict[str, Tensor]:
        return self._slices({name: p.detach() for name, p in self._whole.items()})

    def complete(self) -> None:
        """Give every rank the other ranks' slices, so that a plain optimizer can step."""
        held = self._layout.held_by(place()[0] % self._shard_size)
        for name, parameter in self._whole.items():
            assert parameter.grad is not None
            piece = held.get(name)
            own = torch.zeros_like(parameter.grad).view(-1)
            if piece is not None:
                own[piece.start : piece.stop] = parameter.grad.view(-1)[piece.start : piece.stop]
            if place()[1] > 1:
                dist.all_reduce(own)
            parameter.grad.copy_(own.view_as(parameter) / (place()[1] // self._shard_size))

    def _slices(self, whole: dict[str, Any]) -> dict[str, Tensor]:
        held = self._layout.held_by(place()[0] % self._shard_size)
        return {
            name: tensor.view(-1)[held[name].start : held[name].stop] for name, tensor in whole.items() if name in held
        }
