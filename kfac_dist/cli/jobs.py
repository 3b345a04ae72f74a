"""`kfac-dist submit` and `kfac-dist status`: a run as a job of SLURM's."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kfac_dist.cli.configuration import ConfigFile, Overrides, check_targets, load
from kfac_dist.cli.exits import exit_codes
from kfac_dist.slurm.job import Container, SlurmJob, StartedBy
from kfac_dist.slurm.submission import prepare
from kfac_dist.slurm.submission import submit as submit_job


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
        StartedBy,
        typer.Option(
            "--started-by", "--with", help="Launcher of the ranks: torchrun's agents, which restart them, or srun."
        ),
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
    build: Annotated[
        bool, typer.Option("--build", help="Build the model first, also if that calls code of your own.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script, and submit nothing.")] = False,
) -> None:
    """Check a run and submit it to SLURM; it saves and requeues itself before its time is up."""
    with exit_codes():
        resolved = load(config, overrides, {"run.name": name})
        check_targets(resolved, build=build)
        job = SlurmJob(
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


def status(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, such as runs/NAME.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the status as JSON.")] = False,
) -> None:
    """Tell how a run stands: its last step, loss and checkpoint, and its SLURM job if it has one."""
    with exit_codes():
        from kfac_dist.slurm.status import run_statuses

        found = run_statuses(directory)
        print(json.dumps([asdict(run) for run in found]) if as_json else "\n".join(run.describe() for run in found))
