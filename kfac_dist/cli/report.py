"""`kfac-dist report`: one page about one or several runs, which `kfac-dist train` also writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kfac_dist.cli.exits import exit_codes

REPORT_FILE = "report.html"


def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs, such as runs/byte-gpt; the first leads.")],
    out: Annotated[
        Path | None, typer.Option(help="The page to write; report.html in the first run's directory by default.")
    ] = None,
) -> None:
    """Write one HTML page about runs: losses, time by phase, spectra, owners of inverses; works offline."""
    with exit_codes():
        write_page(runs, out if out is not None else runs[0] / REPORT_FILE)


def write_page(directories: list[Path], path: Path) -> None:
    """Write the page of some runs, and say where it is.

    Raises:
        KFACError: A directory holds no run, or the page can't be written.
    """
    from kfac_dist.reporting.report import read_runs, write_report

    write_report(read_runs(directories), path)
    print(f"report: {path}")
