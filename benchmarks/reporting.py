"""Contents of every result file: machine, versions, settings, and numbers with their spread."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

import kfac_dist

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return the machine and versions, without names of hosts or users."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "kfac_dist": kfac_dist.__version__,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, and the quartiles as the spread."""
    ordered = sorted(values)
    low, _, high = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else (ordered[0],) * 3
    return {"median": statistics.median(ordered), "quartile_low": low, "quartile_high": high, "samples": len(ordered)}


def write(name: str, out: Path | None, settings: dict[str, Any], results: Any) -> Path:
    """Write one result file and return its path."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "benchmark": name,
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "load_average_at_end": os.getloadavg(),
        "results": results,
    }
    path.write_text(json.dumps(report, indent=2) + "\n")
    return path
