"""The one question that an engine answers: which slices of which parameter's gradient does this rank hold?

    ddp     all of every gradient, on every rank
    fsdp2   rows (DTensor Shard(0))
    zero    one-dimensional ranges with arbitrary boundaries, possibly none

Activations and output gradients are ordinary tensors under all of them, so nothing else in K-FAC depends on the engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from kfac_dist.distributed.communicator import Communicator
from kfac_dist.distributed.layout import GradientLayout


class Engine(ABC):
    """A model whose gradients are averaged over ranks and held somewhere.

    Attributes:
        model: What the training loop calls.
        module: The bare module; its names identify parameters and blocks.
    """

    model: nn.Module
    module: nn.Module

    @abstractmethod
    def communicator(self, timeout_seconds: float) -> Communicator:
        """Return a communicator over the ranks that average gradients; collective."""

    @abstractmethod
    def layout(self, names: Iterable[str], size: int) -> GradientLayout:
        """Return which of `size` ranks holds which slices of these parameters' gradients; the same on every rank."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Return writable views of the averaged gradients (or of this rank's slices) by parameter name.

        Valid between the last backward of a step and the optimizer's step. Parameters that no rank used are missing.
        """

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters (or this rank's slices), shaped like `gradients`."""

    @abstractmethod
    def synchronize(self, enabled: bool) -> AbstractContextManager[None]:
        """Return a context for one micro-batch's forward and backward; only the last of a step averages gradients."""

    def settle(self, backward: Callable[[], None]) -> None:  # noqa: B027  most engines need none
        """Run a backward pass whose results are thrown away, if the engine needs one before its first step.

        Some engines arrange their communication by the first backward that they see. Where that changes the order in
        which ranks are summed, a resumed run would round differently from one that never stopped. Call this before
        K-FAC is attached and before a checkpoint is loaded; collective.
        """

    def finite(self) -> Tensor:
        """Return a 0-dim bool on the device: whether all averaged gradients are finite, the same on every rank."""
        gradients = [grad.coalesce().values() if grad.is_sparse else grad for grad in self.gradients().values()]
        if not gradients:  # torch refuses an empty list
            return torch.tensor(True)
        norms = torch._foreach_norm(gradients)
        return torch.isfinite(torch.stack([norm.float() for norm in norms]).sum())
