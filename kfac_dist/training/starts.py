"""The beginning of a run: the directory that it takes, and the checkpoint that it goes on from."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kfac_dist.config.schema import RunConfig, TrainConfig
from kfac_dist.distributed.communicators.agreement import agreed
from kfac_dist.errors import CheckpointError, ConfigError
from kfac_dist.reporting.live import tell
from kfac_dist.reporting.progress import ProgressDisplay
from kfac_dist.reporting.run_file import write_whole
from kfac_dist.training.checkpoints.checkpoint import Checkpoint, Checkpoints, read_manifest
from kfac_dist.training.checkpoints.differences import differences
from kfac_dist.training.recovery.restarts import JobHistory


def run_directory(run: RunConfig) -> Path:
    """Return the directory of a run's files."""
    return Path(run.directory) / run.name


def take_directory(
    directory: Path, written: str, progress: ProgressDisplay, *, anew: bool, overwrite: bool = False
) -> Path | None:
    """Make room for a run, and write its configuration.

    Args:
        directory: Directory of its files.
        written: Its configuration as YAML.
        progress: Shows what becomes of an earlier run.
        anew: Whether what is in the directory is no part of the run; see `begins_anew`.
        overwrite: Delete an earlier run instead of moving it.

    Returns:
        Where an earlier run of its name has gone, if there was one to move.

    Raises:
        ConfigError: Something else is in its place.
    """
    earlier = None
    if directory.exists() and anew:
        earlier = _make_room(directory, progress, overwrite=overwrite)
    if os.path.lexists(directory) and not directory.is_dir():
        raise ConfigError(f"{directory}: is no directory: move it away, or give another --name")
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "config.yaml", written)
    return earlier


def _make_room(directory: Path, progress: ProgressDisplay, *, overwrite: bool = False) -> Path | None:
    """Move an earlier run out of the way, or delete it; returns where it has gone."""
    if overwrite:
        _delete_run(directory)
        tell(f"deleted the earlier run in {directory} (--overwrite)", progress)
        return None
    earlier = _free_name(directory)
    directory.rename(earlier)
    tell(f"moved the earlier run in {directory} to {earlier}", progress)
    return earlier


def begins_anew(directory: Path, resume: str, job: JobHistory) -> bool:
    """Whether a directory holds an earlier run, not the one that starts."""
    if job.began(directory / "checkpoints"):
        return False
    match resume:
        case "never":
            return True
        case "auto":
            return False
        case path:  # another run's checkpoint: this run's name may have belonged to a third one
            return not Path(path).resolve().is_relative_to(directory.resolve())


def _free_name(directory: Path) -> Path:
    """Return the next of `x.previous`, `x.previous.2`, `x.previous.3` …: the last is the newest."""
    first = directory.with_name(directory.name + ".previous")
    pattern = re.compile(re.escape(first.name) + r"(?:\.(\d+))?")
    found = [match for path in directory.parent.iterdir() if (match := pattern.fullmatch(path.name))]
    number = max((int(match[1] or 1) for match in found), default=0) + 1
    return first if number == 1 else first.with_name(f"{first.name}.{number}")


def _delete_run(directory: Path) -> None:
    """Delete a run.

    Raises:
        ConfigError: The directory holds something else, or is a link to elsewhere.
    """
    if directory.is_symlink() or not (directory / "config.yaml").is_file():
        raise ConfigError(f"--overwrite: {directory} holds no run; remove it yourself, or give another --name")
    shutil.rmtree(directory)


def find_start(resume: str, checkpoints: Checkpoints, job: JobHistory) -> Checkpoint | None:
    """Return the checkpoint that a run goes on from, if any; collective.

    Args:
        resume: `never`, `auto`, or a checkpoint.
        checkpoints: The run's own.
        job: Whether its launcher has started it before.

    Raises:
        CheckpointError: The one that is named can't be read.
    """
    own = checkpoints.newest(own=True) if job.restarted else None
    start = own or _configured_start(resume, checkpoints)
    if start is not None:  # what is newer is damaged or left behind, and must not count among the newest that are kept
        checkpoints.set_aside(start.step)
    return start


def _configured_start(resume: str, checkpoints: Checkpoints) -> Checkpoint | None:
    match resume:
        case "never":
            return None
        case "auto":
            return checkpoints.newest()
        case path:
            with agreed(checkpoints.communicator, CheckpointError, f"can't read {path}"):
                start = read_manifest(Path(path))
            checkpoints.verify(start)
            return start


def surprises(
    settings: TrainConfig, samples: int, total_steps: int, start: Checkpoint | None, values: Mapping[str, Any]
) -> Iterator[str]:
    """Yield a run's deviations from its configuration or its checkpoint.

    Args:
        settings: The run's steps and batches.
        samples: Of its training data.
        total_steps: Its length.
        start: The checkpoint that it goes on from.
        values: Its configuration as plain values.
    """
    if settings.batch_size > samples:
        yield f"train.batch_size {settings.batch_size} is more than the training data has: a step takes all {samples}"
    if settings.batch_growth is not None and settings.batch_growth.final > samples:
        grown = settings.batch_growth.final
        yield f"train.batch_growth.final {grown} is more than the training data has: batches grow to {samples}"
    if start is None:
        return
    changed = differences(start.facts.get("config", {}), values)
    if changed:
        yield f"differs from the checkpoint: {', '.join(map(str, changed))}"
    if start.step >= total_steps:
        length = "train.steps" if settings.steps is not None else f"the steps of train.epochs {settings.epochs}"
        yield (
            f"{start.path} has done {start.step} steps, and {length} {'is' if settings.steps else 'are'} "
            f"{total_steps}: nothing is left to train"
        )
