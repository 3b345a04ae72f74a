"""Powers of a layer's factors around its matrix: `G^(−q) M A^(−p)`, with roots of damped eigenvalues.

    d ← (d + ε d̄)^(−p) / mean        d̄: the mean of the factor's eigenvalues; the roots' mean is 1

A side whose power is 0, or whose factor hasn't been solved yet, stays as it is.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kfac_dist.curvature.factors import Side
from kfac_dist.curvature.inverses.precondition import EigenGroup
from kfac_dist.preconditioner.precondition.transforms.base import Stack, Stage, State, Transform


class Whitening(Transform):
    """Multiplies matrices by powers of their factors, from the eigenbases that the solver `eigen` keeps.

    Args:
        power_a: p.
        power_g: q.
        damping: ε.
    """

    stage = Stage.DIRECTION

    def __init__(self, power_a: float, power_g: float, damping: float) -> None:
        self._powers = {side: power for side, power in ((Side.A, power_a), (Side.G, power_g)) if power}
        self._damping = damping

    def apply(self, update: Tensor, stack: Stack, state: State) -> Tensor:
        """See `Transform.apply`."""
        assert isinstance(stack.group, EigenGroup)  # the configuration's solver
        roots = {side: partial(inverse_power, power=p, damping=self._damping) for side, p in self._powers.items()}
        return stack.group.multiply(update, roots)


def inverse_power(values: Tensor, power: float, damping: float) -> Tensor:
    """Return `(d + ε d̄)^(−p)` with a mean of 1, for eigenvalues `[k, n]`; 1 where a factor isn't known, or is zero.

    Args:
        values: d; negative in all of a row that isn't known.
        power: p.
        damping: ε.
    """
    mean = values.mean(1, keepdim=True)
    roots = (values / mean + damping).clamp(min=damping) ** -power
    return torch.where(mean > 0, roots / roots.mean(1, keepdim=True), 1.0)
