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

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_dist.curvature.device_ops import zero_unless
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.engines import Engine
from kfac_dist.preconditioner.measure.sampled_gradients import SampledLabelGradients
from kfac_dist.preconditioner.precondition.uncovered import UncoveredGradients

LABEL = "loss_terms"
LABEL_DRAWN = "drawn gradients"


class DiagonalFisher(UncoveredGradients):
    """Preconditions the gradients of some parameters, in one flat buffer.

    Args:
        engine: The engine, which holds the gradients.
        names: The parameters, the same on every rank; none makes everything here do nothing.
        sampled: Gradients at drawn labels, to measure by; None measures by the averaged gradients.
        decay: β.
        communicator: The ranks that average gradients.
        row: The ranks that together hold each gradient once, if the engine is sharded.
        device: The gradients' device.
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
        super().__init__(engine, names, row=row, device=device, dtype=dtype)
        self.sampled = sampled
        self._decay = decay
        self._communicator = communicator
        self._sum = torch.zeros_like(self.gradient)
        self._weight = torch.zeros((), device=device, dtype=dtype)

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

    def apply(self, damping: float, taken: Tensor | None) -> Tensor:
        """Return the preconditioned `gradient`, a new flat tensor; the plain one before anything was measured."""
        if not self.names:
            return self.gradient
        measured = self._weight > 0
        fisher = self._sum / torch.where(measured, self._weight, 1.0)
        return self.gradient / torch.where(measured, fisher + damping, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """See `UncoveredGradients.state_dict`."""
        return {"weight": self._weight.clone(), "sums": self._gathered(self._sum)}

    def load_state_dict(self, values: Mapping[str, Any] | None) -> None:
        """See `UncoveredGradients.load_state_dict`."""
        sums = {} if values is None else values["sums"]
        reason = "it belongs to another model, or was saved with kfac.curvature.uncovered: plain"
        self._check(sums, "diagonal Fisher", reason)
        if values is not None and self.names:
            self._weight.copy_(values["weight"])
            self._restore(self._sum, sums)
