"""The field of a two-player game, and its symplectic adjustment (Balduzzi et al. 2018, "The Mechanics of n-Player …").

Player i descends its own loss in its own parameters. Their joint field ξ = (∇₁L₁, ∇₂L₂) is no gradient: its Jacobian
J = S + N has an antisymmetric part N, along which plain descent circles or leaves. The adjusted field ξ + λNᵀξ is still
zero where ξ is, and turns inwards.

Nᵀξ = ½(Jᵀ − J)ξ. The players' own Hessians are symmetric and cancel, so that with ξ held fixed only mixed derivatives
remain, two vector products in all, both by going back twice:

    (Nᵀξ)₁ = ½ ∇₁⟨∇₂(L₂ − L₁), ξ₂⟩        (Nᵀξ)₂ = ½ ∇₂⟨∇₁(L₁ − L₂), ξ₁⟩

On several ranks ξ is averaged first, because both products need that of all samples; then the adjustment is. That is
one collective each, for any number of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# ε of the paper's alignment: how far the field may disagree with an adjustment that counts as neutral.
ALIGNMENT_BIAS = 0.1


class Observer(Protocol):
    """An observer of a player's passes, such as its `KFAC`."""

    def unobserved(self) -> AbstractContextManager[None]:
        """Return a context whose passes it doesn't watch."""


@dataclass(frozen=True)
class GameField:
    """The next point of two players: flat vectors over the first player's parameters, then the second's.

    Attributes:
        field: ξ, averaged over the ranks.
        adjustment: ±λNᵀξ, averaged over the ranks; None without an adjustment.
        parameters: Both players' parameters, in the order of the vectors.
    """

    field: Tensor
    adjustment: Tensor | None
    parameters: tuple[Tensor, ...]

    @property
    def total(self) -> Tensor:
        """ξ + λNᵀξ."""
        return self.field if self.adjustment is None else self.field + self.adjustment

    def deliver(self) -> None:
        """Write ξ + λNᵀξ into the parameters' `.grad`, in place where there is one."""
        pieces = torch.split(self.total, [parameter.numel() for parameter in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(piece.view_as(parameter))


def game_field(
    losses: tuple[Tensor, Tensor],
    parameters: tuple[Sequence[Tensor], Sequence[Tensor]],
    *,
    adjustment: float = 1.0,
    align: bool = False,
    kfacs: tuple[Observer | None, Observer | None] = (None, None),
    average: Callable[[Tensor], None] | None = None,
) -> GameField:
    """Differentiate both players' losses at once; collective.

    Call the models as they are, or in DDP within `no_sync()`: what is averaged is averaged here, and DDP, which waits
    for a `backward` of its own, can't go back twice.

    Args:
        losses: L₁ and L₂ of this rank's samples, attached to graphs that go through both players.
        parameters: Of each player.
        adjustment: λ; 0 leaves ξ as it is, and saves both products.
        align: Choose λ's sign so that the adjustment is drawn to stable fixed points and repelled by others: that of
            `⟨ξ, ∇H⟩⟨Nᵀξ, ∇H⟩/d + ε` with `∇H = Jᵀξ`, the gradient of ½|ξ|² (the paper's Algorithm 1); a third product.
        kfacs: Each player's K-FAC, if it has one. It measures the pass of its own loss and none of the others.
        average: Turns a flat vector into its mean over the ranks, in place; by default over torch.distributed's world.
    """
    average = average_over_ranks if average is None else average
    first, second = (list(player) for player in parameters)
    both = [*first, *second]
    again = adjustment != 0
    gradients = []
    for player, loss in enumerate(losses):
        # This loss's gradient with respect to the other player is needed only for the products.
        wanted = both if again else (first, second)[player]
        with _unobserved(kfacs[1 - player]):
            gradients.append(_gradient(loss, wanted, create_graph=again, keep=player == 0))
    one = gradients[0][: len(first)]
    two = gradients[1][len(first) :] if again else gradients[1]
    field = _flat([*one, *two])
    average(field)
    if not again:
        return GameField(field, None, tuple(both))
    held = [piece.view_as(p) for piece, p in zip(field.split([p.numel() for p in both]), both, strict=True)]
    held_one, held_two = held[: len(first)], held[len(first) :]
    with ExitStack() as stack:
        for kfac in kfacs:
            stack.enter_context(_unobserved(kfac))
        towards_one = _dot(two, held_two) - _dot(gradients[0][len(first) :], held_two)
        towards_two = _dot(one, held_one) - _dot(gradients[1][: len(first)], held_one)
        turned = [*_gradient(towards_one, first, keep=True), *_gradient(towards_two, second, keep=align)]
        products = [_flat(turned) / 2]
        if align:
            products.append(_flat(_gradient(_dot([*one, *two], held), both)))
    vector = torch.cat(products)
    average(vector)
    turn = vector[: field.numel()]
    if align:
        turn = turn * _sign(field, turn, vector[field.numel() :])
    return GameField(field, adjustment * turn, tuple(both))


def average_over_ranks(vector: Tensor) -> None:
    """Replace a vector by its mean over torch.distributed's world, in place; without one it is the mean already."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(vector)
        vector /= dist.get_world_size()


def _sign(field: Tensor, turn: Tensor, slope: Tensor) -> Tensor:
    """Return the aligned sign of λ, on the device: 0-dim, 1 or −1."""
    agreement = torch.dot(field, slope) * torch.dot(turn, slope) / field.numel() + ALIGNMENT_BIAS
    return torch.where(agreement >= 0, 1.0, -1.0).to(field.dtype)


def _gradient(
    scalar: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False, keep: bool = False
) -> list[Tensor]:
    """Return the gradient; zeros for parameters that the scalar doesn't depend on."""
    if not scalar.requires_grad:
        return [torch.zeros_like(parameter) for parameter in parameters]
    found = torch.autograd.grad(
        scalar, list(parameters), create_graph=create_graph, retain_graph=keep or create_graph, allow_unused=True
    )
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _unobserved(kfac: Observer | None) -> AbstractContextManager[None]:
    return nullcontext() if kfac is None else kfac.unobserved()
