"""Gradients of parameters without a block: gathered where they lie, in one flat buffer, changed, and written back.

Nothing of them travels. Where gradients are sharded, each rank has its own slices; else every rank has all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.movement.slices import gather_slices
from kfac_dist.engines import Engine
from kfac_dist.errors import CheckpointError
from kfac_dist.preconditioner.measure.sampled_gradients import SampledLabelGradients

LABEL_STATE = "checkpoint"


class UncoveredGradients:
    """The gradients of some parameters, which subclasses change.

    Args:
        engine: The engine, which holds the gradients.
        names: The parameters, the same on every rank; none makes everything here do nothing.
        row: The ranks that together hold each gradient once, if the engine is sharded.
        device: The gradients' device.
        dtype: Precision of what is kept.

    Attributes:
        names: The parameters.
        gradient: Their gradients, flat, as collected last.
        sampled: Gradients at drawn labels, if they are measured by those.
        key: Of its state in a checkpoint.
        stateful: Whether `apply` changes the state, so that it must know whether the step is taken.
    """

    key: ClassVar[str] = "diagonal"
    stateful: ClassVar[bool] = False

    def __init__(
        self, engine: Engine, names: Sequence[str], *, row: Communicator, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.names = tuple(names)
        self.sampled: SampledLabelGradients | None = None
        self._engine = engine
        self._row = row
        self._layout = engine.layout(self.names)
        self._pieces = {
            name: piece
            for name in self.names
            if (piece := self._layout[name].held_by(row.rank if engine.sharded else 0)) is not None
        }
        self._shapes = {
            name: (piece.numel,) if engine.sharded else self._layout[name].shape for name, piece in self._pieces.items()
        }
        numel = sum(piece.numel for piece in self._pieces.values())
        self.gradient = torch.zeros(numel, device=device, dtype=dtype)

    def measure(self, terms: float | Tensor, taken: Tensor) -> None:
        """Move what is measured by this step's gradients.

        Args:
            terms: Loss terms this rank averages over; 0 if it had no data.
            taken: 0-dim bool: whether the optimizer takes this step. If not, everything stays.
        """

    def collect(self, gradients: dict[str, Tensor]) -> None:
        """Fill `gradient` with the parameters' gradients, zero where there is none: no rank used the parameter."""
        if not self.names:
            return
        found = [name for name in self._pieces if name in gradients]
        if len(found) < len(self._pieces):
            self.gradient.zero_()
        if found:
            views = self._views(self.gradient)
            torch._foreach_copy_([views[name] for name in found], [gradients[name] for name in found])

    def apply(self, damping: float, taken: Tensor | None) -> Tensor:
        """Return what becomes of `gradient`, flat; here it stays.

        Args:
            damping: λ, with the weight decay that is part of the loss.
            taken: 0-dim bool: whether the optimizer takes this step, where `stateful`.
        """
        return self.gradient

    @property
    def counted(self) -> bool:
        """Whether a sum over a row counts this rank's values: whole gradients count once, slices all."""
        return bool(self.names) and (self._row.rank == 0 or self._engine.sharded)

    def deliver(self, gradients: dict[str, Tensor], update: Tensor, scale: Tensor | None) -> None:
        """Write a changed gradient, times a 0-dim factor, over the gradients that were collected."""
        if not self.names:
            return
        update = update if scale is None else update * scale
        views = self._views(update)
        found = [name for name in self._pieces if name in gradients]
        if found:
            torch._foreach_copy_([gradients[name] for name in found], [views[name] for name in found])

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept by parameter name, whole and the same on every rank; collective where it is sharded."""
        return {}

    def load_state_dict(self, values: Mapping[str, Any] | None) -> None:
        """Take what `state_dict` returned.

        Raises:
            CheckpointError: It lacks one of the parameters, or has another shape of it.
        """

    def _gathered(self, flat: Tensor) -> dict[str, Tensor]:
        """Return a flat buffer's values by parameter, whole on every rank; collective where it is sharded."""
        return gather_slices(
            self._row, self._layout, self._views(flat), device=flat.device, dtype=flat.dtype, label=LABEL_STATE
        )

    def _check(self, values: Mapping[str, Tensor], what: str, reason: str) -> None:
        """Refuse a state that lacks a parameter's values.

        Raises:
            CheckpointError: For the first one, saying what is missing and why it may be.
        """
        for name in self.names:
            shape = self._layout[name].shape
            if name not in values or tuple(values[name].shape) != shape:
                raise CheckpointError(f"the K-FAC state has no {what} of shape {list(shape)} for {name!r}: {reason}")

    def _restore(self, flat: Tensor, values: Mapping[str, Tensor]) -> None:
        """Fill a flat buffer with this rank's part of whole values."""
        for name, view in self._views(flat).items():
            piece = self._pieces[name]
            view.copy_(values[name].flatten()[piece.start : piece.stop].view_as(view))

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        parts = torch.split(flat, [piece.numel for piece in self._pieces.values()]) if self._pieces else ()
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
