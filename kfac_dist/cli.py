"""The command line: `kfac-dist train|launch|submit|status|plan|calibrate|doctor|…`: reads arguments and hands over.

Every rank of a launcher runs this file by itself. A mistake of the user's ends it with code 2 and one line a mistake,
without a traceback; what the doctor found wrong with code 1; Ctrl-C with code 130; a bug keeps its traceback. What
needs torch is imported inside the commands, so that `--help` and a refused configuration take no time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kfac_dist.config.document import override
from kfac_dist.config.load import load_config, resolve
from kfac_dist.config.schema import Config, Target
from kfac_dist.distributed.place import Place, find_place
from kfac_dist.errors import ConfigError, KFACError
from kfac_dist.launching import LauncherName, launch_command, overrides_in
from kfac_dist.slurm.job import Container, Job, StartedBy
from kfac_dist.slurm.submission import prepare
from kfac_dist.slurm.submission import submit as submit_job

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

NOT_READY = 1
CALIBRATION_SECONDS = 600.0
USER_ERROR = 2
INTERRUPTED = 130
GRACE_SECONDS = 1.0
REPORT_FILE = "report.html"
PIPE_WIDTH = 160
DOCTOR_WIDTH = 110
# What strategies are compared on unless something else is named.
HARDWARE = "h100-ib400"

app = typer.Typer(
    name="kfac-dist",
    help="Train PyTorch models with distributed K-FAC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Device(StrEnum):
    """What computes."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run, such as configs/*.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values that replace the file's: kfac.inversion.damping=0.01"),
]


def main() -> None:
    """Run the command line; never returns."""
    app(prog_name="kfac-dist")


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also train the optimizers under `compare`.")] = False,
    resume: Annotated[
        str | None, typer.Option(help="auto: newest good checkpoint of this run; never; or a checkpoint's path.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; its files go to runs/NAME.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors and the result only.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Show curves, phases and counts while it trains, on a terminal.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Check the configuration, and train nothing.")] = False,
) -> None:
    """Train a model. Start it under torchrun, srun or mpirun (see `launch`) to train on several ranks."""
    with _exit_codes():
        resolved = _load(config, overrides, {"checkpoint.resume": resume, "run.name": name})
        if check:
            _check_targets(resolved)
            if not quiet:
                print(f"{config}: fine")
            return
        if live and quiet:
            raise ConfigError("--live shows progress and --quiet hides it: leave one of them out")
        from kfac_dist.training.run import train as run

        result = run(resolved, compare=compare, quiet=quiet, live=live)
        if not quiet and result.preempted_at is None and find_spec("plotly") is not None and _leads():
            try:
                _write_page([result.directory], result.directory / REPORT_FILE)
            except KFACError as error:  # such as a full disk: the run itself is complete and saved
                print(f"no report: {error}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def launch(
    context: typer.Context,
    config: ConfigFile,
    launcher: Annotated[LauncherName, typer.Option("--with", help="What starts the ranks.", show_default=False)],
) -> None:
    """Train on ranks that torchrun, SLURM, mpirun or DeepSpeed starts.

    Runs the scripts of launch/, whose own options (launch/*.sh --help) and KEY=VALUE overrides follow CONFIG: --with
    torchrun CONFIG --nproc-per-node 2 train.steps=100 --dry-run. With slurm they are those of `kfac-dist submit`.
    """
    with _exit_codes():
        if str(config).startswith("-"):
            raise ConfigError(f"found {str(config)!r}, expected a configuration: options follow it")
        # A mistake is told before the launcher starts, which would wrap it in its own report.
        _load(config, overrides_in(context.args), {})
        launch_command(launcher, config, context.args).replace_this_process()


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    time_limit: Annotated[str, typer.Option("--time", help="Time limit, as SLURM writes it.")] = "1:00:00",
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each node; 0 asks for none.")] = 0,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks on each node; by default one for each GPU, or one.")
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="Cores of each of srun's tasks.")] = None,
    memory: Annotated[str | None, typer.Option("--mem", help="Memory of each node, such as 64G.")] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM's account.")] = None,
    started_by: Annotated[
        StartedBy, typer.Option("--with", help="What starts the ranks: torchrun's agents, which restart them, or srun.")
    ] = StartedBy.TORCHRUN,
    max_restarts: Annotated[int, typer.Option(min=0, help="How often torchrun starts the ranks again.")] = 3,
    stop_seconds: Annotated[int, typer.Option(min=1, help="Seconds before the limit to save and requeue at.")] = 120,
    sweep: Annotated[
        Path | None, typer.Option(help="File of overrides: an array of jobs, one line of KEY=VALUE pairs each.")
    ] = None,
    container_image: Annotated[str, typer.Option(help="Image for pyxis and enroot.")] = "",
    container_mounts: Annotated[
        str, typer.Option(help="SOURCE:TARGET,… of the container; by default this place.")
    ] = "",
    apptainer: Annotated[str, typer.Option(help="Image for apptainer.")] = "",
    setup: Annotated[str, typer.Option(help="Shell command to begin with, such as 'module load cuda'.")] = "",
    option: Annotated[
        list[str] | None, typer.Option(help="Another option of sbatch, such as --qos=high; may be given again.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; its files go to runs/NAME.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script, and submit nothing.")] = False,
) -> None:
    """Check a run and submit it to SLURM; it saves and requeues itself before its time is up."""
    with _exit_codes():
        resolved = _load(config, overrides, {"run.name": name})
        _check_targets(resolved)
        job = Job(
            nodes=nodes,
            time=time_limit,
            gpus_per_node=gpus_per_node,
            ranks_per_node=ranks_per_node,
            cpus_per_task=cpus_per_task,
            memory=memory,
            partition=partition,
            account=account,
            started_by=started_by,
            max_restarts=max_restarts,
            stop_seconds=stop_seconds,
            container=Container(container_image, container_mounts, apptainer),
            setup=setup,
            options=tuple(option or ()),
        )
        submission = prepare(resolved, job, sweep)
        if dry_run:
            print(submission.script, end="")
            return
        number = submit_job(submission)
        print(f"submitted job {number}; kfac-dist status {submission.directory} tells how it stands")


@app.command()
def status(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, such as runs/NAME.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what is known as JSON.")] = False,
) -> None:
    """Tell how a run stands: its last step, loss and checkpoint, and its SLURM job if it has one."""
    with _exit_codes():
        from kfac_dist.slurm.status import run_statuses

        found = run_statuses(directory)
        print(json.dumps([asdict(run) for run in found]) if as_json else "\n".join(run.describe() for run in found))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    world_size: Annotated[
        str, typer.Option(metavar="W[,W…]", help="Ranks that share the work; several compare strategies on each.")
    ] = "2",
    node_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks of one node; all of them, or the hardware's, by default.")
    ] = None,
    strategies: Annotated[
        bool, typer.Option("--strategies", help="Compare strategies on one number of ranks.")
    ] = False,
    hardware: Annotated[
        str | None,
        typer.Option(help="Compare strategies on this: a profile such as h100-ib400, or a file of `calibrate`."),
    ] = None,
) -> None:
    """Show who would measure, invert and precondition what, and what strategies cost, from shapes alone.

    One number of ranks has the plan block by block and rank by rank. Several, --strategies or --hardware have a table
    of strategies: bytes, flops, balance, memory and predicted milliseconds, and the best one to paste.
    """
    with _exit_codes():
        sizes = _world_sizes(world_size)
        resolved = _load(config, overrides, {})
        from rich.console import Console

        console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
        if strategies or hardware is not None or len(sizes) > 1:
            from kfac_dist.planning.comparison import compare
            from kfac_dist.planning.hardware import load_hardware
            from kfac_dist.planning.table import view

            machine = load_hardware(hardware or HARDWARE)
            model = _model_of_shapes(resolved.model).to("meta")
            console.print(view(compare(resolved, model, machine, sizes, node_size or machine.node_size)))
            return
        _show_plan(resolved, sizes[0], node_size, console)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="The file to write, for `plan --hardware FILE`.")] = Path("measured.json"),
    device: Annotated[Device, typer.Option(help="What computes.")] = Device.AUTO,
    name: Annotated[str | None, typer.Option(help="What tables call it; the file's name by default.")] = None,
) -> None:
    """Measure this machine's products, inversions and, under a launcher, its collectives, for `plan`."""
    with _exit_codes():
        from kfac_dist.distributed.bootstrap import bootstrap
        from kfac_dist.distributed.communicator import build_communicator
        from kfac_dist.planning.calibration import calibrate as measure
        from kfac_dist.planning.calibration import write

        with bootstrap(device.value, CALIBRATION_SECONDS) as world:
            communicator = build_communicator(CALIBRATION_SECONDS)
            measured = measure(world, communicator, name=name or out.stem)
            communicator.close()
            if world.rank == 0:
                write(measured, out)
                print(f"measured on {world.describe()}: {out}")


def _world_sizes(text: str) -> list[int]:
    found = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in found):
        raise ConfigError(f"--world-size: found {text!r}, expected numbers of ranks from 1 on, such as 8 or 8,64,512")
    return list(dict.fromkeys(int(part) for part in found))


def _show_plan(resolved: Config, world_size: int, node_size: int | None, console: Console) -> None:
    from kfac_dist.curvature.chain import find_all
    from kfac_dist.preconditioner.class_memory import check_class_memory
    from kfac_dist.preconditioner.memory import rank_bytes
    from kfac_dist.preconditioner.plan import build_plan
    from kfac_dist.preconditioner.plan_table import plan_view
    from kfac_dist.preconditioner.savings import savings

    coverage = find_all(_model_of_shapes(resolved.model), resolved.kfac)
    shards = resolved.engine.shard_size(world_size)
    planned = build_plan(
        coverage.blocks,
        resolved.kfac,
        world_size=world_size,
        local_world_size=node_size or world_size,
        shard_size=shards,
    )
    check_class_memory(planned, resolved.kfac)
    kept = rank_bytes(planned, resolved.kfac, sharded=shards > 1)
    options = savings(
        coverage.blocks,
        resolved.kfac,
        world_size=world_size,
        local_world_size=node_size or world_size,
        shard_size=shards,
    )
    treatment = resolved.kfac.curvature.uncovered
    console.print(plan_view(planned, kept, coverage.uncovered, treatment, options))


@app.command()
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
    """Say what K-FAC does with each parameter, and check data, loss and curvature; code 1 if something is wrong."""
    with _exit_codes():
        resolved = _load(config, overrides, {})
        from kfac_dist.doctor import Wish, examine
        from kfac_dist.doctor.view import print_report

        report = examine(resolved, world_size, Wish(steps, deviation) if fisher else None)
        if _leads():
            if as_json:
                print(report.to_json())
            else:
                print_report(report, width=None if sys.stdout.isatty() else DOCTOR_WIDTH)
    if not report.ready:
        raise typer.Exit(NOT_READY)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs, such as runs/byte-gpt; the first leads.")],
    out: Annotated[
        Path | None, typer.Option(help="The page to write; report.html in the first run's directory by default.")
    ] = None,
) -> None:
    """Write one page on what runs did and why: losses, time by phase, spectra, who inverted what; works offline."""
    with _exit_codes():
        _write_page(runs, out if out is not None else runs[0] / REPORT_FILE)


@app.command("version")
def show_version() -> None:
    """Print the versions that a bug report needs."""
    for package in ("kfac_dist", "torch", "numpy", "deepspeed", "mpi4py"):
        try:
            print(f"{package:10} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:10} not installed")
    print(f"{'python':10} {sys.version.split()[0]}")


def _load(path: Path, overrides: list[str] | None, options: dict[str, str | None]) -> Config:
    """Read the configuration; a command's own options win over everything else."""
    top = [
        override(tuple(key.split(".")), json.dumps(value), f"command line (--{key.rpartition('.')[2]})")
        for key, value in options.items()
        if value is not None
    ]
    return resolve(load_config(path, overrides or (), top=top))


def _check_targets(config: Config) -> None:
    """Find the data, build the model and check the engine: that needs no data's files and no weights' memory."""
    import torch

    from kfac_dist.config.targets import load_target
    from kfac_dist.engines import check_sections
    from kfac_dist.tasks import DATA

    on_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
    check_sections(config.engine, config.train, on_cpu=on_cpu)
    load_target(config.data, DATA, "data")
    _model_of_shapes(config.model)


def _model_of_shapes(target: Target) -> nn.Module:
    """Build a model without memory for its weights where its code allows that."""
    import torch

    from kfac_dist.tasks import build_model

    try:
        with torch.device("meta"):
            return build_model(target)
    except ConfigError:  # perhaps because it reads values, which a tensor without memory hasn't
        return build_model(target)


def _write_page(directories: list[Path], path: Path) -> None:
    from kfac_dist.reporting.report import read_runs, write_report

    write_report(read_runs(directories), path)
    print(f"report: {path}")


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except KFACError as error:
        _report(error)
        raise typer.Exit(USER_ERROR) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _report(error: KFACError) -> None:
    """Print an error: once a host where its ranks must have the same one, else on each rank with its number."""
    place = _place()
    distributed = place is not None and place.world_size > 1
    same_everywhere = isinstance(error, ConfigError)
    if place is None or not (distributed and same_everywhere and place.local_rank != 0):
        label = f"error [rank {place.rank}]" if place and distributed and not same_everywhere else "error"
        from kfac_dist.reporting.live import others_lines

        with others_lines(sys.stderr):
            # One write, so that ranks that share a terminal don't cut each other's lines.
            sys.stderr.write("".join(f"{label}: {line}\n" for line in str(error).splitlines()))
            sys.stderr.flush()
    if distributed:
        # A launcher ends all ranks once one has exited: each gets time to say why, and to exit with its own code.
        # Ignored rather than handled, because Python drops its handlers before a process is really over.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(GRACE_SECONDS)


def _leads() -> bool:
    place = _place()
    return place is None or place.rank == 0


def _place() -> Place | None:
    """This process's place among the ranks; None where the launcher contradicts itself, which is then the error."""
    try:
        return find_place(os.environ)
    except ConfigError:
        return None
