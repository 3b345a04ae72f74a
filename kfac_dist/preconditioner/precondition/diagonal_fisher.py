"""A diagonal Fisher for parameters without a block: positions as bare parameters, learned scales, recurrent layers.

    S ← βS + (1−β)·n·ḡ²,   w ← βw + (1−β)        ḡ: the gradient of the mean loss, n: its terms on all ranks
    Δ = ḡ / (S/w + λ)

A batch's gradient is a mean of n terms' gradients of (nearly) zero mean, so that E[n ḡ²] is the diagonal of the Fisher,
in the unit of every block's: λ means the same. It is estimated from the gradient averaged over ranks, so nothing
but n is sent; where gradients are sharded, each rank has the diagonal of its own slices. That is the empirical Fisher,
with the data's labels, and assumes a mean of zero, which is true of the Fisher and of gradients near a minimum.

With labels drawn from the model (`uncovered: diagonal_mc`), ḡ is the mean of the drawn labels' gradients, whose mean is
exactly zero: E[n ḡ²] is the Fisher's diagonal I, Î1 of Soen & Sun (2024) with one square a batch. By a batch's square
alone its relative standard deviation is near √2 for any n, as a sum of many terms is near normal; the running
average of β divides it by √((1 + β)/(1 − β)).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_dist.curvature.device_ops import zero_unless
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.movement.slices import gather_slices
from kfac_dist.engines import Engine
from kfac_dist.errors import CheckpointError
from kfac_dist.preconditioner.measure.sampled_gradients import SampledLabelGradients

LABEL = "loss_terms"
LABEL_DRAWN = "drawn gradients"
LABEL_STATE = "checkpoint"


class DiagonalFisher:
    """Preconditions the gradients of some parameters, in one flat buffer.

    Args:
        engine: Where the gradients are.
        names: The parameters, the same on every rank; none makes everything here do nothing.
        sampled: Gradients at drawn labels, to measure by; None measures by the averaged gradients.
        decay: β.
        communicator: The ranks that average gradients.
        row: The ranks that together hold each gradient once, if the engine is sharded.
        device: Where the gradients live.
        dtype: Precision of the average.
    """

    def __init__(
        self,
        engine: Engine,
        names: Sequence[str],
        *,
        sampled: SampledLabelGradients | None = None,
        decay: float,
        communicator: Communicator,
        row: Communicator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.names = tuple(names)
        self.sampled = sampled
        self._engine = engine
        self._decay = decay
        self._communicator = communicator
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
        self._sum = torch.zeros(sum(piece.numel for piece in self._pieces.values()), device=device, dtype=dtype)
        self._weight = torch.zeros((), device=device, dtype=dtype)
        self.gradient = torch.zeros_like(self._sum)

    def measure(self, terms: float | Tensor, taken: Tensor) -> None:
        """Move the average by this step's gradients; one small sum over the ranks.

        Args:
            terms: Loss terms this rank averages over; 0 if it had no data.
            taken: 0-dim bool: whether the optimizer takes this step. If not, the average stays.
        """
        if not self.names:
            return
        new, known = self._by_average(terms) if self.sampled is None else self._by_sampled(self.sampled.total)
        known = known & taken
        zero_unless(known, new)
        rate = (1 - self._decay) * known.to(self._weight.dtype)
        self._sum.lerp_(new, rate)
        self._weight.lerp_(torch.ones_like(rate), rate)

    def _by_average(self, terms: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return n ḡ² of the averaged gradients, and whether there were terms."""
        total = torch.ones_like(self._weight) * terms
        self._communicator.all_reduce(total, label=LABEL).wait()
        self.collect(self._engine.gradients())
        return self.gradient.square() * (total / self._engine.gradient_scale**2), total > 0

    def _by_sampled(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """Return n ḡ² of the drawn labels' gradients, and whether there were terms and all is finite."""
        self._communicator.all_reduce(total, label=LABEL_DRAWN).wait()
        terms = total[-1]
        new = total[:-1].square() / terms.clamp(min=1)
        # A step that is taken may still have overflowed here: these gradients are sums, not means.
        return new, (terms > 0) & torch.isfinite(new).all()

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

    def apply(self, damping: float) -> Tensor:
        """Return the preconditioned `gradient`, a new flat tensor; the plain one before anything was measured."""
        if not self.names:
            return self.gradient
        measured = self._weight > 0
        fisher = self._sum / torch.where(measured, self._weight, 1.0)
        return self.gradient / torch.where(measured, fisher + damping, 1.0)

    @property
    def counted(self) -> bool:
        """Whether a sum over a row counts this rank's values: whole gradients count once, slices all."""
        return bool(self.names) and (self._row.rank == 0 or self._engine.sharded)

    def deliver(self, gradients: dict[str, Tensor], update: Tensor, scale: Tensor | None) -> None:
        """Write a preconditioned gradient, times a 0-dim factor, over the gradients that were collected."""
        if not self.names:
            return
        update = update if scale is None else update * scale
        views = self._views(update)
        found = [name for name in self._pieces if name in gradients]
        if found:
            torch._foreach_copy_([gradients[name] for name in found], [views[name] for name in found])

    def state_dict(self) -> dict[str, Any]:
        """Return the average by parameter name, whole and the same on every rank; collective where it is sharded."""
        views = self._views(self._sum)
        sums = gather_slices(
            self._row, self._layout, views, device=self._sum.device, dtype=self._sum.dtype, label=LABEL_STATE
        )
        return {"weight": self._weight.clone(), "sums": sums}

    def load_state_dict(self, values: dict[str, Any] | None) -> None:
        """Load the result of `state_dict`.

        Raises:
            CheckpointError: It has no average for one of the parameters, or one of another shape.
        """
        sums = {} if values is None else values["sums"]
        for name in self.names:
            shape = self._layout[name].shape
            if name not in sums or tuple(sums[name].shape) != shape:
                raise CheckpointError(
                    f"the K-FAC state has no diagonal Fisher of shape {list(shape)} for {name!r}: it belongs to "
                    "another model, or was saved with kfac.curvature.uncovered: plain"
                )
        if values is not None and self.names:
            self._weight.copy_(values["weight"])
            for name, view in self._views(self._sum).items():
                piece = self._pieces[name]
                view.copy_(sums[name].flatten()[piece.start : piece.stop].view_as(view))

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        parts = torch.split(flat, [piece.numel for piece in self._pieces.values()]) if self._pieces else ()
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
