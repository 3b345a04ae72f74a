"""The one question that an engine answers: which slices of which parameter's gradient does this rank hold?

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
from typing import Protocol

import torch
from torch import Tensor, nn

from kfac_dist.compat.torch import times_written
from kfac_dist.config.schema import Backend
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.movement.gradient_layout import GradientLayout
from kfac_dist.engines.local_shards import Holding, holdings_of

# What the traffic counts the ranks' vote on their gradients as.
FINITE = "finite"


@dataclass(frozen=True)
class BackwardPass:
    """What an engine does to the loss of the micro-batch at hand, beyond what the loop does.

    Attributes:
        scale: What it multiplies the loss by before its backward: a loss scale, 1 / accumulated micro-batches.
        index: Micro-batches of this optimizer step before it.
        last: Whether it is the step's last; None where only the loop knows.
    """

    scale: float = 1.0
    index: int = 0
    last: bool | None = None


class Handle(Protocol):
    """What takes a callback off."""

    def remove(self) -> None:
        """Take it off."""


class Engine(ABC):
    """A model whose gradients are averaged over ranks and held somewhere.

    Attributes:
        model: What the training loop calls.
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
        """Return who holds which slices of these parameters' gradients; the same on every rank.

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
        """Return what the engine does to the micro-batch whose forward or backward runs now."""
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
        """Return a context in which every parameter shows its whole shape, whatever its memory holds."""
        return nullcontext()

    @abstractmethod
    def synchronize(self, enabled: bool) -> AbstractContextManager[None]:
        """Return a context for one micro-batch's forward and backward; only the last of a step averages gradients."""

    def averaging_bytes(self, size: int) -> int:
        """Return how many bytes one of `size` ranks sends as a step's gradients are averaged; 0 if nobody knows."""
        return 0

    def prepared(self, inputs: Tensor) -> Tensor:
        """Return a model's inputs in the precision that it computes in, where it doesn't see to that by itself."""
        return inputs

    def backward(self, loss: Tensor) -> None:
        """Backpropagate a micro-batch's loss, which is divided already by all that it should be divided by."""
        loss.backward()

    def take_step(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        """Clip the norm of all gradients together, step the optimizer and forget the gradients.

        Args:
            optimizer: The optimizer that was built for this engine.
            max_norm: Norm to which the gradient that the optimizer sees is clipped; None leaves it.
        """
        if max_norm is not None:
            trained = [p for p in self.module.parameters() if p.requires_grad]
            torch.nn.utils.clip_grad_norm_(trained, max_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    def unused(self) -> list[str]:
        """Return the trained parameters that the last backward left out, if other ranks then wait for them."""
        return []

    def holdings(self) -> list[Holding]:
        """Return what this rank holds of all parameters, between steps, for a checkpoint."""
        return list(holdings_of(self.module.named_parameters()))

    def restored(self) -> None:  # noqa: B027  most engines compute with what `holdings` views
        """Take up weights that were written into `holdings`; collective."""

    def counters(self) -> dict[str, Tensor]:
        """Return what the engine itself counts, such as a loss scale; the same on every rank."""
        return {}

    def load_counters(self, values: dict[str, Tensor]) -> None:  # noqa: B027
        """Take `counters` of an engine of this kind."""

    def close(self) -> None:  # noqa: B027  most engines leave nothing behind
        """Let go of the model; called once no step is taken any more, also after a failure."""

    def settle(self, backward: Callable[[], None]) -> None:  # noqa: B027  most engines need none
        """Run a backward pass whose results are thrown away, if the engine needs one before its first step.

        Some engines arrange their communication by the first backward that they see. Where that changes the order in
        which ranks are summed, a resumed run would round differently from one that never stopped. Call this before
        K-FAC is attached and before a checkpoint is loaded; collective.
        """

    def finite_everywhere(self, communicator: Communicator) -> Tensor:
        """Return `finite` of all ranks together, 0-dim bool, the same on each; collective if ranks hold slices.

        Whole gradients are averaged: what isn't finite on one rank isn't on any.
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
