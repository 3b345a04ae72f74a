"""What an exporter serves, to whom, and when it says that a run stands still."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import kfac_dist.reporting.exporter as exporter_module
from kfac_dist.config.schema import MetricsConfig
from kfac_dist.errors import ConfigError
from kfac_dist.reporting.exporter import DASHBOARD, Exporter, Reading

READING = Reading(
    step=7,
    loss=0.5,
    learning_rate=0.1,
    samples_per_second=300.0,
    skipped_steps=2,
    damping=0.01,
    failed_inversions=1,
    raised_dampings=5,
    dropped_statistics=3,
    phase_seconds={"statistics": 1.5, "inversion": 0.25},
    collectives={"factors": 4},
    bytes_sent={"factors": 4096},
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def fetch(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scrape(port: int) -> dict[tuple[str, str], float]:
    """(name, value of the metric's own label) to value, as Prometheus's own parser reads them."""
    status, text = fetch(port, "/metrics")
    assert status == 200
    return {
        (sample.name, next((sample.labels[own] for own in ("phase", "content", "by") if own in sample.labels), "")): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_reading_is_served_as_it_was_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    port = free_port()
    with Exporter(MetricsConfig(port=port), "a-run") as exporter:
        before = scrape(port)
        assert before["kfac_dist_restarts", "torchrun"] == 2
        assert before["kfac_dist_restarts", "slurm"] == 0
        assert ("kfac_dist_step", "") not in before

        exporter.watch("kfac", 10, lambda: time.time() - 100)
        assert ("kfac_dist_loss", "") not in scrape(port), "nothing is logged yet"
        exporter.publish(READING)
        found = scrape(port)
        assert 100 <= found["kfac_dist_checkpoint_age_seconds", ""] < 110
        expected = {
            ("kfac_dist_step", ""): 7,
            ("kfac_dist_total_steps", ""): 10,
            ("kfac_dist_loss", ""): 0.5,
            ("kfac_dist_learning_rate", ""): 0.1,
            ("kfac_dist_samples_per_second", ""): 300,
            ("kfac_dist_skipped_steps_total", ""): 2,
            ("kfac_dist_damping", ""): 0.01,
            ("kfac_dist_failed_inversions_total", ""): 1,
            ("kfac_dist_raised_dampings_total", ""): 5,
            ("kfac_dist_dropped_statistics_total", ""): 3,
            ("kfac_dist_phase_seconds_total", "statistics"): 1.5,
            ("kfac_dist_phase_seconds_total", "inversion"): 0.25,
            ("kfac_dist_collectives_total", "factors"): 4,
            ("kfac_dist_bytes_sent_total", "factors"): 4096,
        }
        assert expected.items() <= found.items()
        assert 'run="a-run"' in fetch(port, "/metrics")[1]

        exporter.watch("sgd", 5, lambda: None)
        later = scrape(port)
        assert later["kfac_dist_total_steps", ""] == 5
        assert ("kfac_dist_checkpoint_age_seconds", "") not in later
        assert ("kfac_dist_damping", "") not in later
        assert fetch(port, "/elsewhere")[0] == 404
    with pytest.raises(urllib.error.URLError):
        fetch(port, "/metrics")


def test_what_is_sent_without_kfac_is_served_too() -> None:
    port = free_port()
    with Exporter(MetricsConfig(port=port), "a-run") as exporter:
        exporter.watch("sgd", 10, lambda: None)
        exporter.publish(Reading(7, 0.5, 0.1, 300.0, collectives={"gradients": 7}, bytes_sent={"gradients": 2800}))
        found = scrape(port)
    assert found["kfac_dist_collectives_total", "gradients"] == 7
    assert found["kfac_dist_bytes_sent_total", "gradients"] == 2800
    assert {("kfac_dist_damping", ""), ("kfac_dist_failed_inversions_total", "")}.isdisjoint(found)


def test_health_follows_the_steps() -> None:
    port = free_port()
    with Exporter(MetricsConfig(port=port, stale_seconds=0.5), "a-run") as exporter:
        exporter.watch("kfac", 10, lambda: None)
        status, told = fetch(port, "/health")
        assert (status, json.loads(told)["status"]) == (200, "advancing")
        time.sleep(0.6)
        status, told = fetch(port, "/health")
        assert (status, json.loads(told)["status"]) == (503, "standing still")
        assert json.loads(told)["seconds_since_step"] >= 0.6
        exporter.stepped()
        assert fetch(port, "/health")[0] == 200


def test_it_listens_where_it_was_told_to_and_nowhere_else() -> None:
    port = free_port()
    with Exporter(MetricsConfig(port=port), "a-run"), pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    with Exporter(MetricsConfig(port=port, host="0.0.0.0"), "a-run"):
        socket.create_connection(("127.0.0.2", port), timeout=5).close()


def test_a_port_in_use_is_named_and_waited_for_after_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"metrics.port {port} at metrics.host 127.0.0.1 .* in use; set .* free"):
            Exporter(MetricsConfig(port=port), "a-run")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        monkeypatch.setattr(exporter_module, "_RESTART_PATIENCE_SECONDS", 0.5)
        began = time.monotonic()
        with pytest.raises(ConfigError, match="in use"):
            Exporter(MetricsConfig(port=port), "a-run")
        assert time.monotonic() - began >= 0.5
    with Exporter(MetricsConfig(port=port), "a-run"):
        assert fetch(port, "/health")[0] == 200


def test_a_host_that_is_not_here_is_named() -> None:
    with pytest.raises(ConfigError, match=r"metrics.host 203.0.113.1 can't be served"):
        Exporter(MetricsConfig(port=free_port(), host="203.0.113.1"), "a-run")


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"pip install 'kfac_dist\[metrics\]'"):
        Exporter(MetricsConfig(port=free_port()), "a-run")


def test_the_dashboard_asks_for_metrics_and_labels_that_exist() -> None:
    port = free_port()
    with Exporter(MetricsConfig(port=port), "a-run") as exporter:
        exporter.watch("kfac", 10, lambda: 0.0)
        exporter.publish(READING)
        families = list(text_string_to_metric_families(fetch(port, "/metrics")[1]))
    labels = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    board = json.loads((Path(exporter_module.__file__).parent / DASHBOARD).read_text())
    asked: set[str] = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            names = _metrics_in(target["expr"])
            assert names, panel["title"]
            assert names <= set(labels), panel["title"]
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert shown <= set.union(*(labels[name] for name in names)), panel["title"]
            asked |= names
    (run,) = [variable["definition"] for variable in board["templating"]["list"] if variable["name"] == "run"]
    assert _metrics_in(run) <= set(labels)
    own = {name for name in labels if name.startswith("kfac_dist_")}
    assert own - asked == set(), "every metric has its place on the dashboard"
    places: list[dict[str, Any]] = [panel["gridPos"] for panel in board["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert all(x < 24 for x, _ in cells)


def _metrics_in(query: str) -> set[str]:
    return set(re.findall(r"\b(?:kfac_dist|process)_\w+", query))
