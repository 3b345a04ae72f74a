"""`curvature.jsonl`: some readings a run, of every factor, none of which change what the run computes."""

from __future__ import annotations

import json
from pathlib import Path

from kfac_dist.config.yaml.load import load_config, resolve
from kfac_dist.training import train
from kfac_dist.training.records.metrics import read_metrics

ROOT = Path(__file__).parents[3]


def losses_and_readings(directory: Path, spectra: int) -> tuple[list[float], list[dict[str, object]]]:
    overrides = (
        f"run.directory={directory}",
        f"metrics.spectra={spectra}",
        "train.epochs=null",
        "train.steps=12",
        "train.log_every=3",
        "kfac.curvature.factor_every=2",
        "kfac.inversion.inverse_every=4",
    )
    train(resolve(load_config(ROOT / "configs/digits_autoencoder.yaml", overrides)), quiet=True)
    run = directory / "digits-autoencoder"
    losses = [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
    return losses, read_metrics(run / "curvature.jsonl")


def test_spectra_are_written_and_change_nothing(tmp_path: Path) -> None:
    losses, readings = losses_and_readings(tmp_path / "with", spectra=3)
    without, none = losses_and_readings(tmp_path / "without", spectra=0)
    assert losses == without
    assert none == []
    assert [reading["step"] for reading in readings] == [0, 4, 8]
    assert all(len(reading["factors"]) == 16 for reading in readings)  # type: ignore[arg-type]
    record = json.loads((tmp_path / "with/digits-autoencoder/metrics.jsonl").read_text().splitlines()[0])
    assert record["kfac/seconds/inversion"] > 0
