"""`kfac-dist submit`: checks a run, stores the job's files in the run's directory, and calls sbatch.

runs/<name>/
  job.yaml        the configuration, complete: edits of the original don't reach a job that waits
  job.sbatch      the script                          sweep.txt   an array's overrides, one line a task
  job.json        SLURM's number of the job           slurm-<job>.out   what it printed
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from kfac_dist.config.schema import Config
from kfac_dist.config.yaml.document import parse, reported
from kfac_dist.config.yaml.load import dump_yaml, merged
from kfac_dist.config.yaml.text import read_text
from kfac_dist.errors import ConfigError, KFACError
from kfac_dist.reporting.run_file import RunRecord, State, read_record
from kfac_dist.reporting.run_lock import living_holder
from kfac_dist.slurm.job import SlurmJob
from kfac_dist.slurm.queue import UNDER_WAY, WAITING, slurm_state
from kfac_dist.slurm.script import render, template

CONFIG_FILE, SCRIPT_FILE, SWEEP_FILE, JOB_FILE = "job.yaml", "job.sbatch", "sweep.txt", "job.json"


class SubmissionError(KFACError):
    """SLURM is not there, or does not take the job."""


@dataclass(frozen=True)
class Submission:
    """A job, ready to be submitted.

    Attributes:
        directory: The run's directory.
        script: The script for sbatch.
        configuration: The run's configuration, as YAML.
        sweep: Overrides of each task of an array; empty for a job that is none.
    """

    directory: Path
    script: str
    configuration: str
    sweep: tuple[str, ...]


@dataclass(frozen=True)
class SubmittedJob:
    """The contents of `job.json`.

    Attributes:
        job: SLURM's number.
        tasks: Tasks of the array; 0 for a job that is none.
    """

    job: str
    tasks: int


def prepare(config: Config, job: SlurmJob, sweep: Path | None = None, *, python: str = sys.executable) -> Submission:
    """Check everything that can be checked here, and render the script.

    Args:
        config: The run.
        job: The request to SLURM.
        sweep: A file of overrides, one line for each task of an array.
        python: The interpreter that runs the ranks.

    Raises:
        ConfigError: The job, or a line of the sweep, can't be right; or the run is complete, or has a job already, or
            runs.
    """
    job.check()
    directory = Path(config.run.directory) / config.run.name
    record = read_record(directory)
    if record is not None and record.state is State.FINISHED:
        raise ConfigError(
            f"{directory} holds a finished run of {record.total_steps} steps, which a job would only find finished: "
            "give another --name, or move it away"
        )
    # Its job.yaml would change under a job that waits, and two jobs would write into the directory.
    busy = _busy_job(directory, record)
    if busy is not None:
        number, state = busy
        raise ConfigError(
            f"{directory} belongs to job {number}, which SLURM says is {state}: "
            f"scancel {number}, or give another --name"
        )
    holder = living_holder(directory)
    if holder is not None:
        raise ConfigError(f"{directory} is in use by {holder.describe()}: wait for it, or give another --name")
    configuration = dump_yaml(config)
    lines = _sweep_lines(sweep, configuration) if sweep is not None else ()
    script = render(
        template(job.started_by),
        job,
        config=directory / CONFIG_FILE,
        run_directory=directory,
        python=python,
        # A run that is submitted again resumes, unless `checkpoint.resume` says where to start from.
        resume="auto" if config.checkpoint.resume in ("auto", "never") else "",
        sweep=directory / SWEEP_FILE if lines else None,
        tasks=len(lines),
    )
    return Submission(directory, script, configuration, lines)


def submit(submission: Submission) -> str:
    """Store the job's files and hand it to sbatch.

    Returns:
        SLURM's number of the job.

    Raises:
        SubmissionError: There is no sbatch, or it refuses.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise SubmissionError(
            "sbatch: not found; submit from a login node of the cluster, or see the script with --dry-run"
        )
    directory = submission.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).write_text(submission.configuration)
        (directory / SCRIPT_FILE).write_text(submission.script)
        if submission.sweep:
            (directory / SWEEP_FILE).write_text("".join(f"{line}\n" for line in submission.sweep))
        ended = subprocess.run(
            [sbatch, "--parsable", str(directory / SCRIPT_FILE)], capture_output=True, text=True, check=False
        )
        if ended.returncode:
            raise SubmissionError(f"sbatch refuses {directory / SCRIPT_FILE}: {ended.stderr.strip()}")
        job = ended.stdout.strip().partition(";")[0]  # "number;cluster" where there are several
        facts = {"job": job, "submitted": time.time(), "tasks": len(submission.sweep)}
        (directory / JOB_FILE).write_text(json.dumps(facts) + "\n")
    except OSError as error:
        raise SubmissionError(f"{directory}: can't be written: {error}") from error
    return job


def submitted(directory: Path) -> SubmittedJob | None:
    """Return the job that was submitted for a run; None if there was none.

    Raises:
        SubmissionError: Its file can't be read.
    """
    try:
        facts = json.loads(read_text(directory / JOB_FILE))
        return SubmittedJob(str(facts["job"]), int(facts["tasks"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SubmissionError(f"{directory / JOB_FILE}: can't be read: {error}") from error


def _busy_job(directory: Path, record: RunRecord | None) -> tuple[str, str] | None:
    """Return the job that a run waits for or runs in, and SLURM's state of it; None if there is none."""
    job = submitted(directory)
    if job is not None:
        state = slurm_state(job.job)
        if state in WAITING | UNDER_WAY:
            return job.job, state
    # One that was submitted by hand. A run may be over in an allocation that goes on, and may be used for it again.
    if record is not None and record.job is not None:
        state = slurm_state(record.job)
        if state in (WAITING | UNDER_WAY if record.state is State.RUNNING else WAITING):
            return record.job, state
    return None


def _sweep_lines(sweep: Path, configuration: str) -> tuple[str, ...]:
    """Return the overrides of each task, each checked; blank lines and lines that begin with # are left out."""
    try:
        text = read_text(sweep)
    except FileNotFoundError:
        raise ConfigError(f"--sweep {sweep}: can't be read: no such file") from None
    except ConfigError as error:
        raise ConfigError(f"--sweep {error}") from error
    base = parse(configuration, CONFIG_FILE)
    lines, problems = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            merged(base, shlex.split(line))
        except (ConfigError, ValueError) as error:
            problems += [f"{sweep}:{number}: {problem}" for problem in str(error).splitlines()]
        lines.append(line.strip())
    if problems or not lines:
        raise ConfigError(reported(problems or [f"--sweep {sweep}: no line has overrides such as train.steps=100"]))
    return tuple(lines)
