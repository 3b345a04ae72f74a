"""The parts that all runs of one call of `train` share, from the process group to the lock on its directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from kfac_dist.config.schema import MetricsConfig, RunConfig
from kfac_dist.distributed.communicators.agreement import agreed
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.distributed.communicators.straggler_watch import Watch
from kfac_dist.distributed.startup.agents import AgentWatch
from kfac_dist.distributed.startup.bootstrap import World, bootstrap
from kfac_dist.distributed.startup.rank_info import find_rank_info
from kfac_dist.errors import CollectiveError, ConfigError
from kfac_dist.reporting.exporter import Exporter
from kfac_dist.reporting.live import build_progress, say
from kfac_dist.reporting.progress import ProgressDisplay
from kfac_dist.reporting.run_lock import RunLock
from kfac_dist.training.recovery.preemption import StopSignals
from kfac_dist.training.recovery.restarts import JobHistory, find_job
from kfac_dist.training.starts import run_directory


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


@contextmanager
def open_session(
    run: RunConfig,
    metrics: MetricsConfig,
    *,
    quiet: bool,
    live: bool,
    on_lost: Callable[[CollectiveError], object] | None,
    end: Callable[[], object] | None,
) -> Iterator[Session]:
    """Find the other ranks and take the run's directory; collective.

    Args:
        run: Name and directory of the run, and what computes it.
        metrics: The address that serves its metrics.
        quiet: Show no progress.
        live: Show progress as a view.
        on_lost: Told at once that other ranks are gone or stand still.
        end: Ends the process at a second Ctrl-C.

    Yields:
        The session; what it opened is closed after it.

    Raises:
        KFACError: The ranks don't meet, another run holds the directory, or the address is taken.
    """
    info = find_rank_info(os.environ)
    signals = StopSignals(end, say if info.rank == 0 else lambda line: None)
    with AgentWatch(info), signals, bootstrap(run.device, run.timeout_seconds) as world:
        communicator = build_communicator(run.timeout_seconds)
        progress = build_progress(rank=world.rank, quiet=quiet, live=live, run=run.name)
        progress.note(world.describe())
        try:
            watch = Watch(world.store, world.rank, world.world_size, on_lost=on_lost)
            with watch, watch.explaining(), _exporter(metrics, run.name, communicator) as exporter:
                if exporter is not None:
                    progress.note(f"metrics at http://{exporter.address}/metrics")
                job = find_job(world, communicator)
                with _locked(run_directory(run), job, communicator, progress.note) as lock:
                    yield Session(world, communicator, progress, signals, watch, job, lock, exporter)
        finally:
            progress.stop()
            communicator.close()


@contextmanager
def interruptible(session: Session) -> Iterator[None]:
    """Treat ranks that are lost after Ctrl-C as interrupted a moment before."""
    try:
        yield
    except CollectiveError as error:
        if session.signals.interrupted:
            raise KeyboardInterrupt from error
        raise


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
def _exporter(config: MetricsConfig, run: str, communicator: Communicator) -> Iterator[Exporter | None]:
    """Serve rank 0's metrics, if the configuration asks for it, for all runs of a session."""
    exporter = None
    with agreed(communicator, ConfigError):
        if config.port is not None and communicator.rank == 0:
            exporter = Exporter(config, run)
    with exporter or nullcontext():
        yield exporter
