"""A run that is watched over HTTP while it trains."""

from __future__ import annotations

import os
import socket
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from kfac_dist.config.schema import Config
from kfac_dist.distributed.communicators.traffic import all_reduce_bytes
from kfac_dist.errors import ConfigError
from kfac_dist.preconditioner.phases import Phase
from kfac_dist.training import train
from kfac_dist.training.records.metrics import read_metrics
from kfac_dist.training.records.monitor import last_saved
from tests.harness import run_ranks
from tests.reporting.test_exporter import fetch, free_port, scrape
from tests.training.runs import launched, small_config

STEPS = 60
SKIPPED = 25
KFACS_OWN = ("factors", "inverses")
VALUES = 6 * 5 + 5 + 5 * 6 + 6  # parameters of FlakyNet


def _config(directory: Path, port: int) -> Config:
    return small_config(
        directory,
        kfac=True,
        metrics={"port": port},
        model={
            "name": "tests.training.recovery.test_divergence:FlakyNet",
            "args": {"rank": 1, "first": SKIPPED, "last": SKIPPED},
        },
        data={"name": "tests.training.recovery.test_preemption:slow_pixels"},
        train={"steps": STEPS, "log_every": 3, "evaluate_every": 0},
        checkpoint={"every": 12},
    )


def _train(config: Config) -> str:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    os.environ["SECONDS_PER_SAMPLE"] = "0.01"
    try:
        train(config, quiet=True)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_run_is_scraped_while_it_trains(tmp_path: Path) -> None:
    port = free_port()
    seen: list[dict[tuple[str, str], float]] = []
    with ThreadPoolExecutor(1) as background:
        running = background.submit(run_ranks, 2, _train, _config(tmp_path, port))
        deadline = time.monotonic() + 60
        while not running.done() and time.monotonic() < deadline:
            try:
                found = scrape(port)
                assert fetch(port, "/health")[0] == 200
            except OSError:  # before its first step, or after its last: nobody listens, or no longer
                time.sleep(0.02)
                continue
            if ("kfac_dist_step", "") in found:
                seen.append(found)
            time.sleep(0.05)
        assert running.result() == ["", ""]
    with pytest.raises(urllib.error.URLError):
        fetch(port, "/health")

    steps = [int(found["kfac_dist_step", ""]) for found in seen]
    assert steps == sorted(steps)
    assert len(set(steps)) > 3
    assert all(step % 3 == 0 for step in steps), "published at logged steps only"
    records = {record["step"]: record for record in read_metrics(tmp_path / "small/metrics.jsonl")}
    for step, found in zip(steps, seen, strict=True):
        _compare(found, records[step])
    last = seen[-1]
    assert all(last["kfac_dist_phase_seconds_total", str(phase)] > 0 for phase in Phase)
    assert last["kfac_dist_total_steps", ""] == STEPS
    assert steps[-1] > 12
    for step, found in zip(steps, seen, strict=True):
        assert found["kfac_dist_skipped_steps_total", ""] == (step > SKIPPED)
    assert 0 <= last["kfac_dist_checkpoint_age_seconds", ""] < 60
    assert ("kfac_dist_checkpoint_age_seconds", "") not in seen[0], "there is none before step 12"


def _compare(found: dict[tuple[str, str], float], record: dict[str, Any]) -> None:
    for name, key in (
        ("loss", "loss"),
        ("learning_rate", "lr"),
        ("samples_per_second", "samples_per_second"),
        ("damping", "kfac/damping"),
        ("failed_inversions_total", "kfac/failed_inversions"),
        ("raised_dampings_total", "kfac/raised_dampings"),
        ("dropped_statistics_total", "kfac/dropped_statistics"),
    ):
        assert found[f"kfac_dist_{name}", ""] == record[key]
    sent = {content: value for (name, content), value in found.items() if name == "kfac_dist_bytes_sent_total"}
    assert sent["loss"] > 0, "the loop's own collectives are among them"
    assert sent["averaged gradients"] == record["step"] * all_reduce_bytes(4 * VALUES, 2), "and DDP's"
    # What is sent at the start, such as plans to compare, goes by the same words in both.
    assert 0 < sum(sent[content] for content in KFACS_OWN) < record["kfac/bytes_sent"] < sum(sent.values())


def test_a_port_in_use_stops_all_ranks_before_they_train(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        told = run_ranks(2, _train, _config(tmp_path, taken.getsockname()[1]))
    assert "in use" in told[0]
    assert told[1] == f"rank 0: {told[0]}"
    assert not (tmp_path / "small").exists()


def test_the_newest_complete_checkpoint_counts(tmp_path: Path) -> None:
    assert last_saved(tmp_path / "none") is None
    for name, moment in (("step-00000001", 10), ("step-00000002", 20), ("step-00000003.writing", 30)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
        os.utime(tmp_path / name / "manifest.json", (moment, moment))
    assert last_saved(tmp_path) == 20
