"""Advice drawn from both estimators' variances and costs, in sentences; the thresholds stand here."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kfac_dist.config.schema import CurvatureConfig
from kfac_dist.curvature.fisher import MAX_COLUMNS
from kfac_dist.doctor.fisher.report import FisherReport

# `type2` is worth its backward passes if they add no more than this share to the steps.
EXTRA = 0.25
# A trace of the empirical Fisher that is off by less than this factor stands for the Fisher's.
CLOSE = 1.5
SHOWN = 3


def advise(report: FisherReport, curvature: CurvatureConfig, batch_size: int) -> Iterator[str]:
    """Yield sentences: the estimators, the last two layers, labels, the setting, and the `empirical` Fisher.

    Args:
        report: The measurements.
        curvature: The run's measurement and averaging.
        batch_size: Samples of a step.
    """
    yield from _estimators(report)
    yield from _labels(report, curvature, batch_size)
    yield from _empirical(report)


def _estimators(report: FisherReport) -> Iterator[str]:
    for row in report.layers[::-1]:
        if row.role and row.structural:
            yield (
                f"{row.role} layer ({row.layer}): Î2. It has no variance, by structure: the outputs are affine in "
                f"these weights (off by {row.curvedness:.0e} of a step as long as they are; largest ∂²h: {row.bend:.0e}"
                "), so that −∂²ℓ is ∂hᵀC∂h for any labels; no label has to be sampled"
            )
        elif row.role and row.second is not None and row.first:
            yield (
                f"{row.role} layer ({row.layer}): {row.better}, relative standard deviation "
                f"{min(row.first, row.second):.2g} against {max(row.first, row.second):.2g} with one label"
            )
        elif row.role and row.refused:
            yield f"{row.role} layer ({row.layer}): Î1; Î2 is refused: {row.refused}"
    refused = [row.layer for row in report.layers if row.refused and not row.role]
    if refused:
        more = f" and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
        reason = next(row.refused for row in report.layers if row.layer == refused[0])
        yield f"Î2 is refused in {', '.join(refused[:SHOWN])}{more}: {reason}"
    others = [row for row in report.layers if not row.role and row.second is not None and row.first]
    better = sum(row.better == "Î2" for row in others)
    if others:
        yield f"of the other layers, Î2 has less variance in {better} of {len(others)}"
    values = sum(row.values for row in report.layers)
    yield (
        f"Î2 elsewhere costs a pass for each of {values:,} values, {values * report.cost.coordinate:.2g} s for "
        f"{report.samples} samples here; Î1 costs one backward for all of them"
    )


def _labels(report: FisherReport, curvature: CurvatureConfig, batch_size: int) -> Iterator[str]:
    worst = max(report.trend, key=lambda row: row.first_deviation)
    labels = math.ceil((worst.first_deviation / report.deviation) ** 2)
    beta = curvature.decay
    # Var of an average with weights (1 − β)βᵏ is (1 − β)/(1 + β) of one term's.
    window = batch_size * (1 + beta) / (1 - beta)
    reached = worst.first_deviation / math.sqrt(window)
    asked = f"{report.deviation:.0%}"
    yield (
        f"labels for {asked}: {labels:,} by Î1 where it is noisiest ({worst.layer}, step {worst.step}); one a sample "
        f"in batches of {batch_size}, averaged with β = {beta:g}, count as {window:,.0f} and give "
        f"{reached:.1%}"
    )
    if reached <= report.deviation:
        share = _share(report, 1, curvature.factor_every)
        yield f"kfac.curvature.fisher: mc is enough, one drawn label a sample{share}"
        return
    seconds = report.columns * report.cost.backward / curvature.factor_every
    affordable = report.cost.step is None or seconds <= EXTRA * report.cost.step
    if report.columns <= MAX_COLUMNS and affordable:
        share = _share(report, report.columns, curvature.factor_every)
        yield f"kfac.curvature.fisher: type2, which has no variance from labels, for {report.columns} passes{share}"
        return
    batches = labels / batch_size
    needed = (batches - 1) / (batches + 1)
    yield (
        f"kfac.curvature.fisher: mc, and for {asked} kfac.curvature.decay: {min(needed + 5e-5, 0.9999):.4f}, or more "
        f"samples a batch; type2 needs {report.columns} passes"
    )


def _share(report: FisherReport, passes: int, every: int) -> str:
    seconds = passes * report.cost.backward / every
    text = f": {seconds * 1e3:.2g} ms a step, measured every {every}"
    return (
        text
        if not report.cost.step
        else f"{text}, {seconds / report.cost.step:.1%} of its {report.cost.step * 1e3:.3g} ms"
    )


def _empirical(report: FisherReport) -> Iterator[str]:
    last = report.trend[-1].step
    ratios = []
    for step in (0, last):
        rows = [row for row in report.trend if row.step == step]
        ratios.append(sum(row.empirical * row.trace for row in rows) / max(sum(row.trace for row in rows), 1e-300))
    steps = f"{ratios[0]:.2g} of the Fisher's trace at first" + (f", {ratios[1]:.2g} after step {last}" if last else "")
    verdict = (
        "it will do so far"
        if all(1 / CLOSE <= ratio <= CLOSE for ratio in ratios)
        else "it is another matrix, whose scale damping would have to follow"
    )
    yield (f"empirical (the data's labels, no further backward) has {steps}, from {report.samples} samples: {verdict}")
