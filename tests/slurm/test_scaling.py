"""A scaling study's runs and its table; `test_cluster.py` makes one."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.errors import ConfigError, KFACError
from kfac_dist.slurm.scaling import ScalingRun, Timing, main, plan, read_timings, table
from kfac_dist.training import train
from tests.training.runs import small_config


def test_weak_scaling_grows_the_batch_with_the_nodes() -> None:
    assert [(run.name, run.nodes, run.batch) for run in plan(64, [4, 2, 2])] == [
        ("both-2", 2, 64),
        ("strong-4", 4, 64),
        ("weak-4", 4, 128),
    ]
    for nodes in ([], [0, 1]):
        with pytest.raises(ConfigError, match="expected numbers of nodes"):
            plan(64, nodes)


def test_the_table_compares_with_the_fewest_nodes() -> None:
    timings = [
        Timing(ScalingRun("both", 1, 100), 0.1),
        Timing(ScalingRun("strong", 4, 100), 0.05),
        Timing(ScalingRun("weak", 4, 400), 0.125),
    ]
    assert table(timings).splitlines()[2:] == [
        "| strong | 1 | 100 | 100.00 | 1,000 | 1.00 |",
        "| strong | 4 | 100 | 50.00 | 2,000 | 0.50 |",
        "| weak | 1 | 100 | 100.00 | 1,000 | 1.00 |",
        "| weak | 4 | 400 | 125.00 | 3,200 | 0.80 |",
    ]


def test_timings_come_from_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KFACError, match="holds no scaling study"):
        read_timings(tmp_path)
    for name, batch in (("both-1", 7), ("weak-2", 14)):
        train(small_config(tmp_path, run={"name": name}, train={"batch_size": batch}), quiet=True)
    timings = read_timings(tmp_path)
    assert [(timing.run.name, timing.run.batch) for timing in timings] == [("both-1", 7), ("weak-2", 14)]
    assert all(0 < timing.seconds < 1 for timing in timings)
    capsys.readouterr()
    main(["table", str(tmp_path)])
    assert capsys.readouterr().out.count("| weak |") == 2
    (tmp_path / "weak-2/metrics.jsonl").write_text("")
    with pytest.raises(SystemExit, match="weak-2: not a finished run"):
        main(["table", str(tmp_path)])


def test_the_plan_is_read_by_the_batch_script(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--nodes", "1 2", "configs/digits_autoencoder.yaml", "train.batch_size=32"])
    assert capsys.readouterr().out == "both-1 1 32\nstrong-2 2 32\nweak-2 2 64\n"
    with pytest.raises(SystemExit, match="expected numbers of nodes"):
        main(["plan", "--nodes", "one", "configs/digits_autoencoder.yaml"])
