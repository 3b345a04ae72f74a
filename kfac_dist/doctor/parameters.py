"""One row a parameter: which block measures it, or why none does."""

from __future__ import annotations

from itertools import groupby

from torch import nn

from kfac_dist.config.schema import Uncovered
from kfac_dist.curvature.blocks import Coverage
from kfac_dist.curvature.blocks.find_blocks import FROZEN
from kfac_dist.curvature.factors import FactorKind, Unit
from kfac_dist.doctor.findings import Finding, ParameterRow, Severity
from kfac_dist.preconditioner.plan import BlockPlan, Plan

# Its diagonal Fisher is kept in fp32.
FLOAT_BYTES = 4


def parameter_rows(
    model: nn.Module, coverage: Coverage, plan: Plan | None, uncovered: Uncovered
) -> tuple[ParameterRow, ...]:
    """Return the rows in the model's order.

    Args:
        model: The bare model.
        coverage: Its blocks.
        plan: Owners of the blocks; None if there are no blocks.
        uncovered: Treatment of parameters without a block.
    """
    owners = {name: block for block in coverage.blocks for name in block.parameters}
    shown: set[str] = set()
    rows = []
    for name, parameter in model.named_parameters():
        row = ParameterRow(name, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
        block = owners.get(name)
        if block is None or plan is None:
            reason = coverage.uncovered.get(name, "no block covers it")
            # Without a plan there is no K-FAC, and nothing happens to anything.
            said = {} if reason == FROZEN or plan is None else _without_block(reason, uncovered, parameter)
            rows.append(_replace(row, **{"reason": reason, **said}))
            continue
        kind = type(block).__name__.removesuffix("Block")
        rows.append(_replace(row, block=block.name, kind=kind, **_costs(plan.blocks[block.name], shown)))
    return tuple(rows)


def coverage_finding(rows: tuple[ParameterRow, ...], uncovered: Uncovered) -> Finding:
    """Describe the share of the model that is preconditioned, and the treatment of the rest."""
    sizes = {row.name: _numel(row) for row in rows}
    covered = sum(sizes[row.name] for row in rows if row.block is not None)
    trained = sum(sizes[row.name] for row in rows if row.reason != FROZEN)
    blocks = len({row.block for row in rows if row.block is not None})
    share = covered / max(trained, 1)
    percent = "all" if covered == trained else f"{100 * share:.3g} %"
    text = f"{blocks} blocks precondition {percent} of {trained:,} trained values"
    if covered == trained:
        return Finding("coverage", Severity.FINE, text)
    if uncovered is not Uncovered.PLAIN:
        text += f"; the others are divided by a diagonal Fisher (kfac.curvature.uncovered: {uncovered})"
        return Finding("coverage", Severity.FINE, text)
    text += "; the others keep their plain gradient, see their rows"
    if share >= 0.5:
        return Finding("coverage", Severity.FINE, text)
    return Finding(
        "coverage", Severity.WARNING, f"{text}, or have a diagonal Fisher (kfac.curvature.uncovered: diagonal)"
    )


def _without_block(reason: str, uncovered: Uncovered, parameter: nn.Parameter) -> dict[str, object]:
    if uncovered is Uncovered.PLAIN:
        return {"reason": f"{reason}; plain gradient"}
    return {
        "kind": "Diagonal",
        "reason": f"{reason}; uncovered: {uncovered}",
        "factor_bytes": FLOAT_BYTES * parameter.numel(),
    }


def _replace(row: ParameterRow, **values: object) -> ParameterRow:
    return ParameterRow(**{**vars(row), **values})


def _costs(block: BlockPlan, shown: set[str]) -> dict[str, object]:
    if block.name in shown:
        return {}
    shown.add(block.name)
    return {
        "factors": "  ".join(_factor(list(units)) for _, units in groupby(block.units, key=lambda unit: unit.side)),
        "factor_bytes": block.factor_bytes,
        "inversion_cost": block.inversion_cost,
        "owners": tuple(sorted(set(block.owners))),
    }


def _factor(units: list[Unit]) -> str:
    first = units[0]
    many = f"{first.batch}×" if first.batch > 1 else ""
    diagonal = "diag " if first.kind is FactorKind.DIAGONAL else ""
    return f"{first.side} {many}{diagonal}{'+'.join(str(unit.dim) for unit in units)}"


def _numel(row: ParameterRow) -> int:
    numel = 1
    for size in row.shape:
        numel *= size
    return numel
