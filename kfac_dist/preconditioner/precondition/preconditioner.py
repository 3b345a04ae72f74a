"""Gradients to updates: collected, preconditioned group by group as they arrive, and delivered at one length.

gradients = collect(...)                        set out for who preconditions them
updates   = precondition(gradients, damping)    (G ⊗ A + λ)⁻¹∇ for blocks, ∇/(F + λ) for the rest; on their way back
deliver(updates, scale)                         into the gradients' own memory
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kfac_dist.curvature.inverses.offload import Offload
from kfac_dist.curvature.inverses.precondition import Group
from kfac_dist.preconditioner.precondition.diagonal_fisher import DiagonalFisher
from kfac_dist.preconditioner.precondition.transport import Transport

# Changes a group's update in place, and returns numbers about it that add up over groups.
Shape = Callable[[Group, Tensor], Tensor]


@dataclass(frozen=True)
class Updates:
    """Preconditioned gradients, on their way back.

    Attributes:
        gradients: The gradients that they were made of, by parameter name: where they go.
        diagonal: Those of parameters with a diagonal Fisher, flat.
        sums: What `Shape` returned, a group each.
    """

    gradients: dict[str, Tensor]
    diagonal: Tensor
    sums: list[Tensor]


class Preconditioner:
    """Multiplies gradients by the damped inverse Fisher.

    Args:
        transport: Moves gradients to this rank's groups and back.
        diagonal: The diagonal Fisher of parameters without a block.
        offload: Keeps the groups' inverses on the host, if it is asked for.
    """

    def __init__(self, transport: Transport, diagonal: DiagonalFisher, offload: Offload | None) -> None:
        self._transport = transport
        self._diagonal = diagonal
        self._offload = offload

    def collect(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Start to bring gradients, by parameter name, to who preconditions them; returns them."""
        if self._offload is not None:
            self._offload.begin()
        self._transport.collect(gradients)
        self._diagonal.collect(gradients)
        return gradients

    def precondition(self, gradients: dict[str, Tensor], damping: float, shape: Shape | None = None) -> Updates:
        """Return the updates of gradients that were collected; collective where they travel.

        Args:
            gradients: What `collect` returned.
            damping: λ, with the weight decay that is part of the loss.
            shape: Applied to each group's update before it leaves.
        """
        sums: list[Tensor] = []
        for groups in self._transport.arriving():
            updates: list[Tensor] = []
            for group in groups if self._offload is None else self._offload.streamed(groups):
                updates.append(group.apply(damping))
            if shape is not None:
                sums += map(shape, groups, updates)
            self._transport.send(groups, updates)
        return Updates(gradients, self._diagonal.apply(damping), sums)

    def deliver(self, updates: Updates, scale: Tensor | None = None) -> None:
        """Write updates, times a 0-dim factor, over the gradients that they were made of."""
        self._transport.deliver(updates.gradients, scale)
        self._diagonal.deliver(updates.gradients, updates.diagonal, scale)
