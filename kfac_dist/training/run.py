"""`train(config)`: a whole run, from the process group to the picture, and the runs that it is compared with.

    runs/<name>/
      config.yaml      the resolved configuration      metrics.jsonl, tensorboard/   logged numbers
      checkpoints/     see `training.checkpoints`      loss.png                      losses per step and second
      result.json      final figures                   compare-<entry>/              the same for each compared run
      relative_variance.json    if wanted: how noisy each parameter's gradient was at the end
      state.json       running, preempted, interrupted, finished or failed
      curvature.jsonl  spectra of the factors          report.html   all of it on one page, from `kfac-dist train`

Beside it `runs/<name>.lock` tells whose it is (`reporting.run_lock`). A fresh run moves the files of an earlier one of
its name to `runs/<name>.previous`, then `.previous.2` and so on, and says so; one whose launcher started it again goes
on with its own (see `training.recovery.restarts`). SIGTERM, SIGUSR1 or Ctrl-C on any rank makes all of them save a
checkpoint and return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kfac_dist.config.schema import Config, MetricsConfig, OptimizerConfig, StepSolver
from kfac_dist.config.yaml.load import dump_yaml
from kfac_dist.distributed.communicators.agreement import agreed
from kfac_dist.errors import CollectiveError
from kfac_dist.reporting.live import tell
from kfac_dist.reporting.run_file import RunFile
from kfac_dist.reporting.sinks import build_sinks
from kfac_dist.reporting.summary import RunSummary
from kfac_dist.training.checkpoints.checkpoint import Checkpoint, Checkpoints
from kfac_dist.training.loop import DivergedError, RunOutputs, Trainer
from kfac_dist.training.records.metrics import MetricsWriter
from kfac_dist.training.records.monitor import Monitor, last_saved
from kfac_dist.training.records.variance import describe_variances, write_variances
from kfac_dist.training.recovery.preemption import Preempted
from kfac_dist.training.results import diverged, summarize, write_comparison, write_result
from kfac_dist.training.session import Session, interruptible, open_session
from kfac_dist.training.setup import build_parts
from kfac_dist.training.starts import begins_anew, find_start, run_directory, surprises, take_directory


@dataclass(frozen=True)
class TrainResult:
    """Outcome of `train`.

    Attributes:
        directory: Directory of its files.
        runs: The run itself, then the runs that it was compared with; without those that were not started.
        preempted_at: Step at which it was stopped, its state saved; None if it is complete.
        interrupted: Whether it was Ctrl-C that stopped it.
    """

    directory: Path
    runs: tuple[RunSummary, ...]
    preempted_at: int | None = None
    interrupted: bool = False


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
        on_lost: Called at once if other ranks are gone or hang; closing resources before this function raises may
            wait for them.
        on_second_interrupt: Ends the process at once; without it, a second Ctrl-C is a KeyboardInterrupt.

    Raises:
        KFACError: The run can't start or continue; every rank raises.
        KeyboardInterrupt: Ctrl-C, while there was nothing to save.
    """
    with open_session(
        config.run, config.metrics, quiet=quiet, live=live, on_lost=on_lost, end=on_second_interrupt
    ) as session:
        directory = run_directory(config.run)
        session.watch.set_activity(f"preparing {directory}")
        earlier = None
        with agreed(session.communicator, what=f"can't prepare {directory}"):
            if session.leads:
                anew = begins_anew(directory, config.checkpoint.resume, session.job)
                written = dump_yaml(config)
                earlier = take_directory(directory, written, session.progress, anew=anew, overwrite=overwrite)
        record = RunFile(directory if session.leads else None, session.communicator.size, earlier)
        session.signals.last_words = record.cut_short
        runs: list[RunSummary] = []
        with record.failures(), interruptible(session), session.watch.explaining():
            try:
                _train_all(config, compare, directory, session, record, runs)
            except Preempted as stop:
                return _preempted(stop, directory, session, record, runs, go_on)
        return TrainResult(directory, tuple(runs))


def _train_all(
    config: Config, compare: bool, directory: Path, session: Session, record: RunFile, runs: list[RunSummary]
) -> None:
    """Train the run and the runs that it is compared with, one after the other, into `runs`."""
    with agreed(session.communicator, what=f"can't write {directory}"):
        record.running()
    solver = config.kfac.solver
    name = "kfac" if solver is StepSolver.DIRECT else f"kfac-{solver}"
    name = name if config.kfac.enabled else str(config.first_order.name)
    runs.append(_train_one(config, name, directory, session, record))
    for entry, optimizer in config.compare.items() if compare else ():
        runs.append(_train_compared(config, entry, optimizer, directory, session, record))
    session.watch.set_activity("writing the results")
    with agreed(session.communicator, what=f"can't finish {directory}"):
        if session.leads:
            write_comparison(runs, config.run.name, directory)
        record.finished()


def _preempted(
    stop: Preempted, directory: Path, session: Session, record: RunFile, runs: list[RunSummary], go_on: str
) -> TrainResult:
    caught = session.communicator.gather_objects(session.signals.caught, label="preemption")
    # Ctrl-C ends a run for good, also after other signals.
    interrupted = "SIGINT" in caught
    rank, name = next((rank, name) for rank, name in enumerate(caught) if name and (name == "SIGINT") == interrupted)
    with agreed(session.communicator, what=f"can't write {directory}"):
        (record.interrupted if interrupted else record.preempted)(stop.step, f"{name} on rank {rank}")
        if session.leads:
            verb = "interrupted" if interrupted else "preempted"
            command = f"continue with: {go_on}" if go_on and interrupted else f"--resume auto continues {directory}"
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
    set_activity = session.watch.set_activity
    parts = build_parts(config, session.world, session.communicator, set_activity)
    try:
        with session.watch.explaining():  # before the ranks separate
            set_activity("looking for a checkpoint")
            start = find_start(config.checkpoint.resume, checkpoints, session.job)
            with _writer(directory, config.metrics, start, session) as writer:
                values = config.model_dump(mode="json")
                monitor = None
                if session.exporter is not None:
                    monitor = Monitor(session.exporter, name, parts, session.communicator, checkpoints.directory)
                outputs = RunOutputs(
                    writer,
                    checkpoints,
                    session.progress,
                    values,
                    config.checkpoint,
                    config.metrics,
                    session.signals,
                    session.watch,
                    monitor,
                    session.lock,
                )
                trainer = Trainer(parts, session.communicator, outputs)
                if start is not None:
                    set_activity(f"reading checkpoint {start.path}")
                    trainer.restore(start)
                    session.progress.note(f"{name}: resumed from {start.path}")
                if session.leads:
                    for line in surprises(config.train, len(parts.train), parts.total_steps, start, values):
                        tell(line, session.progress)
                with agreed(session.communicator, what=f"can't write {directory}"):
                    record.running(parts.total_steps)
                session.progress.start(name, parts.total_steps, trainer.step, lambda: last_saved(checkpoints.directory))
                trainer.train()
            set_activity("the final evaluation")
            summary = summarize(name, trainer)
            variances = trainer.relative_variances()
    finally:
        session.progress.stop()
        checkpoints.close()
        if parts.kfac is not None:
            parts.kfac.remove()
        parts.engine.close()
    with agreed(session.communicator, what=f"can't write {directory}"):
        if session.leads:
            write_result(summary, directory)
            if variances:
                write_variances(variances, directory)
                session.progress.note(describe_variances(variances))
    return summary


def _train_compared(
    config: Config, name: str, optimizer: OptimizerConfig, directory: Path, session: Session, record: RunFile
) -> RunSummary:
    """Train with another optimizer; that it diverges is a result, not an error."""
    compared = _without_kfac(config, optimizer)
    own = directory / f"compare-{name}"
    with agreed(session.communicator, what=f"can't prepare {own}"):
        if session.leads:
            anew = begins_anew(own, compared.checkpoint.resume, session.job)
            take_directory(own, dump_yaml(compared), session.progress, anew=anew)
    try:
        return _train_one(compared, name, own, session, record)
    except DivergedError as error:
        session.progress.note(f"{name}: {error}")
        return diverged(name, own)


def _without_kfac(config: Config, optimizer: OptimizerConfig) -> Config:
    """Return a run's configuration with another optimizer, and no K-FAC."""
    # A checkpoint that the user named is the main run's; the compared ones resume from their own, or not at all.
    resume = "auto" if config.checkpoint.resume == "auto" else "never"
    return config.model_copy(
        update={
            "optimizer": optimizer,
            "kfac": config.kfac.without_solver().model_copy(update={"enabled": False}),
            "checkpoint": config.checkpoint.model_copy(update={"resume": resume}),
            "compare": {},
            "game": config.game and config.game.without_damping(),
        }
    )


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
