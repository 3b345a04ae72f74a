"""`state.json`: what it says of a run is what the other views say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kfac_dist.reporting.report import read_run, write_report
from kfac_dist.reporting.run_file import RunFile, launcher_restarts, read_record, write_whole


def test_restarts_by_any_launcher_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed: pip install 'kfac_dist[report]'")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    (tmp_path / "config.yaml").write_text("run: {name: mine}\n")
    RunFile(tmp_path, ranks=3).running(10)
    record = read_record(tmp_path)
    assert record is not None
    assert record.restarts == sum(launcher_restarts().values()) == 7
    write_report(read_run(tmp_path), tmp_path / "page.html")
    assert "<td>3</td><td>7</td>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_files_of_a_run_are_replaced_whatever_was_there(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("of another")
    os.mkfifo(tmp_path / "a")
    os.mkfifo(tmp_path / "a.writing")
    (tmp_path / "b").symlink_to(tmp_path / "kept")
    for name in ("a", "b"):
        write_whole(tmp_path / name, "ours")
        assert (tmp_path / name).read_text() == "ours"
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "kept").read_text() == "of another"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "kept"]
