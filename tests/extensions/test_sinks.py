"""The registered sink of `examples/extensions/sink.py` beside a run's own records, and sinks that fail."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from examples.extensions import sink as sink_example
from kfac_dist.cli.configuration import check_targets
from kfac_dist.config.yaml.load import load_config
from kfac_dist.errors import ConfigError, KFACError
from kfac_dist.extensions import ExtensionError, Sink, register_sink
from kfac_dist.training import train
from kfac_dist.training.records.metrics import MetricsWriter, read_metrics
from tests.extensions.parts import ONE_AND_TWO, as_launched, run_file
from tests.harness import run_ranks
from tests.training.runs import small_config

assert sink_example.SQLiteSink  # registered by its import


def train_with_sink(directory: str, steps: int, changes: dict[str, Any]) -> list[float]:
    """A run whose numbers go to the database."""
    as_launched()
    config = small_config(
        directory,
        kfac=True,
        train={"steps": steps, "evaluate_every": 4},
        metrics={"sinks": {"sqlite": {"file": "own.db"}}},
        **changes,
    )
    return [run.test_loss for run in train(config, quiet=True).runs]


def stored(path: Path) -> list[tuple[int, str, float]]:
    """The database's rows, in the order in which they came."""
    return sqlite3.connect(path).execute("SELECT step, name, value FROM numbers ORDER BY rowid").fetchall()


def rows(records: list[dict[str, Any]]) -> list[tuple[int, str, float]]:
    return [(record["step"], name, value) for record in records for name, value in record.items() if name != "step"]


@ONE_AND_TWO
def test_the_sink_receives_the_records_of_the_run(ranks: int, tmp_path: Path) -> None:
    """Also of one that goes on after an end: what it logs again isn't there twice."""
    run_ranks(ranks, train_with_sink, str(tmp_path), 8, {"checkpoint": {"every": 8}})
    written = read_metrics(tmp_path / "small/metrics.jsonl")
    assert len(written) >= 8
    assert stored(tmp_path / "small/own.db") == rows(written)
    again = {"checkpoint": {"every": 8, "resume": "auto"}}
    run_ranks(ranks, train_with_sink, str(tmp_path), 12, again)
    written = read_metrics(tmp_path / "small/metrics.jsonl")
    assert [record["step"] for record in written if "loss" in record] == list(range(1, 13))
    assert stored(tmp_path / "small/own.db") == rows(written)


class Full(Sink):
    """Takes some records."""

    def __init__(self, directory: Path, first_step: int, *, most: int, closes: bool = True) -> None:
        self.records: list[dict[str, Any]] = []
        self.most = most
        self.closes = closes

    def write(self, record: dict[str, Any]) -> None:
        if len(self.records) == self.most:
            raise ValueError("no room")
        self.records.append(record)

    def close(self) -> None:
        if not self.closes:
            raise TypeError("not open")


register_sink("full", Full, api_version=1)


def test_a_sink_that_fails_ends_the_run_on_every_rank(tmp_path: Path) -> None:
    """And the file has what came before."""
    said = run_ranks(2, fails, str(tmp_path))
    assert said[0] == "metrics.sinks.full: its write raises ValueError: no room"
    assert "rank 0: metrics.sinks.full: its write raises ValueError: no room" in said[1]
    assert len(read_metrics(tmp_path / "small/metrics.jsonl")) >= 3


def fails(directory: str) -> str:
    as_launched()
    with pytest.raises(KFACError) as error:
        train(small_config(directory, metrics={"sinks": {"full": {"most": 2}}}), quiet=True)
    return str(error.value)


def test_a_record_is_the_sinks_own_and_has_none_where_json_has_null(tmp_path: Path) -> None:
    sinks = {"one": Full(tmp_path, 0, most=9), "two": Full(tmp_path, 0, most=9, closes=False)}
    writer = MetricsWriter(tmp_path, 0, sinks)
    writer.write({"step": 1, "loss": math.inf, "rate": 2.0})
    assert sinks["one"].records == sinks["two"].records == [{"step": 1, "loss": None, "rate": 2.0}]
    sinks["one"].records[0].clear()
    assert sinks["two"].records[0]["step"] == 1
    with pytest.warns(UserWarning, match="metrics.sinks.two: its close raises TypeError: not open"):
        writer.close()


@pytest.mark.parametrize(
    ("sinks", "said"),
    [
        (
            "{sqllite: {}}",
            "metrics.sinks.sqllite: found 'sqllite'; did you mean 'sqlite'?; registered by the modules under",
        ),
        ("{sqlite: null}", "metrics.sinks.sqlite: found null, expected a mapping"),
    ],
)
def test_an_unknown_sink_is_refused(sinks: str, said: str, tmp_path: Path) -> None:
    path = run_file(tmp_path, "examples.extensions.sink")
    path.write_text(path.read_text() + f"metrics:\n  sinks: {sinks}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}:10: {said}")


@pytest.mark.parametrize(
    ("sinks", "said"),
    [
        ({"sqlite": {"fil": "x"}}, "metrics.sinks.sqlite: got an unexpected keyword argument 'fil'"),
        ({"full": {}}, "metrics.sinks.full: missing a required argument: 'most'"),
    ],
)
def test_a_check_compares_a_sinks_arguments_and_makes_none(sinks: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = small_config(tmp_path, metrics={"sinks": sinks})
    with pytest.raises(ConfigError) as error:
        check_targets(config)
    assert str(error.value) == said
    check_targets(small_config(tmp_path, metrics={"sinks": {"sqlite": {}, "full": {"most": 1}}}))
    assert list(tmp_path.iterdir()) == []


class Speechless(Sink):
    """Lacks its method."""


@pytest.mark.parametrize(
    ("name", "sink", "said"),
    [
        ("sqlite", Full, "the name 'sqlite' is taken, as are full, sqlite: choose another"),
        ("Own Sink", Full, "found the name 'Own Sink'; expected lower-case letters, digits and '_'"),
        (3, Full, "found the name 3; expected lower-case"),
        ("own", Speechless, "Speechless lacks methods: write write"),
        ("own", dict, "dict must derive from kfac_dist.extensions.Sink"),
        ("own", 5, "found 5 for 'own'; expected a class that derives from Sink"),
        ("own", lambda directory: None, "'own' can't be made of (directory, first_step): too many positional"),
    ],
)
def test_no_sink_is_refused(name: Any, sink: Any, said: str) -> None:
    with pytest.raises(ExtensionError) as error:
        register_sink(name, sink, api_version=1)
    assert str(error.value).startswith(f"register_sink: {said}")
    assert "\n" not in str(error.value)
