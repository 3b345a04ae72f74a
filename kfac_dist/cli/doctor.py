"""`kfac-dist doctor`: K-FAC's treatment of a run's parameters, and checks of it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kfac_dist.cli.configuration import ConfigFile, Overrides, load
from kfac_dist.cli.exits import NOT_READY, exit_codes, leads

DOCTOR_WIDTH = 110


def doctor(
    config: ConfigFile,
    overrides: Overrides = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks to plan for; by default those that a launcher started, or 1.")
    ] = None,
    fisher: Annotated[
        bool, typer.Option("--fisher", help="Also compare two estimators of the diagonal Fisher, layer by layer.")
    ] = False,
    steps: Annotated[
        int,
        typer.Option(min=0, help="With --fisher: steps to train and follow their variance over.", show_default=True),
    ] = 20,
    deviation: Annotated[
        float, typer.Option(min=0.001, help="With --fisher: relative standard deviation to count labels for.")
    ] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show K-FAC's treatment of each parameter, and check data, loss and curvature; code 1 if something is wrong.

    Builds model and data and runs them: code that the configuration names is called.
    """
    with exit_codes():
        resolved = load(config, overrides, {})
        from kfac_dist.doctor import FisherRequest, examine
        from kfac_dist.doctor.view import print_report

        report = examine(resolved, world_size, FisherRequest(steps, deviation) if fisher else None)
        if leads():
            if as_json:
                print(report.to_json())
            else:
                print_report(report, width=None if sys.stdout.isatty() else DOCTOR_WIDTH)
    if not report.ready:
        raise typer.Exit(NOT_READY)
