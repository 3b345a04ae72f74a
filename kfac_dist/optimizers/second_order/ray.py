"""The loss and its quadratic model along one direction from the current parameters: θ + s·d.

M(s·d) = s·gᵀd + ½ s²·dᵀAd            h(θ + s·d) by a forward pass each, with a weight decay that is part of it
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.optimizers.second_order.batch_loss import BatchLoss

LABEL = "trial losses"


@dataclass(frozen=True)
class Ray:
    """A direction with its agreed numbers.

    Attributes:
        direction: d.
        slope: gᵀd.
        bend: ½ dᵀAd.
        batch: The loss on the batch, without weight decay.
        l2: Coefficient of the weight decay.
        products: θᵀθ, θᵀd and dᵀd.
    """

    direction: Tensor
    slope: float
    bend: float
    batch: BatchLoss
    l2: float
    products: tuple[float, float, float]

    @classmethod
    def along(
        cls, direction: Tensor, gradient: Tensor, value: float, batch: BatchLoss, l2: float, communicator: Communicator
    ) -> Ray:
        """Return a ray; one all-reduce of four numbers, which every rank has computed from equal vectors.

        Args:
            direction: d.
            gradient: g, with the weight decay's share.
            value: M(d).
            batch: The loss on the batch.
            l2: Coefficient of the weight decay that is part of the loss.
            communicator: The ranks.
        """
        point = batch.space.point()
        pairs = ((gradient, direction), (point, point), (point, direction), (direction, direction))
        numbers = torch.stack([torch.dot(a, b) for a, b in pairs]) / communicator.size
        communicator.all_reduce(numbers, label=LABEL).wait()
        slope, *products = numbers.tolist()
        return cls(direction, slope, value - slope, batch, l2, (products[0], products[1], products[2]))

    def model(self, scale: float) -> float:
        """Return M(s·d)."""
        return scale * self.slope + scale**2 * self.bend

    def loss(self, scale: float) -> float:
        """Return h(θ + s·d)."""
        here, mixed, there = self.products
        offset = None if scale == 0 else scale * self.direction
        return float(self.batch.value(offset)) + self.l2 / 2 * (here + 2 * scale * mixed + scale**2 * there)
