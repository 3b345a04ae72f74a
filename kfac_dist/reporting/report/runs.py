"""The files of a run's directory, as the report's charts want them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kfac_dist.errors import KFACError
from kfac_dist.reporting.run_file import RunRecord, read_record

_COMPARED = "compare-"
# More points than this say no more, and make a page that a browser draws slowly.
_POINTS = 2000


@dataclass(frozen=True)
class RunData:
    """One run, or a run that it was compared with.

    Attributes:
        name: As the page calls it.
        directory: Its directory.
        state: Its state or end; None if unknown.
        configuration: The text of its `config.yaml`.
        records: Logged steps in order; of a long run as many together as make few enough points. One whose steps were
            all skipped has no loss.
        evaluations: Evaluations between them.
        readings: Ranks' readings at refreshes (`curvature.jsonl`), by step and rank.
        result: Its final figures; None before its end.
        game: Whether it is a game, whose evaluations judge samples, by other figures than a loss.
    """

    name: str
    directory: Path
    state: RunRecord | None
    configuration: str
    records: Sequence[dict[str, Any]]
    evaluations: Sequence[dict[str, Any]]
    readings: Sequence[dict[str, Any]]
    result: dict[str, Any] | None
    game: bool


def read_runs(directories: Sequence[Path]) -> list[RunData]:
    """Return runs, each followed by the ones that it was compared with; a directory given twice counts once.

    They are called by their directories' names, or by the whole paths where names would be the same.

    Raises:
        KFACError: A directory holds no run, or a file of it can't be read.
    """
    chosen = list(dict.fromkeys(directory.resolve() for directory in directories))
    names = [directory.name for directory in chosen]
    return [
        run
        for directory, name in zip(chosen, names, strict=True)
        for run in read_run(directory, name if names.count(name) == 1 else str(directory))
    ]


def read_run(directory: Path, name: str | None = None) -> list[RunData]:
    """Return a run and the runs that it was compared with.

    Args:
        directory: Of the run.
        name: Its name; by default its directory's.

    Raises:
        KFACError: The directory holds no run, or a file of it can't be read.
    """
    if not (directory / "config.yaml").is_file():
        raise KFACError(f"{directory} holds no run: it has no config.yaml; give the directory that `train` named")
    name = name or directory.resolve().name
    compared = sorted(path for path in directory.glob(f"{_COMPARED}*") if (path / "config.yaml").is_file())
    return [
        _read(directory, name),
        *(_read(path, f"{name}: {path.name.removeprefix(_COMPARED)}") for path in compared),
    ]


def _read(directory: Path, name: str) -> RunData:
    records = _records(directory / "metrics.jsonl")
    configuration = _text(directory / "config.yaml")
    try:
        values = yaml.safe_load(configuration)
    except (yaml.YAMLError, RecursionError) as error:
        raise KFACError(f"{directory / 'config.yaml'} is no YAML: {error}") from error
    return RunData(
        name=name,
        directory=directory,
        state=read_record(directory),
        configuration=configuration,
        records=_thinned([record for record in records if "test_loss" not in record]),
        evaluations=[record for record in records if "test_loss" in record],
        readings=_records(directory / "curvature.jsonl"),
        result=_result(directory / "result.json"),
        game=isinstance(values, dict) and values.get("game") is not None,
    )


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file; a last line that a kill tore is left out, and no file is no records."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(_text(path).splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise KFACError(f"{path}:{number}: no JSON: {error}") from error
        if not isinstance(record, dict):
            raise KFACError(f"{path}:{number}: expected a JSON object, found {line.strip()[:40]}")
        records.append(record)
    return records


def _thinned(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most `_POINTS` records: the last of as many in a row, with the mean of their losses, and all skips."""
    together = -(-len(records) // _POINTS)
    if together <= 1:
        return records
    return [_together(records[start : start + together]) for start in range(0, len(records), together)]


def _together(records: list[dict[str, Any]]) -> dict[str, Any]:
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    skipped = sum(record.get("skipped", 0) for record in records)
    return records[-1] | ({"loss": sum(losses) / len(losses)} if losses else {}) | {"skipped": skipped}


def _result(path: Path) -> dict[str, Any] | None:
    """Return a run's own figures: the first row where it was compared with others."""
    if not path.exists():
        return None
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise KFACError(f"{path}: no JSON: {error}") from error
    row = found[0] if isinstance(found, list) and found else found
    if not isinstance(row, dict):
        raise KFACError(f"{path}: expected a JSON object or a list of them, found {str(found)[:40]}")
    return row


def _text(path: Path) -> str:
    if not path.is_file():
        raise KFACError(f"{path}: is no regular file: move it away")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KFACError(f"{path}: can't be read: {error}") from error


def readings_of_factors(run: RunData) -> Iterator[tuple[dict[str, Any], float]]:
    """Yield every reading of a factor, and its milliseconds: its share by n³ of the whole solve."""
    for reading in run.readings:
        total = sum(factor["cost"] for factor in reading["factors"]) or 1.0
        for factor in reading["factors"]:
            yield factor, 1000 * reading["seconds"] * factor["cost"] / total


def by_factor(run: RunData) -> dict[str, list[dict[str, Any]]]:
    """Return the readings of every factor, by its name."""
    factors: dict[str, list[dict[str, Any]]] = {}
    for factor, _ in readings_of_factors(run):
        factors.setdefault(factor["unit"], []).append(factor)
    return {unit: factors[unit] for unit in sorted(factors, key=numbered)}


def numbered(name: str) -> list[tuple[int, str]]:
    """Return a sort key of names, so that layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
