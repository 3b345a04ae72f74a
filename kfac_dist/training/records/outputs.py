"""The destinations of a run's numbers and state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kfac_dist.config.schema import CheckpointConfig, MetricsConfig
from kfac_dist.distributed.communicators.straggler_watch import Watch
from kfac_dist.reporting.progress import ProgressDisplay
from kfac_dist.reporting.run_lock import RunLock
from kfac_dist.training.checkpoints.checkpoint import Checkpoints
from kfac_dist.training.records.metrics import MetricsWriter
from kfac_dist.training.records.monitor import Monitor
from kfac_dist.training.recovery.preemption import StopSignals


@dataclass(frozen=True)
class RunOutputs:
    """The destinations of a run's numbers.

    Attributes:
        writer: Metrics on disk; None on ranks other than 0.
        checkpoints: Store of checkpoints.
        progress: Output on the terminal.
        configuration: The resolved configuration, saved with each checkpoint.
        checkpoint: When to save, and what to take of a checkpoint.
        metrics: Measurements beside losses.
        signals: Signals that this process has received from its scheduler.
        watch: Tells other ranks where this one is.
        monitor: Numbers for the metrics server; None on ranks other than 0, and without a server.
        lock: Lock of the run's directory; None on ranks other than 0.
    """

    writer: MetricsWriter | None
    checkpoints: Checkpoints
    progress: ProgressDisplay
    configuration: dict[str, Any]
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    signals: StopSignals = field(default_factory=StopSignals)
    watch: Watch = field(default_factory=lambda: Watch(None, 0, 1))
    monitor: Monitor | None = None
    lock: RunLock | None = None
