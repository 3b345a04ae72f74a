"""The noise of a gradient's elements: the relative variance η² = s/m², summed over one parameter's elements.

An optimizer that averages gradients and their squares with one β (`svag`, `msvag`, `adamw` with equal betas) knows it
without measuring anything more. η² far above 1 says that a step follows noise; Adam and the variance-adapted methods
shorten those steps. A tally (a histogram over log10 η² and a sum) adds up over ranks that hold parts of a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfac_dist.optimizers.dissected import gradient_variance

DECADES, BINS_PER_DECADE = 6, 20  # from 10⁻⁶ to 10⁶: beyond, an element counts as of the limit
BINS = 2 * DECADES * BINS_PER_DECADE
TALLY = BINS + 1


@dataclass(frozen=True)
class RelativeVariance:
    """η² of one parameter's elements.

    Attributes:
        median: Half of the elements have less; to a twentieth of a decade.
        mean: Over the elements, of which none counts more than 10⁶: noise alone has no bound.
        noisy: Share of the elements with η² > 1.
    """

    median: float
    mean: float
    noisy: float

    @classmethod
    def of(cls, tally: Tensor) -> RelativeVariance | None:
        """Sum up a tally; None if no element has had a gradient yet."""
        counts = tally[:BINS]
        total = float(counts.sum())
        if not total:
            return None
        middle = int((counts.cumsum(0) >= total / 2).nonzero()[0])
        return cls(
            median=10.0 ** ((middle + 0.5) / BINS_PER_DECADE - DECADES),
            mean=float(tally[BINS]) / total,
            noisy=float(counts[BINS // 2 :].sum()) / total,
        )


def shared_beta(options: Mapping[str, Any]) -> float | None:
    """Return the β of both averages of a parameter group; None if they have two, or there are none."""
    beta, betas = options.get("beta"), options.get("betas")
    if beta is None and betas is not None and betas[0] == betas[1]:
        beta = betas[0]
    return beta


def tally_of(mean: Tensor, square: Tensor, beta: float, steps: int) -> Tensor:
    """Return the tally of some elements, `[TALLY]` in float64 on their device.

    Args:
        mean: m̃ of these elements.
        square: ṽ of these elements.
        beta: Of both.
        steps: Updates of both until now; at least 1.
    """
    squared_mean, variance = gradient_variance(mean.double(), square.double(), beta, steps - 1)
    known = squared_mean + variance > 0
    ratio = (variance / squared_mean)[known].clamp(10.0**-DECADES, 10.0**DECADES)
    places = ((ratio.log10() + DECADES) * BINS_PER_DECADE).long().clamp(max=BINS - 1)
    return torch.cat([torch.bincount(places, minlength=BINS).double(), ratio.sum().view(1)])
