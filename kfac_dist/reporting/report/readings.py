"""The readings in `curvature.jsonl`, in the orders that charts want."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from kfac_dist.reporting.report.runs import RunData


def readings_of_factors(run: RunData) -> Iterator[tuple[dict[str, Any], float]]:
    """Yield every reading of a factor, and its milliseconds: its share by n³ of what was solved with it."""
    for reading in run.readings:
        total = sum(factor["cost"] for factor in reading["factors"]) or 1.0
        for factor in reading["factors"]:
            yield factor, 1000 * reading["seconds"] * factor["cost"] / total


def by_factor(run: RunData) -> dict[str, list[dict[str, Any]]]:
    """Return the readings of every factor, by its name."""
    factors: dict[str, list[dict[str, Any]]] = {}
    for factor, _ in readings_of_factors(run):
        factors.setdefault(factor["unit"], []).append(factor)
    return {unit: factors[unit] for unit in sorted(factors, key=numbered)}


def numbered(name: str) -> list[tuple[int, str]]:
    """Return what to sort names by, so that layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
