"""From sums by class to one Kronecker product a block, at a refresh.

    owner of A    ⟨A_c, A_d⟩, tr A_c ─┐ one small all-reduce of the column,      ┌─▶ α, then A = Σ α_c A_c
                                      ├─ however many blocks there are ──────────┤
    owner of G    ⟨G_c, G_d⟩, tr G_c ─┘ the same C×C iteration on every rank     └─▶ β, then G = Σ β_c G_c

A factor itself is only added up where it is solved, and for no longer than that takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.curvature.class_conditional import Summary, nearest, summarize
from kfac_dist.curvature.factors import Side, Unit
from kfac_dist.curvature.statistics import RunningAverages
from kfac_dist.distributed.communicators.base import Communicator

LABEL = "classes"
# By precision of the sums: when the iteration has come as near as they let it.
_SETTLED = {torch.float32: 1e-7, torch.float64: 1e-14}


@dataclass(frozen=True)
class Combined:
    """Combination of a unit's sums by class to one factor.

    Attributes:
        coefficients: `[C, batch]`: the factor is the sum of the classes' sums, times these.
        trace: Of all matrices of the factor; None if no class was measured.
    """

    coefficients: Tensor
    trace: float | None


def combine(
    units: Sequence[Unit], own: Sequence[Unit], averages: RunningAverages, totals: Tensor, column: Communicator
) -> dict[str, Combined]:
    """Combine the classes of those units that keep them apart; collective over the column if there are any.

    Args:
        units: Whole blocks, in the same order on every rank of the column.
        own: Those of them that this rank inverts, whose sums it has.
        averages: The sums.
        totals: `[2 + C, units]`: from the third row on, weights by class over all ranks.
        column: The ranks among which the blocks' owners are.

    Returns:
        The units by name.
    """
    units = [unit for unit in units if unit.classes]
    if not units:
        return {}
    weights = {unit.name: totals[2 : 2 + unit.classes, averages.layout.index(unit)] for unit in units}
    summaries = _exchange(units, {unit.name for unit in own}, averages, weights, column)
    host = totals.double().cpu()
    weights = {unit.name: host[2 : 2 + unit.classes, averages.layout.index(unit)] for unit in units}
    found: dict[str, Combined] = {}
    for _, members in itertools.groupby(units, key=lambda unit: unit.block):
        found |= _combine_block(list(members), summaries, weights, _SETTLED[averages.working])
    return found


def _exchange(
    units: Sequence[Unit], own: set[str], averages: RunningAverages, weights: dict[str, Tensor], column: Communicator
) -> dict[str, Summary]:
    sizes = [Summary.numel(unit.batch, unit.classes) for unit in units]
    message = torch.zeros(sum(sizes), device=averages.device, dtype=averages.working)
    for unit, place in zip(units, message.split(sizes), strict=True):
        if unit.name in own:
            sums = averages.sums(unit).unflatten(0, (unit.classes, unit.batch))
            place.copy_(summarize(sums, weights[unit.name]).flat())
    if column.size > 1:
        column.all_reduce(message, label=LABEL).wait()
    parts = message.double().cpu().split(sizes)
    return {u.name: Summary.of_flat(part, u.batch, u.classes) for u, part in zip(units, parts, strict=True)}


def _combine_block(
    units: list[Unit], summaries: dict[str, Summary], weights: dict[str, Tensor], tolerance: float
) -> dict[str, Combined]:
    sides = {side: [unit for unit in units if unit.side is side] for side in (Side.A, Side.G)}
    # A factor that was cut is block-diagonal: its inner products are the sums of its pieces'.
    products = {side: torch.stack([summaries[u.name].products for u in own]).sum(0) for side, own in sides.items()}
    terms = weights[sides[Side.G][0].name]
    measured = bool((terms > 0).any()) and bool((weights[sides[Side.A][0].name] > 0).any())
    frequencies = terms / terms.sum() if measured else torch.zeros_like(terms)
    coefficients = dict(zip(sides, nearest(products[Side.A], products[Side.G], frequencies, tolerance), strict=True))
    found = {}
    for unit in units:
        scale, own = coefficients[unit.side], weights[unit.name]
        trace = float((scale * summaries[unit.name].traces).sum()) if measured else None
        found[unit.name] = Combined((scale / own.clamp(min=torch.finfo(own.dtype).tiny) * (own > 0)).mT, trace)
    return found
