"""A whole run: what it leaves on disk, what it compares, and what it does with an earlier one of its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from kfac_dist.config.schema import Config
from kfac_dist.errors import ConfigError
from kfac_dist.reporting.run_file import read_record
from kfac_dist.training import train
from kfac_dist.training.records.metrics import read_metrics
from tests.training.runs import losses, small_config


def _compared(directory: Path) -> Config:
    entries = {"adamw": {"name": "adamw", "lr": 0.01}, "reckless": {"name": "sgd", "lr": 1e30}}
    return small_config(
        directory,
        kfac=True,
        loss={"name": "mse"},
        train={"evaluate_every": 5},
        compare=entries,
        checkpoint={"every": 5},
    )


@pytest.mark.usefixtures("drawn")
def test_a_run_leaves_its_files_and_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(_compared(tmp_path), compare=True)
    directory = tmp_path / "small"
    assert result.directory == directory
    assert [run.name for run in result.runs] == ["kfac", "adamw", "reckless"]
    assert sorted(path.name for path in directory.iterdir()) == [
        "checkpoints",
        "compare-adamw",
        "compare-reckless",
        "config.yaml",
        "curvature.jsonl",
        "loss.png",
        "metrics.jsonl",
        "result.json",
        "state.json",
        "tensorboard",
    ]
    assert Config.model_validate(yaml.safe_load((directory / "config.yaml").read_text())) == _compared(tmp_path)
    assert yaml.safe_load((directory / "compare-adamw/config.yaml").read_text())["kfac"]["enabled"] is False
    assert [path.name for path in sorted((directory / "checkpoints").iterdir())] == ["step-00000010", "step-00000012"]

    records = read_metrics(directory / "metrics.jsonl")
    expected = {"step", "epoch", "loss", "lr", "samples_per_second", "seconds", "memory_bytes"}
    assert expected | {"kfac/damping", "kfac/kl_scale"} <= set(records[0])
    assert [record["step"] for record in records if "test_loss" in record] == [5, 10]

    plain = json.loads((directory / "result.json").read_text())
    assert plain[0]["metric"] == "squared error"
    assert plain[2]["note"] == "diverged"
    assert plain[2]["train_loss"] is None
    shown = capsys.readouterr().out
    assert shown.startswith("1 process on cpu\n")
    for text in ("kfac", "adamw", "diverged", "ms/step", "step 12/12", "test loss"):
        assert text in shown


def test_compared_runs_start_from_the_same_weights_and_data(tmp_path: Path) -> None:
    entries = {"same": {"name": "sgd", "lr": 0.05}}
    train(small_config(tmp_path, compare=entries), compare=True, quiet=True)
    assert losses(tmp_path / "small") == losses(tmp_path / "small/compare-same")


def _seeds(directory: Path) -> dict[str, int]:
    return {
        path.name: yaml.safe_load((path / "config.yaml").read_text())["run"]["seed"] for path in directory.iterdir()
    }


def test_fresh_runs_move_the_earlier_ones_aside_and_delete_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (1, 2, 3):
        train(small_config(tmp_path, run={"seed": seed}), quiet=True)
    assert _seeds(tmp_path) == {"small": 3, "small.previous": 1, "small.previous.2": 2}
    assert len(losses(tmp_path / "small.previous.2")) == 12
    small = tmp_path / "small"
    assert capsys.readouterr().err.splitlines() == [
        f"moved the earlier run in {small} to {small}.previous",
        f"moved the earlier run in {small} to {small}.previous.2",
    ]
    record = read_record(small)
    assert record is not None
    assert record.earlier == f"{small}.previous.2"

    (tmp_path / "small.previous").rename(tmp_path / "kept")
    train(small_config(tmp_path, run={"seed": 4}))
    assert _seeds(tmp_path) == {"small": 4, "small.previous.3": 3, "small.previous.2": 2, "kept": 1}, "the last is last"
    assert f"moved the earlier run in {small} to {small}.previous.3\n" in capsys.readouterr().out


def test_only_when_told_to_an_earlier_run_is_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        train(small_config(tmp_path, run={"seed": seed}), quiet=True, overwrite=True)
    assert _seeds(tmp_path) == {"small": 2}
    assert capsys.readouterr().err == f"deleted the earlier run in {tmp_path / 'small'} (--overwrite)\n"

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("…")
    with pytest.raises(ConfigError, match=r"--overwrite: .*thesis holds no run"):
        train(small_config(tmp_path, run={"name": "thesis"}), quiet=True, overwrite=True)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_going_on_with_another_run_s_checkpoint_spares_the_run_whose_name_is_taken(tmp_path: Path) -> None:
    train(small_config(tmp_path, run={"name": "other"}, checkpoint={"every": 3, "keep": 9}), quiet=True)
    train(small_config(tmp_path, run={"seed": 1}), quiet=True)
    before = losses(tmp_path / "small")
    resume = str(tmp_path / "other/checkpoints/step-00000003")
    train(small_config(tmp_path, train={"steps": 6}, checkpoint={"resume": resume}), quiet=True)
    assert losses(tmp_path / "small.previous") == before
    assert sorted(losses(tmp_path / "small")) == [4, 5, 6]

    # From within its own directory it goes back, and moves only those that it is compared with.
    own = str(tmp_path / "small/checkpoints/step-00000006")
    compare = {"same": {"name": "sgd", "lr": 0.05}}
    for _ in range(2):
        config = small_config(tmp_path, train={"steps": 8}, checkpoint={"every": 2, "resume": own}, compare=compare)
        train(config, compare=True, quiet=True)
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"compare-same", "compare-same.previous"} <= names
    assert sorted(losses(tmp_path / "small")) == [4, 5, 6, 7, 8]


def test_resuming_a_finished_run_only_evaluates_it_again(tmp_path: Path) -> None:
    first = train(small_config(tmp_path), quiet=True).runs[0]
    again = train(small_config(tmp_path, checkpoint={"resume": "auto"}), quiet=True).runs[0]
    assert (again.steps, again.train_loss, again.test_loss) == (first.steps, first.train_loss, first.test_loss)


def test_epochs_set_the_length(tmp_path: Path) -> None:
    config = small_config(tmp_path, train={"steps": None, "epochs": 2, "log_every": 100})
    assert train(config, quiet=True).runs[0].steps == 16
    assert [record["epoch"] for record in read_metrics(tmp_path / "small/metrics.jsonl")] == [2]
