"""An engine as a training loop drives it: forward and backward, the optimizer's step, checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from kfac_dist.engines.base import Engine
from kfac_dist.engines.local_shards import LocalShard, holdings_of


class TrainingEngine(Engine):
    """A model that a loop trains; see `Engine` for its part in K-FAC."""

    @abstractmethod
    def synchronize(self, enabled: bool) -> AbstractContextManager[None]:
        """Return a context for one micro-batch's forward and backward; only the last of a step averages gradients."""

    def averaging_bytes(self, size: int) -> int:
        """Return how many bytes one of `size` ranks sends as a step's gradients are averaged; 0 if unknown."""
        return 0

    def prepared(self, inputs: Tensor) -> Tensor:
        """Return a model's inputs in the precision that it computes in, if it doesn't cast them itself."""
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

    def holdings(self) -> list[LocalShard]:
        """Return this rank's parts of all parameters, between steps, for a checkpoint."""
        return list(holdings_of(self.module.named_parameters()))

    def restored(self) -> None:
        """Take up weights that were written into `holdings`; collective."""

    def counters(self) -> dict[str, Tensor]:
        """Return the engine's own counters, such as a loss scale; the same on every rank."""
        return {}

    def load_counters(self, values: dict[str, Tensor]) -> None:
        """Take `counters` of an engine of this kind."""

    def close(self) -> None:
        """Let go of the model; called once no step is taken any more, also after a failure."""

    def settle(self, backward: Callable[[], None]) -> None:
        """Run a backward pass whose results are thrown away, if the engine needs one before its first step.

        Some engines arrange their communication by the first backward that they see. Where that changes the order in
        which ranks are summed, a resumed run would round differently from one that never stopped. Call this before
        K-FAC is attached and before a checkpoint is loaded; collective.
        """
