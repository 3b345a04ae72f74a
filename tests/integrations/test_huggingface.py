"""Hugging Face's Trainer with K-FAC: the same losses under DDP, FSDP2 and ZeRO-3, and exact resumption."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")

ROOT = Path(__file__).parents[2]


def example(*arguments: str) -> list[float]:
    """Run the example on two ranks; return its losses, step by step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.integrations.run_example", "huggingface.py", *arguments]
    ended = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [float(loss) for loss in re.findall(r"'loss': '?([0-9.]+)", ended.stdout)]


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
def test_a_gpt2_trains_alike_under_every_plugin_and_resumes(tmp_path: Path) -> None:
    ddp = example("ddp", "--steps", "6", "--save-steps", "4", "--output", str(tmp_path / "ddp"))
    assert len(ddp) == 6
    assert ddp[-1] < ddp[0] - 0.4
    for engine in ("fsdp2", "zero3"):
        assert example(engine, "--steps", "6", "--output", str(tmp_path / engine)) == pytest.approx(ddp, abs=2e-3)
    state = torch.load(tmp_path / "ddp/checkpoint-4/kfac.pt", weights_only=True)
    assert int(state["step"]) == 4
    (tmp_path / "ddp/checkpoint-6").rename(tmp_path / "complete")
    resumed = example("ddp", "--resume", "--steps", "6", "--output", str(tmp_path / "ddp"))
    assert resumed == ddp[4:]
