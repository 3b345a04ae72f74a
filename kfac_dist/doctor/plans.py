"""The plan on the ranks that there are, and on other numbers of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kfac_dist.config.schema import KFACConfig
from kfac_dist.curvature.blocks import Block
from kfac_dist.distributed.communicators.agreement import plan_digest
from kfac_dist.doctor.findings import Finding, Severity
from kfac_dist.errors import ConfigError
from kfac_dist.preconditioner.plan import Plan, build_plan

WORLD_SIZES = (1, 2, 3, 4, 8)


def examine_plan(
    blocks: Sequence[Block],
    config: KFACConfig,
    plan: Plan,
    local_world_size: int,
    shard_size: Callable[[int], int],
) -> list[Finding]:
    """Check that the plan is a pure function, that its work doesn't depend on the ranks, and how it is spread.

    Args:
        blocks: The blocks of the plan.
        config: The distribution.
        plan: The plan for the ranks of the run.
        local_world_size: Ranks of a node.
        shard_size: From a number of ranks to how many of them hold each gradient once.
    """
    size = plan.grid.world_size
    digest = plan_digest(plan.rows())
    again = build_plan(blocks, config, world_size=size, local_world_size=local_world_size, shard_size=shard_size(size))
    findings = []
    if plan_digest(again.rows()) != digest:
        findings.append(Finding("plan", Severity.ERROR, "planning twice gives two plans: this is a bug of kfac_dist"))
    fitting, differing = [], []
    for ranks in sorted({*WORLD_SIZES, size}):
        try:
            other = build_plan(blocks, config, world_size=ranks, local_world_size=ranks, shard_size=shard_size(ranks))
        except ConfigError:
            continue  # a placement that doesn't fit this number of ranks
        fitting.append(ranks)
        if _work(other) != _work(plan):
            differing.append(ranks)
    if differing:
        findings.append(Finding("plan", Severity.ERROR, f"other blocks on {differing} ranks: a bug of kfac_dist"))
    else:
        sizes = ", ".join(map(str, fitting))
        text = f"the same blocks and units on {sizes} ranks; hash {digest[:12]} for {size}"
        findings.append(Finding("plan", Severity.FINE, text))
    imbalance = plan.assignment.imbalance()
    if size > 1 and imbalance > 2:
        largest = max(plan.units, key=lambda unit: unit.cost)
        findings.append(
            Finding(
                "plan",
                Severity.WARNING,
                f"one rank inverts {imbalance:.1f} times the mean; the largest unit, {largest.name}, has n = "
                f"{largest.dim}: try kfac.distribution.assignment: balanced, or kfac.inversion.max_factor_dim",
            )
        )
    return findings


def _work(plan: Plan) -> list[tuple[str, str, int, tuple[str, ...]]]:
    return [
        (block.name, block.description, block.slot, tuple(f"{unit.name} {unit.shape}" for unit in block.units))
        for block in plan.blocks.values()
    ]
