"""An engine answers one question: which slices of which parameter's gradient does this rank hold?

    ddp     all of every gradient, on every rank
    fsdp2   rows (DTensor Shard(0))
    zero    one-dimensional ranges with arbitrary boundaries, possibly none

Activations and output gradients are ordinary tensors under all of them, so nothing else in K-FAC depends on the engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfac_dist.compat.torch import times_written
from kfac_dist.config.schema import Backend
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.movement.gradient_layout import GradientLayout
from kfac_dist.hooks import Handle as Handle

# Label in the traffic for the ranks' vote on their gradients.
FINITE = "finite"


@dataclass(frozen=True)
class BackwardPass:
    """The engine's treatment of the loss of the micro-batch at hand, beyond what the loop does.

    Attributes:
        scale: Factor of the loss before its backward: a loss scale, 1 / accumulated micro-batches.
        index: Micro-batches of this optimizer step before it.
        last: Whether it is the step's last; None where only the loop knows.
    """

    scale: float = 1.0
    index: int = 0
    last: bool | None = None


class Engine(ABC):
    """A model whose gradients are averaged over ranks and held somewhere, as K-FAC sees it.

    Attributes:
        model: The module that the training loop calls.
        module: The bare module; its names identify parameters and blocks.
        sharded: Whether `gradients` are flat slices rather than whole tensors.
        optimizer: The optimizer that the engine drives, if it drives one: its `param_groups` have the learning rates.
    """

    model: nn.Module
    module: nn.Module
    sharded: bool = False
    optimizer: torch.optim.Optimizer | None = None

    @abstractmethod
    def communicator(self, timeout_seconds: float, backend: Backend = Backend.TORCH) -> Communicator:
        """Return a communicator over the ranks that average gradients; collective."""

    def shard_size(self, size: int) -> int:
        """Return how many consecutive ones of `size` ranks together hold each gradient once: 1 if each holds all."""
        return 1

    @abstractmethod
    def layout(self, names: Iterable[str]) -> GradientLayout:
        """Return each rank's slices of these parameters' gradients; the same on every rank.

        Ranks are counted within the `shard_size` consecutive ones.
        """

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Return writable views of the averaged gradients by parameter name: whole, or this rank's flat slices.

        Valid between the last backward of a step and the optimizer's step. Parameters that no rank used are missing,
        and those of which this rank holds nothing.
        """

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters in the precision that the optimizer steps, shaped like `gradients`."""

    def trained(self) -> Iterable[nn.Parameter]:
        """Return the trained parameters as torch holds them on this rank, empty ones included."""
        return (p for p in self.module.parameters() if p.requires_grad)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters by name, trained or not: as long as the model doesn't change, the same objects."""
        return dict(self.module.named_parameters())

    def take_parameters(self) -> bool:
        """Take the model's trained parameters anew, after they have changed.

        Returns:
            Whether the engine can: one whose optimizer has laid out all memory at first goes on with what it has.

        Raises:
            ModelError: It can't hold one of them.
        """
        return False

    def times_written(self, tensors: Iterable[Tensor]) -> int:
        """Return how often some of the `trained` parameters, or their gradients, have been written into together."""
        return times_written(tensors)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The precision in which `gradients` are held."""
        return torch.float32

    @property
    def gradient_scale(self) -> float:
        """The factor that `gradients` carry until the optimizer's step: the loss scale of an engine that has one."""
        return 1.0

    @property
    def stepping(self) -> bool:
        """Whether the optimizer's step comes next, rather than another micro-batch."""
        return True

    def backward_pass(self) -> BackwardPass:
        """Return the engine's treatment of the micro-batch whose forward or backward runs now."""
        return BackwardPass()

    def before_step(self, callback: Callable[[], None]) -> Handle | None:
        """Have `callback` called before each step of the optimizer that the engine drives; None if it drives none."""
        return None

    def own_passes(self, vectors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield vectors that the caller sends back from the model's outputs by itself, no further than to activations.

        Between one vector and the next the engine keeps out of the backward pass: it isn't the loop's.
        """
        return iter(vectors)

    def whole_shapes(self) -> AbstractContextManager[None]:
        """Return a context in which every parameter shows its whole shape, also when its memory is released."""
        return nullcontext()

    def finite_everywhere(self, communicator: Communicator) -> Tensor:
        """Return `finite` of all ranks together, 0-dim bool, the same on each; collective if ranks hold slices.

        Whole gradients are averaged: a value that isn't finite on one rank isn't on any.
        """
        finite = self.finite()
        if not self.sharded:
            return finite
        bad = (~finite).float().view(1)
        communicator.all_reduce(bad, label=FINITE).wait()
        return bad[0] == 0

    def finite(self) -> Tensor:
        """Return a 0-dim bool on the device: whether the averaged gradients that this rank holds are finite."""
        gradients = [grad.coalesce().values() if grad.is_sparse else grad for grad in self.gradients().values()]
        if not gradients:  # torch refuses an empty list
            return torch.tensor(True, device=next(self.module.parameters()).device)
        norms = torch._foreach_norm(gradients)
        return torch.isfinite(torch.stack([norm.float() for norm in norms]).sum())
