"""A run reports how noisy its gradients are, the same under every engine and number of ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from kfac_dist.training import train
from kfac_dist.training.records.metrics import read_metrics
from kfac_dist.training.records.variance import FILE
from tests.harness import run_ranks
from tests.training.runs import deepspeed_ends_here, final_model, launched, losses, small_config

SECTIONS = {
    "optimizer": {"name": "msvag", "lr": 0.05},
    "train": {"evaluate_every": 6},
    "metrics": {"relative_variance": True},
    "checkpoint": {"every": 6, "keep": 9, "resume": "auto"},
}


def _train(directory: str, engines: list[str]) -> None:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()), DS_ACCELERATOR="cpu")
    with deepspeed_ends_here():
        for engine in engines:
            train(small_config(f"{directory}/{engine}", kfac=True, engine={"name": engine}, **SECTIONS), quiet=True)


def test_every_engine_and_number_of_ranks_reports_the_same(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    compared = small_config(tmp_path / "alone", kfac=True, compare={"sgd": {"lr": 0.1}}, **SECTIONS)
    train(compared, compare=True, quiet=True)
    alone = tmp_path / "alone/small"
    expected = json.loads((alone / FILE).read_text())
    assert set(expected) == {name.removeprefix("model.") for name in final_model(alone)}
    assert all(row["median"] > 0 and 0 <= row["noisy"] <= 1 for row in expected.values())
    assert not (alone / "compare-sgd" / FILE).exists()  # momentum has no variance
    [at_six] = [record for record in read_metrics(alone / "metrics.jsonl") if "test_loss" in record]
    assert {name.split("/")[1] for name in at_six if name.startswith("relative_variance/")} == set(expected)

    engines = ["ddp", "fsdp2", "zero2", "zero3"]
    run_ranks(3, _train, str(tmp_path), engines, timeout=120)
    for engine in engines:
        found = json.loads((tmp_path / engine / "small" / FILE).read_text())
        assert losses(tmp_path / engine / "small") == pytest.approx(losses(alone), rel=1e-5)
        for name, row in expected.items():
            assert found[name]["noisy"] == pytest.approx(row["noisy"], abs=0.1)
            assert found[name]["median"] == pytest.approx(row["median"], rel=0.25)  # a bin and its neighbour
