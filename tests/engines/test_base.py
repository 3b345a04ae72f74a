"""K-FAC asks no more of an engine than `Engine` names."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kfac_dist import KFAC
from kfac_dist.config.schema import Backend
from kfac_dist.distributed.communicators.base import Communicator, SoloCommunicator
from kfac_dist.distributed.movement.gradient_layout import GradientLayout, ParameterSlices
from kfac_dist.engines import Engine, TrainingEngine

CONFIG = {"inversion": {"damping": 0.1}, "update": {"kl_clip": None, "l2": 0.01}, "curvature": {"factor_every": 1}}


class Bare(Engine):
    """A module, with nothing that a training loop needs."""

    def __init__(self, module: nn.Module) -> None:
        self.model = self.module = module

    def communicator(self, timeout_seconds: float, backend: Backend = Backend.TORCH) -> Communicator:
        return SoloCommunicator()

    def layout(self, names: Iterable[str]) -> GradientLayout:
        own = dict(self.module.named_parameters())
        return GradientLayout(tuple(ParameterSlices.replicated(name, own[name].shape) for name in names), 1)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.module.named_parameters()}


def stepped(bare: bool) -> list[Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    kfac = KFAC(Bare(module) if bare else module, CONFIG)
    module(torch.randn(5, 3)).square().sum(1).mean().backward()
    kfac.step()
    kfac.remove()
    return [p.grad for p in module.parameters() if p.grad is not None]


def test_an_engine_without_a_loop_serves_kfac() -> None:
    assert not issubclass(Bare, TrainingEngine)
    found, wanted = stepped(bare=True), stepped(bare=False)
    assert len(found) == 4
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
