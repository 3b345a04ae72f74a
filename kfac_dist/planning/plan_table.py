"""Tables of the plan: a row per block, a row per rank, and parameters without a block; or a summary of ten lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby

from rich import box
from rich.console import Group
from rich.table import Table

from kfac_dist.config.schema import Uncovered
from kfac_dist.curvature.factors import FactorKind, Unit
from kfac_dist.planning.memory_options import Saving
from kfac_dist.preconditioner.memory import RankBytes
from kfac_dist.preconditioner.plan import BlockPlan, Plan

_TREATMENTS = {
    Uncovered.PLAIN: "Plain gradient",
    Uncovered.DIAGONAL: "Diagonal Fisher",
    Uncovered.DIAGONAL_MC: "Diagonal Fisher",
}
_OPTIONS = (
    "Options that spare memory, all else as configured; bytes that the fullest rank keeps, and that measuring copies:"
)
_UNKNOWN = "—"
# A plan that a terminal shows whole.
_FEW_BLOCKS, _FEW_RANKS = 12, 8
# Kinds of blocks that a summary names.
_KINDS = 4


def plan_view(
    plan: Plan,
    kept: Sequence[RankBytes],
    uncovered: Mapping[str, str],
    treatment: Uncovered = Uncovered.PLAIN,
    options: Sequence[Saving] = (),
) -> Group:
    """Return the plan's tables, ready for rich to print.

    Args:
        plan: The plan.
        kept: Bytes that each rank keeps.
        uncovered: Parameters without a block, and why they have none.
        treatment: Treatment of their gradients.
        options: Effects of options that save memory.
    """
    parts: list[Table | str] = [_block_table(plan), "", _rank_table(plan, kept), "", _counts(plan)]
    if options:
        parts += ["", _OPTIONS, "", _option_table(options)]
    if uncovered:
        parts += ["", f"{_TREATMENTS[treatment]} for {len(uncovered)} parameters:"]
        parts += [f"  {name}: {reason}" for name, reason in uncovered.items()]
    return Group(*parts)


def is_small(plan: Plan) -> bool:
    """Whether a plan's tables fit a terminal."""
    return len(plan.blocks) <= _FEW_BLOCKS and plan.grid.world_size <= _FEW_RANKS


def plan_summary(
    plan: Plan,
    kept: Sequence[RankBytes],
    uncovered: Mapping[str, str],
    treatment: Uncovered = Uncovered.PLAIN,
    options: Sequence[Saving] = (),
) -> list[str]:
    """Return a summary of a plan in about ten lines; see `plan_view`."""
    lines = [_counts(plan), *_extremes(plan, kept), *_largest(plan)]
    sparing = [option for option in options if not option.active and option.device]
    if sparing:
        most = max(sparing, key=lambda option: option.device or 0)
        lines.append(f"Spares most memory: {most.option}, {most.device:,} bytes on the fullest rank")
    if uncovered:
        names = ", ".join(list(uncovered)[:3])
        more = ", …" if len(uncovered) > 3 else ""
        lines.append(f"{_TREATMENTS[treatment]} for {len(uncovered)} of the parameters: {names}{more}")
    return [*lines, "Every block, every rank and every option: --all"]


def _counts(plan: Plan) -> str:
    return (
        f"{len(plan.blocks)} blocks, {len(plan.units)} units, {plan.grid.world_size} ranks. "
        f"Inversion load, largest over mean: {plan.assignment.imbalance():.2f}"
    )


def _extremes(plan: Plan, kept: Sequence[RankBytes]) -> list[str]:
    """Return which ranks have most to do and to keep."""
    loads = plan.assignment.load()
    busiest = max(range(len(loads)), key=lambda rank: loads[rank])
    idle = sum(not load for load in loads)
    fullest = max(range(len(kept)), key=lambda rank: kept[rank].total)
    most = kept[fullest]
    mean = sum(own.total for own in kept) / len(kept)
    parts = f"factors {most.factors:,}, inverses {most.inverses:,}, gradients {most.gradients:,}"
    return [
        f"Inverts most: rank {busiest}, {len(plan.owned(busiest))} units, {loads[busiest]:.2e} n³; "
        f"{idle or 'no'} ranks have nothing to invert",
        f"Keeps most: rank {fullest}, {most.total:,} bytes ({parts}); the mean is {mean:,.0f}",
    ]


def _largest(plan: Plan) -> list[str]:
    """Return the blocks that cost most to invert; blocks that differ by a number in their names together."""
    kinds: dict[tuple[str, str], list[BlockPlan]] = {}
    for block in plan.blocks.values():
        kinds.setdefault((re.sub(r"\d+", "*", block.name), _factors(block)), []).append(block)
    ordered = sorted(kinds.items(), key=lambda kind: -sum(block.inversion_cost for block in kind[1]))
    lines = []
    for (_, factors), blocks in ordered[:_KINDS]:
        names = blocks[0].name if len(blocks) == 1 else f"{blocks[0].name} … {blocks[-1].name}, {len(blocks)} blocks"
        each = "" if len(blocks) == 1 else " each"
        lines.append(f"  {names}: {factors}, {blocks[0].factor_bytes:,} bytes, {blocks[0].inversion_cost:.2e} n³{each}")
    others = sum(len(blocks) for _, blocks in ordered[_KINDS:])
    return ["Largest blocks:", *lines, *([f"  {others} others invert less"] if others else [])]


def _factors(block: BlockPlan) -> str:
    return " ".join(_factor(list(units)) for _, units in groupby(block.units, key=lambda unit: unit.side))


def _block_table(plan: Plan) -> Table:
    measured = any(block.moments is not None for block in plan.blocks.values())
    headings = ("factors", "owners", "preconditioned by", "slot", "factor bytes", "inversion n³")
    table = _table("block", *headings, *(("moment bytes",) if measured else ()))
    for block in plan.blocks.values():
        workers = plan.assignment.workers(block.name)
        table.add_row(
            block.name,
            _factors(block),
            " ".join(str(owner) for owner in block.owners),
            "all ranks" if len(workers) == plan.grid.world_size else " ".join(map(str, workers)),
            str(block.slot),
            f"{block.factor_bytes:,}",
            f"{block.inversion_cost:.2e}",
            *([_moments(block)] if measured else []),
        )
    return table


def _moments(block: BlockPlan) -> str:
    """Bytes of EKFAC's second moments, and the rank that has them if they are reduced to owners."""
    return "eigenvalues" if block.moments is None else f"{block.moments_bytes:,} on {block.moments_owner}"


def _rank_table(plan: Plan, kept: Sequence[RankBytes]) -> Table:
    table = _table("rank", "units", "inversion n³", "bytes kept", "factors", "inverses", "gradients", "on the host")
    loads = plan.assignment.load()
    for rank, own in enumerate(kept):
        sizes = (own.total, own.factors, own.inverses, own.gradients, own.host)
        table.add_row(str(rank), str(len(plan.owned(rank))), f"{loads[rank]:.2e}", *(f"{size:,}" for size in sizes))
    return table


def _option_table(options: Sequence[Saving]) -> Table:
    table = _table("option", "is", "without", "with", "saved", "copies spared", "to the host")
    for option in options:
        state = "required by the engine" if option.required else "on" if option.active else "off"
        before, saved = (None, None) if option.without is None else (option.without.total, option.device)
        sizes = (before, option.having.total, saved, option.copies, option.having.host)
        table.add_row(option.option, state, *(_UNKNOWN if size is None else f"{size:,}" for size in sizes))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _runs(numbers: Sequence[int]) -> list[str]:
    """Write numbers that follow each other unchanged as one: 4·64."""
    counted = [(number, len(list(own))) for number, own in groupby(numbers)]
    return [f"{count}·{number}" if count > 1 else str(number) for number, count in counted]


def _factor(units: list[Unit]) -> str:
    """One factor: its side, `diag`, the number of matrices if several, and the sizes that it is cut into.

    `12·64` is twelve units of size 64, of which each may have another owner; `12×64` one unit of twelve matrices.
    """
    first = units[0]
    sizes = "+".join(_runs([unit.dim for unit in units]))
    kind = "diag " if first.kind is FactorKind.DIAGONAL else ""
    batch = f"{first.batch}×" if first.batch > 1 else ""
    return f"{first.side} {kind}{batch}{sizes}"
