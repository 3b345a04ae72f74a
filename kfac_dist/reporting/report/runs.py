"""What a run has left in its directory, as the report's charts want it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kfac_dist.errors import KFACError
from kfac_dist.reporting.run_file import RunRecord, read_record

_COMPARED = "compare-"


@dataclass(frozen=True)
class RunData:
    """One run, or one of those that it was compared with.

    Attributes:
        name: As the page calls it.
        directory: Where it lies.
        state: What it is doing or how it ended; None if it doesn't say.
        configuration: The text of its `config.yaml`.
        records: Logged steps that have a loss, in order.
        evaluations: Evaluations between them.
        readings: What ranks read at refreshes (`curvature.jsonl`), by step and rank.
        result: Its final figures; None before its end.
    """

    name: str
    directory: Path
    state: RunRecord | None
    configuration: str
    records: Sequence[dict[str, Any]]
    evaluations: Sequence[dict[str, Any]]
    readings: Sequence[dict[str, Any]]
    result: dict[str, Any] | None


def read_run(directory: Path) -> list[RunData]:
    """Return a run and those that it was compared with.

    Raises:
        KFACError: The directory holds no run, or a file of it can't be read.
    """
    if not (directory / "config.yaml").is_file():
        raise KFACError(f"{directory} holds no run: it has no config.yaml; give the directory that `train` named")
    own = _read(directory, directory.name)
    compared = sorted(path for path in directory.glob(f"{_COMPARED}*") if (path / "config.yaml").is_file())
    return [own, *(_read(path, f"{directory.name}: {path.name.removeprefix(_COMPARED)}") for path in compared)]


def _read(directory: Path, name: str) -> RunData:
    records = _records(directory / "metrics.jsonl")
    configuration = (directory / "config.yaml").read_text()
    try:
        yaml.safe_load(configuration)
    except yaml.YAMLError as error:
        raise KFACError(f"{directory / 'config.yaml'} is no YAML: {error}") from error
    return RunData(
        name=name,
        directory=directory,
        state=read_record(directory),
        configuration=configuration,
        records=[record for record in records if "loss" in record],
        evaluations=[record for record in records if "test_loss" in record],
        readings=_records(directory / "curvature.jsonl"),
        result=_result(directory / "result.json"),
    )


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file; a last line that a kill tore is left out, and no file is no records."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise KFACError(f"{path}:{number}: no JSON: {error}") from error
    return records


def _result(path: Path) -> dict[str, Any] | None:
    """Return a run's own figures: the first row where it was compared with others."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise KFACError(f"{path}: no JSON: {error}") from error
    row: dict[str, Any] = found[0] if isinstance(found, list) else found
    return row
