"""A metric sink: each record of `metrics.jsonl` also goes to a table of an SQLite database, a row for each number.

extensions: [examples.extensions.sink]
metrics:
  sinks:
    sqlite: {file: numbers.db}      # in the run's directory

python -m examples.extensions.sink runs/digits_autoencoder/numbers.db loss
"""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path
from typing import Any

from kfac_dist.extensions import Sink, register_sink


class SQLiteSink(Sink):
    """Writes to the table `numbers (step, name, value)`."""

    def __init__(self, directory: Path, first_step: int, file: str = "numbers.db") -> None:
        self._database = sqlite3.connect(directory / file)
        self._database.execute("CREATE TABLE IF NOT EXISTS numbers (step INTEGER, name TEXT, value REAL)")
        self.rewind(first_step)

    def write(self, record: dict[str, Any]) -> None:
        """Add a row for each number."""
        step = record.pop("step")
        self._database.executemany("INSERT INTO numbers VALUES (?, ?, ?)", [(step, *pair) for pair in record.items()])
        self._database.commit()

    def rewind(self, step: int) -> None:
        """Delete records that will be written again."""
        self._database.execute("DELETE FROM numbers WHERE step > ?", (step,))
        self._database.commit()

    def close(self) -> None:
        """Close the database."""
        self._database.close()


register_sink("sqlite", SQLiteSink, api_version=1)


def main() -> None:
    """Print one number of a run, step by step."""
    file, name = sys.argv[1:]
    rows = sqlite3.connect(file).execute("SELECT step, value FROM numbers WHERE name = ? ORDER BY step", (name,))
    for step, value in rows:
        print(step, value)


if __name__ == "__main__":
    main()
