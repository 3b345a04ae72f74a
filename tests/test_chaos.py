"""A short play of benchmarks/chaos.py: three faults, after which the run is the undisturbed one, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
def test_struck_runs_end_as_undisturbed_ones(tmp_path: Path) -> None:
    out = tmp_path / "chaos.json"
    command = [sys.executable, "-m", "benchmarks.chaos", "--rounds", "3", "--seed", "3", "--out", str(out)]
    command += ["--faults", "kill", "corrupt", "hang"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = json.loads(out.read_text())["results"]
    assert results["equal_bit_for_bit"] == results["rounds"] == 3
    killed, corrupted, hung = results["each"]
    assert killed["starts"] == 1, "torchrun has started the ranks again, not we"
    assert "ignored: " in corrupted["said"][0]
    assert f"no answer from rank {hung['rank']}" in hung["said"][0] or "nor does the store" in hung["said"][0]
