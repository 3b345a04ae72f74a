"""Calibration on two real ranks, at sizes that take no time; what it writes, the planner reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kfac_dist.cli import app
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.distributed.communicators.recording import Collective
from kfac_dist.distributed.startup.bootstrap import bootstrap
from kfac_dist.errors import ConfigError
from kfac_dist.planning.machines.calibration import Effort, calibrate, write
from kfac_dist.planning.machines.hardware import Hardware, load_hardware
from tests.harness import run_ranks

QUICK = Effort((2, 32, 64), (32,), (10_000, 100_000), (4, 10_000), 2, 0.001, 0.01, 1)
CONFIG = Path(__file__).parents[3] / "configs" / "digits_classifier.yaml"


def measured_by_ranks() -> Hardware:
    size = int(os.environ["WORLD_SIZE"])
    os.environ |= {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # never asked: the ranks have met
    torch.manual_seed(0)
    with bootstrap("cpu", 30.0) as world:
        communicator = build_communicator(30.0)
        found = calibrate(world, communicator, effort=QUICK)
        communicator.close()
    return found


def planned(file: Path, size: int) -> tuple[int, str]:
    ended = CliRunner().invoke(app, ["plan", str(CONFIG), "--hardware", str(file), "--world-size", str(size)])
    return ended.exit_code, ended.output


def test_ranks_measure_together_and_agree(tmp_path: Path) -> None:
    one, other = run_ranks(2, measured_by_ranks)
    assert one == other
    assert (one.kind, one.ranks, one.node_size) == ("measured", 2, 2)
    assert set(one.collectives) == set(Collective)
    assert {size for by_size in one.collectives.values() for size in by_size} == {2}
    assert set(one.crowding) == {1, 2}
    assert one.intra is not None
    assert one.solve_seconds(64, 1, eigen=False) < 1.0

    file = tmp_path / "cluster" / "measured.json"
    write(one, file)
    assert load_hardware(str(file)) == one
    code, output = planned(file, 2)
    assert code == 0, output
    assert "measured on 2 rank(s)" in output


def test_one_rank_knows_no_network(tmp_path: Path) -> None:
    [alone] = run_ranks(1, measured_by_ranks)
    file = tmp_path / "measured.json"
    write(alone, file)
    assert planned(file, 1)[0] == 0
    code, output = planned(file, 2)
    assert code == 2
    assert "was measured by one rank, which knows no network" in output


def test_a_place_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out: .* can't be written"):
        write(load_hardware("cpu-gloo"), tmp_path / "file" / "measured.json")
