"""`state.json`: what it says of a run is what the other views say."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.reporting.report import read_run, write_report
from kfac_dist.reporting.restarts import launcher_restarts
from kfac_dist.reporting.run_file import RunFile, read_record


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
