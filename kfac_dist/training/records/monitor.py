"""From a training run to its exporter: rank 0's numbers, gathered where the loop has them on the host already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.reporting.exporter import Exporter, Reading
from kfac_dist.training.checkpoints.checkpoint import MANIFEST
from kfac_dist.training.setup import RunParts


class Monitor:
    """Publishes the numbers of one run; rank 0 has one if the run serves metrics.

    Args:
        exporter: Their HTTP server.
        name: Name of the optimizer.
        parts: The run's parts.
        communicator: The ranks.
        checkpoints: Directory of its checkpoints.
    """

    def __init__(
        self, exporter: Exporter, name: str, parts: RunParts, communicator: Communicator, checkpoints: Path
    ) -> None:
        self._exporter = exporter
        self._parts = parts
        self._engine = parts.engine
        self._communicator = communicator
        self._skipped = 0
        exporter.watch(name, parts.total_steps, lambda: last_saved(checkpoints))

    def stepped(self) -> None:
        """Take note of a step; asks nothing of the device."""
        self._exporter.stepped()

    def logged(self, record: Mapping[str, Any], skipped: int) -> None:
        """Publish a logged step.

        Args:
            record: As `metrics.jsonl` has it.
            skipped: Steps that the loop has skipped since the last logged one.
        """
        self._skipped += skipped
        by_engine = self._engine.counters().get("skipped_steps", 0)  # an engine with a loss scale skips them itself
        calls, sent = self._traffic()
        self._exporter.publish(
            Reading(
                step=record["step"],
                loss=record["loss"],
                learning_rate=record["lr"],
                samples_per_second=record["samples_per_second"],
                skipped_steps=self._skipped + int(by_engine),
                damping=record.get("kfac/damping"),
                failed_inversions=record.get("kfac/failed_inversions", 0),
                raised_dampings=record.get("kfac/raised_dampings", 0),
                dropped_statistics=record.get("kfac/dropped_statistics", 0),
                phase_seconds=self._parts.phase_seconds(),
                collectives=calls,
                bytes_sent=sent,
            )
        )

    def _traffic(self) -> tuple[Counter[str], Counter[str]]:
        """Return collectives and bytes by label: the loop's own and K-FAC's."""
        calls: Counter[str] = Counter()
        sent: Counter[str] = Counter()
        counters = [self._communicator.traffic, *(kfac.communicator.traffic for kfac in self._parts.kfacs)]
        for traffic in counters:
            for label, (number, size) in traffic.snapshot().items():
                calls[label] += number
                sent[label] += size
        return calls, sent


def last_saved(directory: Path) -> float | None:
    """Return when the newest complete checkpoint was written, in seconds since 1970; None if there is none."""
    times = []
    for manifest in directory.glob(f"step-*[0-9]/{MANIFEST}"):
        try:
            times.append(manifest.stat().st_mtime)
        except FileNotFoundError:  # removed by a newer one, just now
            continue
    return max(times, default=None)
