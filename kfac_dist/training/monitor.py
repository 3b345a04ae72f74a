"""From a training run to its exporter: rank 0's numbers, gathered where the loop has them on the host already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfac_dist.distributed.communicator import Communicator
from kfac_dist.reporting.exporter import Exporter, Reading
from kfac_dist.training.checkpoint import MANIFEST
from kfac_dist.training.setup import Parts


class Monitor:
    """Publishes the numbers of one run; rank 0 has one if the run serves metrics.

    Switches K-FAC's phase timer on.

    Args:
        exporter: What serves them.
        name: What the run trains with.
        parts: What it is made of.
        communicator: The ranks.
        checkpoints: Where its checkpoints are.
    """

    def __init__(
        self, exporter: Exporter, name: str, parts: Parts, communicator: Communicator, checkpoints: Path
    ) -> None:
        self._exporter = exporter
        self._kfac = parts.kfac
        self._engine = parts.engine
        self._communicator = communicator
        if self._kfac is not None:
            self._kfac.phases.enabled = True
        exporter.watch(name, parts.total_steps, lambda: last_saved(checkpoints))

    def stepped(self) -> None:
        """Take note of a step; asks nothing of the device."""
        self._exporter.stepped()

    def logged(self, record: Mapping[str, Any]) -> None:
        """Publish a logged step: `record` as `metrics.jsonl` has it, and what else is on the host by now."""
        calls, sent = self._traffic()
        kfac = self._kfac
        self._exporter.publish(
            Reading(
                step=record["step"],
                loss=record["loss"],
                learning_rate=record["lr"],
                samples_per_second=record["samples_per_second"],
                skipped_steps=self._skipped(record),
                damping=record.get("kfac/damping"),
                failed_inversions=record.get("kfac/failed_inversions", 0),
                phase_seconds={} if kfac is None else {str(k): v for k, v in kfac.phases.seconds().items()},
                collectives=calls,
                bytes_sent=sent,
            )
        )

    def _traffic(self) -> tuple[Counter[str], Counter[str]]:
        """Return collectives and bytes by what they carried: the loop's own and K-FAC's."""
        calls: Counter[str] = Counter()
        sent: Counter[str] = Counter()
        counters = [self._communicator.traffic, *([] if self._kfac is None else [self._kfac.communicator.traffic])]
        for traffic in counters:
            for label, (number, size) in traffic.snapshot().items():
                calls[label] += number
                sent[label] += size
        return calls, sent

    def _skipped(self, record: Mapping[str, Any]) -> int:
        """Return the steps that K-FAC, or an engine with a loss scale, has not taken."""
        own = self._engine.counters().get("skipped_steps")
        # An overflow that the engine skips is one that K-FAC saw, if it measured that step.
        return max(int(record.get("kfac/skipped_steps", 0)), 0 if own is None else int(own))


def last_saved(directory: Path) -> float | None:
    """Return when the newest complete checkpoint was written, in seconds since 1970; None if there is none."""
    times = []
    for manifest in directory.glob(f"step-*[0-9]/{MANIFEST}"):
        try:
            times.append(manifest.stat().st_mtime)
        except FileNotFoundError:  # removed by a newer one, just now
            continue
    return max(times, default=None)
