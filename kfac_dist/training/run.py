"""`train(config)`: a whole run, from the process group to the picture, and the runs that it is compared with.

    runs/<name>/
      config.yaml      the resolved configuration      metrics.jsonl, tensorboard/   what was logged
      checkpoints/     see `training.checkpoint`       loss.png                      losses per step and second
      result.json      final figures                   compare-<entry>/              the same for each compared run
      relative_variance.json    if wanted: how noisy each parameter's gradient was at the end
      state.json       running, preempted, interrupted, finished or failed
      curvature.jsonl  spectra of the factors          report.html   all of it on one page, from `kfac-dist train`

Beside it `runs/<name>.lock` tells whose it is (`reporting.run_lock`). A fresh run moves the files of an earlier one of
its name to `runs/<name>.previous`, then `.previous.2` and so on, and says so; one whose launcher started it again goes
on with its own (see `training.job`). SIGTERM, SIGUSR1 or Ctrl-C on any rank makes all of them save a checkpoint and
return.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from kfac_dist.config.schema import Config, MetricsConfig, OptimizerConfig, StepSolver
from kfac_dist.config.yaml.load import dump_yaml
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.distributed.communicators.straggler_watch import Watch
from kfac_dist.distributed.startup.agents import AgentWatch
from kfac_dist.distributed.startup.bootstrap import World, bootstrap
from kfac_dist.distributed.startup.rank_info import find_rank_info
from kfac_dist.errors import CheckpointError, CollectiveError, ConfigError
from kfac_dist.reporting.curves import Curve, draw_losses
from kfac_dist.reporting.exporter import Exporter
from kfac_dist.reporting.live import build_progress, others_lines
from kfac_dist.reporting.progress import ProgressDisplay, SilentProgress
from kfac_dist.reporting.run_file import RunFile, write_whole
from kfac_dist.reporting.run_lock import RunLock
from kfac_dist.reporting.sinks import build_sinks
from kfac_dist.reporting.summary import RunSummary, result_table
from kfac_dist.training.agreement import agreed
from kfac_dist.training.checkpoints.checkpoint import Checkpoint, Checkpoints, read_manifest
from kfac_dist.training.checkpoints.differences import differences
from kfac_dist.training.loop import DivergedError, RunOutputs, Trainer
from kfac_dist.training.records.metrics import MetricsWriter, read_metrics
from kfac_dist.training.records.monitor import Monitor, last_saved
from kfac_dist.training.records.variance import describe_variances, write_variances
from kfac_dist.training.recovery.preemption import Preempted, StopSignals
from kfac_dist.training.recovery.restarts import JobHistory, find_job
from kfac_dist.training.setup import RunParts, build_parts

# Of a result table that no terminal shows: a file has room for all of its columns.
PIPE_WIDTH = 160


@dataclass(frozen=True)
class TrainResult:
    """Outcome of `train`.

    Attributes:
        directory: Where its files are.
        runs: The run itself, then those that it was compared with; without those that it didn't come to.
        preempted_at: Step at which it was told to stop, its state saved; None if it is complete.
        interrupted: Whether it was Ctrl-C that stopped it.
    """

    directory: Path
    runs: tuple[RunSummary, ...]
    preempted_at: int | None = None
    interrupted: bool = False


@dataclass(frozen=True)
class Session:
    """The parts that all runs of one call of `train` share."""

    world: World
    communicator: Communicator
    progress: ProgressDisplay
    signals: StopSignals
    watch: Watch
    job: JobHistory
    lock: RunLock | None
    exporter: Exporter | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and speaks to the user."""
        return self.communicator.rank == 0


def train(
    config: Config,
    *,
    compare: bool = False,
    quiet: bool = False,
    live: bool = False,
    overwrite: bool = False,
    go_on: str = "",
    on_lost: Callable[[CollectiveError], object] | None = None,
    on_second_interrupt: Callable[[], object] | None = None,
) -> TrainResult:
    """Train as configured; called by every rank.

    Args:
        config: The run, resolved (`kfac_dist.config.yaml.load.resolve`).
        compare: Train each optimizer under `compare` too, without K-FAC, on the same data from the same weights.
        quiet: Show no progress.
        live: Show progress as a view of its curves, phases and counts, where standard output is a terminal.
        overwrite: Delete an earlier run of this name instead of moving it.
        go_on: The command that goes on with a run that was interrupted, told to the user.
        on_lost: Told at once that other ranks are gone or stand still; what is closed before this function raises may
            wait for them.
        on_second_interrupt: Ends the process at once; without it, a second Ctrl-C is a KeyboardInterrupt.

    Raises:
        KFACError: The run can't start or go on; every rank raises.
        KeyboardInterrupt: Ctrl-C, while there was nothing to save.
    """
    with _session(config, quiet=quiet, live=live, on_lost=on_lost, end=on_second_interrupt) as session:
        directory = _directory(config)
        session.watch.at(f"preparing {directory}")
        earlier = None
        with agreed(session.communicator, what=f"can't prepare {directory}"):
            if session.leads:
                earlier = _prepare(directory, config, session, overwrite=overwrite)
        record = RunFile(directory if session.leads else None, session.communicator.size, earlier)
        session.signals.last_words = record.cut_short
        runs: list[RunSummary] = []
        with record.failures(), _interruptible(session), session.watch.explaining():
            try:
                _train_all(config, compare, directory, session, record, runs)
            except Preempted as stop:
                return _preempted(stop, directory, session, record, runs, go_on)
        return TrainResult(directory, tuple(runs))


@contextmanager
def _session(
    config: Config,
    *,
    quiet: bool,
    live: bool,
    on_lost: Callable[[CollectiveError], object] | None,
    end: Callable[[], object] | None,
) -> Iterator[Session]:
    place = find_rank_info(os.environ)
    signals = StopSignals(end, _say if place.rank == 0 else lambda line: None)
    with AgentWatch(place), signals, bootstrap(config.run.device, config.run.timeout_seconds) as world:
        communicator = build_communicator(config.run.timeout_seconds)
        progress = build_progress(rank=world.rank, quiet=quiet, live=live, run=config.run.name)
        progress.note(world.describe())
        try:
            watch = Watch(world.store, world.rank, world.world_size, on_lost=on_lost)
            with watch, watch.explaining(), _exporter(config, communicator) as exporter:
                if exporter is not None:
                    progress.note(f"metrics at http://{exporter.address}/metrics")
                job = find_job(world, communicator)
                with _locked(_directory(config), job, communicator, progress.note) as lock:
                    yield Session(world, communicator, progress, signals, watch, job, lock, exporter)
        finally:
            progress.stop()
            communicator.close()


@contextmanager
def _locked(
    directory: Path, job: JobHistory, communicator: Communicator, note: Callable[[str], None]
) -> Iterator[RunLock | None]:
    """Take the run's directory, on rank 0 for all ranks, before anything in it is touched; collective."""
    with ExitStack() as stack:
        lock = None
        with agreed(communicator, ConfigError, f"can't lock {directory}"):
            if communicator.rank == 0:
                lock = stack.enter_context(RunLock(directory, job.name, restarted=job.restarted, note=note))
        yield lock


@contextmanager
def _interruptible(session: Session) -> Iterator[None]:
    """Take ranks that are lost after Ctrl-C for those that heard it a moment before."""
    try:
        yield
    except CollectiveError as error:
        if session.signals.interrupted:
            raise KeyboardInterrupt from error
        raise


def _say(line: str) -> None:
    with others_lines(sys.stderr):
        print(line, file=sys.stderr, flush=True)


def _directory(config: Config) -> Path:
    return Path(config.run.directory) / config.run.name


@contextmanager
def _exporter(config: Config, communicator: Communicator) -> Iterator[Exporter | None]:
    """Serve rank 0's metrics, if the configuration asks for it, for all runs of a session."""
    exporter = None
    with agreed(communicator, ConfigError):
        if config.metrics.port is not None and communicator.rank == 0:
            exporter = Exporter(config.metrics, config.run.name)
    with exporter or nullcontext():
        yield exporter


def _train_all(
    config: Config, compare: bool, directory: Path, session: Session, record: RunFile, runs: list[RunSummary]
) -> None:
    """Train the run and those that it is compared with, one after the other, into `runs`."""
    with agreed(session.communicator, what=f"can't write {directory}"):
        record.running()
    solver = config.kfac.solver
    name = "kfac" if solver is StepSolver.DIRECT else f"kfac-{solver}"
    name = name if config.kfac.enabled else str(config.first_order.name)
    runs.append(_train_one(config, name, directory, session, record))
    for entry, optimizer in config.compare.items() if compare else ():
        runs.append(_train_compared(config, entry, optimizer, directory, session, record))
    session.watch.at("writing the results")
    with agreed(session.communicator, what=f"can't finish {directory}"):
        if session.leads:
            _report(config, runs, directory, session.progress)
        record.finished()


def _preempted(
    stop: Preempted, directory: Path, session: Session, record: RunFile, runs: list[RunSummary], go_on: str
) -> TrainResult:
    caught = session.communicator.gather_objects(session.signals.caught, label="preemption")
    # Ctrl-C ends a run for good, whatever else its ranks were told.
    interrupted = "SIGINT" in caught
    rank, name = next((rank, name) for rank, name in enumerate(caught) if name and (name == "SIGINT") == interrupted)
    with agreed(session.communicator, what=f"can't write {directory}"):
        (record.interrupted if interrupted else record.preempted)(stop.step, f"{name} on rank {rank}")
        if session.leads:
            verb = "interrupted" if interrupted else "preempted"
            command = f"go on with: {go_on}" if go_on and interrupted else f"--resume auto continues {directory}"
            print(f"{verb} at step {stop.step} by {name} on rank {rank}; {command}", flush=True)
    return TrainResult(directory, tuple(runs), preempted_at=stop.step, interrupted=interrupted)


def _train_one(config: Config, name: str, directory: Path, session: Session, record: RunFile) -> RunSummary:
    checkpoints = Checkpoints(
        directory / "checkpoints",
        config.checkpoint.keep,
        session.communicator,
        session.progress.note,
        config.run.timeout_seconds,
        session.job.name,
    )
    at = session.watch.at
    parts = build_parts(config, session.world, session.communicator, at)
    try:
        with session.watch.explaining():  # before what follows takes the ranks apart
            at("looking for a checkpoint")
            start = _start(config, checkpoints, session.job)
            with _writer(directory, config.metrics, start, session) as writer:
                values = config.model_dump(mode="json")
                monitor = None
                if session.exporter is not None:
                    monitor = Monitor(session.exporter, name, parts, session.communicator, checkpoints.directory)
                outputs = RunOutputs(
                    writer, checkpoints, session.progress, values, session.signals, session.watch, monitor, session.lock
                )
                trainer = Trainer(config, parts, session.communicator, outputs)
                if start is not None:
                    at(f"reading checkpoint {start.path}")
                    trainer.restore(start)
                    session.progress.note(f"{name}: resumed from {start.path}")
                if session.leads:
                    for line in _surprises(config, parts, start, values):
                        _tell(line, session.progress)
                with agreed(session.communicator, what=f"can't write {directory}"):
                    record.running(parts.total_steps)
                session.progress.start(name, parts.total_steps, trainer.step, lambda: last_saved(checkpoints.directory))
                trainer.train()
            at("the final evaluation")
            summary = _summarize(name, trainer)
            variances = trainer.relative_variances()
    finally:
        session.progress.stop()
        checkpoints.close()
        if parts.kfac is not None:
            parts.kfac.remove()
        parts.engine.close()
    with agreed(session.communicator, what=f"can't write {directory}"):
        if session.leads:
            write_whole(directory / "result.json", json.dumps(_plain(summary), indent=2) + "\n")
            if variances:
                write_variances(variances, directory)
                session.progress.note(describe_variances(variances))
    return summary


def _train_compared(
    config: Config, name: str, optimizer: OptimizerConfig, directory: Path, session: Session, record: RunFile
) -> RunSummary:
    """Train with another optimizer; that it diverges is a result, not an error."""
    # A checkpoint that the user named is the main run's; the compared ones resume from their own, or not at all.
    resume = "auto" if config.checkpoint.resume == "auto" else "never"
    compared = config.model_copy(
        update={
            "optimizer": optimizer,
            "kfac": config.kfac.without_solver().model_copy(update={"enabled": False}),
            "checkpoint": config.checkpoint.model_copy(update={"resume": resume}),
            "compare": {},
            "game": config.game and config.game.without_damping(),
        }
    )
    own = directory / f"compare-{name}"
    with agreed(session.communicator, what=f"can't prepare {own}"):
        if session.leads:
            if own.exists() and _begins_anew(own, compared, session.job):
                _make_room(own, session.progress)
            own.mkdir(exist_ok=True)
            write_whole(own / "config.yaml", dump_yaml(compared))
    try:
        return _train_one(compared, name, own, session, record)
    except DivergedError as error:
        session.progress.note(f"{name}: {error}")
        records = _losses(own)
        step, seconds = (records[-1]["step"], records[-1]["seconds"]) if records else (0, 0.0)
        return RunSummary(name, step, seconds, None, None, "metric", None, note="diverged")


def _surprises(config: Config, parts: RunParts, start: Checkpoint | None, values: dict[str, Any]) -> Iterator[str]:
    """Yield what a run does otherwise than its configuration, or its checkpoint, makes one expect."""
    samples, settings = len(parts.train), config.train
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
    if start.step >= parts.total_steps:
        length = "train.steps" if settings.steps is not None else f"the steps of train.epochs {settings.epochs}"
        yield (
            f"{start.path} has done {start.step} steps, and {length} {'is' if settings.steps else 'are'} "
            f"{parts.total_steps}: nothing is left to train"
        )


def _start(config: Config, checkpoints: Checkpoints, job: JobHistory) -> Checkpoint | None:
    own = checkpoints.newest(own=True) if job.restarted else None
    start = own or _configured_start(config, checkpoints)
    if start is not None:  # what is newer is damaged or left behind, and must not count among the newest that are kept
        checkpoints.set_aside(start.step)
    return start


def _configured_start(config: Config, checkpoints: Checkpoints) -> Checkpoint | None:
    match config.checkpoint.resume:
        case "never":
            return None
        case "auto":
            return checkpoints.newest()
        case path:
            with agreed(checkpoints.communicator, CheckpointError, f"can't read {path}"):
                start = read_manifest(Path(path))
            checkpoints.verify(start)
            return start


@contextmanager
def _writer(
    directory: Path, config: MetricsConfig, start: Checkpoint | None, session: Session
) -> Iterator[MetricsWriter | None]:
    writer = None
    with agreed(session.communicator, what=f"can't write {directory}"):
        if session.leads:
            first_step = start.step if start is not None else 0
            writer = MetricsWriter(directory, first_step, build_sinks(config.sinks, directory, first_step))
    try:
        yield writer
    finally:
        if writer is not None:
            writer.close()


def _summarize(name: str, trainer: Trainer) -> RunSummary:
    test = trainer.evaluate(trainer.parts.test)
    trainer.show(test)
    train_loss = trainer.evaluate(trainer.parts.train, samples=len(trainer.parts.test)).loss
    return RunSummary(
        name=name,
        steps=trainer.step,
        seconds=trainer.stopwatch.seconds,
        train_loss=train_loss,
        test_loss=test.loss,
        metric=trainer.parts.loss.metric,
        metric_value=test.metric,
        scores=test.scores,
        references=test.references,
        evaluated=trainer.parts.loss.evaluated,
    )


def _prepare(directory: Path, config: Config, session: Session, *, overwrite: bool) -> Path | None:
    """Make room for the run; returns where an earlier one of its name has gone, if there was one to move."""
    earlier = None
    if directory.exists() and _begins_anew(directory, config, session.job):
        earlier = _make_room(directory, session.progress, overwrite=overwrite)
    if os.path.lexists(directory) and not directory.is_dir():
        raise ConfigError(f"{directory}: is no directory: move it away, or give another --name")
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "config.yaml", dump_yaml(config))
    return earlier


def _make_room(directory: Path, progress: ProgressDisplay, *, overwrite: bool = False) -> Path | None:
    """Move an earlier run out of the way, or delete it; returns where it has gone."""
    if overwrite:
        _delete_run(directory)
        _tell(f"deleted the earlier run in {directory} (--overwrite)", progress)
        return None
    earlier = _free_name(directory)
    directory.rename(earlier)
    _tell(f"moved the earlier run in {directory} to {earlier}", progress)
    return earlier


def _begins_anew(directory: Path, config: Config, job: JobHistory) -> bool:
    """Whether what is in a directory is no part of the run that starts."""
    if job.began(directory / "checkpoints"):
        return False
    match config.checkpoint.resume:
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


def _tell(line: str, progress: ProgressDisplay) -> None:
    """Print what happened to a run, even with quiet output."""
    if isinstance(progress, SilentProgress):
        _say(line)
    else:
        progress.note(line)


def _report(config: Config, runs: list[RunSummary], directory: Path, progress: ProgressDisplay) -> None:
    folders = [directory, *(directory / f"compare-{run.name}" for run in runs[1:])]
    write_whole(directory / "result.json", json.dumps([_plain(run) for run in runs], indent=2) + "\n")
    curves = [_curve(run.name, folder) for run, folder in zip(runs, folders, strict=True)]
    draw_losses(curves, directory / "loss.png", config.run.name)
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    console.print(result_table(f"{config.run.name}: {directory}", runs))


def _curve(name: str, directory: Path) -> Curve:
    records = _losses(directory)
    return Curve(
        name,
        [record["step"] for record in records],
        [record["seconds"] for record in records],
        [record["loss"] for record in records],
    )


def _losses(directory: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]


def _plain(summary: RunSummary) -> dict[str, Any]:
    return {**asdict(summary), "milliseconds_per_step": summary.milliseconds_per_step}
