"""Metrics survive a kill, continue after a resume, and are the same for TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from kfac_dist.errors import KFACError
from kfac_dist.training.records.metrics import MetricsWriter, peak_memory_bytes, read_metrics


def test_lines_are_on_disk_at_once_and_as_events(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "loss": 2.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    writer.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_resumed_run_drops_what_it_will_repeat_and_a_torn_line(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write({"step": step, "loss": step / 10})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')
    assert len(read_metrics(path)) == 5
    resumed = MetricsWriter(tmp_path, first_step=3)
    resumed.write({"step": 4, "loss": 9.0})
    resumed.close()
    assert [record["loss"] for record in read_metrics(path)] == [0.1, 0.2, 0.3, 9.0]


def test_a_resumed_run_reads_the_curvature_of_its_first_step_once(tmp_path: Path) -> None:
    """Readings are numbered by the steps done before theirs, unlike metrics."""
    writer = MetricsWriter(tmp_path)
    for step in (0, 4, 8):
        writer.write_curvature({"step": step}, {})
    writer.close()
    resumed = MetricsWriter(tmp_path, first_step=8)
    resumed.write_curvature({"step": 8}, {})
    resumed.close()
    assert [record["step"] for record in read_metrics(tmp_path / "curvature.jsonl")] == [0, 4, 8]


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    MetricsWriter(tmp_path).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert read_metrics(tmp_path / "nothing.jsonl") == []


def test_tensorboard_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "loss": 1.0})
    writer.close()
    assert not (tmp_path / "tensorboard").exists()


def test_peak_memory_is_plausible() -> None:
    assert 2**25 < peak_memory_bytes(torch.device("cpu")) < 2**42


def test_a_full_disk_is_kept_for_the_next_boundary(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "loss": 2.0})
    writer._streams["metrics.jsonl"].close()
    writer._streams["metrics.jsonl"] = Path("/dev/full").open("a")  # noqa: SIM115
    writer.write({"step": 2, "loss": 1.0})
    writer.write({"step": 3, "loss": 1.0})
    writer.close()
    assert str(writer.failure) == f"can't write {tmp_path}/metrics.jsonl: No space left on device"
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_going_back_forgets_what_came_later(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": 1.0})
    writer.rewind(1)
    writer.write({"step": 2, "loss": 5.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 5.0)]


def test_what_is_not_finite_is_null_and_every_line_strict_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "test_loss": math.nan, "score": -math.inf})
    writer.write_curvature({"step": 1, "factors": ({"condition": math.inf, "spectrum": (None, 2.0)},)}, {})
    writer.close()
    for name in ("metrics.jsonl", "curvature.jsonl"):
        [line] = (tmp_path / name).read_text().splitlines()
        json.loads(line, parse_constant=refuse)
    assert read_metrics(tmp_path / "curvature.jsonl")[0]["factors"] == [{"condition": None, "spectrum": [None, 2.0]}]


NO_RECORDS = {
    "text": (b"hello", ":2: no JSON: remove the line, or move the file away"),
    "binary": (b"\xff\xfe\x00", ":2: no UTF-8 text: remove the line"),
    "latin-1": (b'{"step": 2, "note": "\xe9"}', ":2: no UTF-8 text: remove the line"),
    "a number": (b"3", ":2: no JSON object with a step: remove"),
    "null": (b"null", ":2: no JSON object with a step: remove"),
    "no step": (b'{"loss": 1.0}', ":2: no JSON object with a step: remove"),
    "no number for a step": (b'{"step": "2"}', ":2: no JSON object with a step: remove"),
    "deep": (b"[" * 100_000, ":2: no JSON: remove"),
}


@pytest.mark.parametrize(("line", "message"), NO_RECORDS.values(), ids=NO_RECORDS.keys())
@pytest.mark.parametrize("name", ["metrics.jsonl", "curvature.jsonl"])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, name: str, line: bytes, message: str) -> None:
    content = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    (tmp_path / name).write_bytes(content)

    for read in (lambda: read_metrics(tmp_path / name), lambda: MetricsWriter(tmp_path, first_step=3)):
        with pytest.raises(KFACError) as caught:
            read()
        assert str(caught.value).startswith(f"{tmp_path / name}{message}")
    assert (tmp_path / name).read_bytes() == content


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(KFACError, match=r"metrics.jsonl: is no regular file"):
        read_metrics(tmp_path / "metrics.jsonl")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(KFACError, match="fifo: is no regular file"):
        read_metrics(tmp_path / "fifo")
