"""`kfac-dist train` and `kfac-dist launch`: a run on ranks that are there, or on ranks that are started for it."""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from kfac_dist.cli.configuration import ConfigFile, Overrides, check_targets, load
from kfac_dist.cli.exits import end_at_once, exit_codes, insist, interrupted_code, launched, leads
from kfac_dist.cli.report import REPORT_FILE, write_page
from kfac_dist.errors import ConfigError, KFACError
from kfac_dist.launching import LauncherName, launch_command, overrides_in


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also train the optimizers under `compare`.")] = False,
    resume: Annotated[
        str | None, typer.Option(help="auto: newest good checkpoint of this run; never; or a checkpoint's path.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; its files go to runs/NAME.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an earlier run of this name instead of moving it.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors and the result only.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Show curves, phases and counts while it trains, on a terminal.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Check the configuration, and train nothing. Code that it names is not called."),
    ] = False,
    build: Annotated[
        bool, typer.Option("--build", help="With --check: build the model, also if that calls code of your own.")
    ] = False,
) -> None:
    """Train a model. Start it under torchrun, srun or mpirun (see `launch`) to train on several ranks."""
    with exit_codes():
        resolved = load(config, overrides, {"checkpoint.resume": resume, "run.name": name})
        if check:
            check_targets(resolved, build=build)
            if not quiet:
                left = f"; {resolved.model.name} was found, and not called: --build does" if not build else ""
                print(f"{config}: fine{left if resolved.model.is_code else ''}")
            return
        if build:
            raise ConfigError("--build belongs to --check: a run builds its model anyway")
        if live and quiet:
            raise ConfigError("--live shows progress and --quiet hides it: leave one of them out")
        if overwrite and resolved.checkpoint.resume != "never":
            raise ConfigError(
                f"--overwrite deletes the run that --resume {resolved.checkpoint.resume} resumes: leave one out"
            )
        from kfac_dist.training.run import train as run

        result = run(
            resolved,
            compare=compare,
            quiet=quiet,
            live=live,
            overwrite=overwrite,
            go_on=_go_on(),
            on_lost=insist,
            on_second_interrupt=end_at_once,
        )
        if result.interrupted:
            raise typer.Exit(interrupted_code())
        if not quiet and result.preempted_at is None and leads():
            if find_spec("plotly") is None:
                print(
                    "no report: its charts need plotly (pip install plotly); then: kfac-dist report", result.directory
                )
                return
            try:
                write_page([result.directory], result.directory / REPORT_FILE)
            except KFACError as error:  # such as a full disk: the run itself is complete and saved
                print(f"no report: {error}")


def _go_on() -> str:
    """Return the command that resumes this run; "" under a launcher, which was started by another command."""
    if launched():
        return ""
    words, skips = [], False
    for word in sys.argv[1:]:
        # Where it began no longer matters.
        if not skips and word != "--overwrite" and not word.startswith(("--resume=", "checkpoint.resume=")):
            skips = word == "--resume"
            words += [] if skips else [word]
        else:
            skips = False
    return shlex.join(["kfac-dist", *words, "--resume", "auto"])


def launch(
    context: typer.Context,
    config: ConfigFile,
    launcher: Annotated[LauncherName, typer.Option("--with", help="Launcher of the ranks.", show_default=False)],
) -> None:
    """Train on ranks that torchrun, SLURM, mpirun or DeepSpeed starts.

    Runs the scripts of launch/, whose own options (launch/*.sh --help) and KEY=VALUE overrides follow CONFIG: --with
    torchrun CONFIG --nproc-per-node 2 train.steps=100 --dry-run. With slurm they are those of `kfac-dist submit`.
    """
    with exit_codes():
        if str(config).startswith("-"):
            raise ConfigError(f"found {str(config)!r}, expected a configuration: options follow it")
        # Report mistakes before the launcher starts, which would wrap them in its own report.
        load(config, overrides_in(context.args), {})
        launch_command(launcher, config, context.args).replace_this_process()
