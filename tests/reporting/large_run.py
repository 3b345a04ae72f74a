"""A run as a large model leaves it, written by hand: hundreds of factors, many ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LAYERS = ("qkv", "projection", "expand", "contract")


def write_large_run(directory: Path, *, depth: int = 30, ranks: int = 8, refreshes: int = 20, slots: int = 1) -> Path:
    """Write a run of `4 · depth` layers with two factors each; with several slots, layers take turns in refreshing.

    The condition of the i-th factor is `10 + i`, and the π of its block `1 + i / 200`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text("run: {name: large}\n")
    steps = range(10, 10 * refreshes + 1, 10)
    logged = [{"step": step, "loss": 1 / step, "seconds": step / 10, "skipped": 0} for step in steps]
    for record in logged:
        record |= {f"kfac/seconds/{phase}": record["step"] / 100 for phase in ("statistics", "inversion", "sharing")}
    _write(directory / "metrics.jsonl", logged)
    blocks = [f"layers.{layer}.{part}" for layer in range(depth) for part in LAYERS]
    readings = []
    for refresh in range(refreshes):
        for slot in range(slots):
            step = 10 * refresh + slot
            factors = [
                _factor(step, block, side, 2 * index + "AG".index(side), ranks)
                for index, block in enumerate(blocks)
                if index % slots == slot
                for side in "AG"
            ]
            for rank in range(ranks):
                own = [factor for factor in factors if factor["rank"] == rank]
                readings.append({"step": step, "rank": rank, "seconds": 0.01 * (rank + 1), "factors": own})
    _write(directory / "curvature.jsonl", readings)
    return directory


def _factor(step: int, block: str, side: str, index: int, ranks: int) -> dict[str, Any]:
    dim = 1000 - index
    return {
        "step": step,
        "block": block,
        "unit": f"{block}/{side}/0",
        "side": side,
        "dim": dim,
        "batch": 1,
        "rank": index % ranks,
        "damping": (1 + index / 200) ** 2 if side == "A" else 1.0,
        "trace": 1.0,
        "spectrum": [10.0 ** (place / 8 - 4) for place in range(33)],
        "condition": 10.0 + index,
        "cost": float(dim**3),
    }


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
