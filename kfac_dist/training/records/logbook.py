"""The records of logged steps and of evaluations: files, the exporter, the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.optimizers.variance import RelativeVariance
from kfac_dist.reporting.progress import Status
from kfac_dist.training.evaluation import Evaluation
from kfac_dist.training.records.curvature_log import CurvatureLog
from kfac_dist.training.records.outputs import RunOutputs
from kfac_dist.training.records.variance import variance_metrics
from kfac_dist.training.setup import RunParts


class Logbook:
    """Distributes a run's records to their destinations; every rank has one, rank 0's writes.

    Args:
        parts: The run's parts, with the K-FAC and solver that report numbers.
        outputs: Destinations of logged numbers.
        paused: Makes a context in which the run's clock stands.
    """

    def __init__(
        self, parts: RunParts, outputs: RunOutputs, paused: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._parts = parts
        self._outputs = outputs
        self._curvature: CurvatureLog | None = None
        if parts.kfac is not None:
            for kfac in parts.kfacs:
                kfac.monitor.phases.enabled = True
            self._curvature = CurvatureLog(
                parts.kfac, outputs.writer, outputs.metrics.spectra, parts.total_steps, paused
            )

    def ask(self, step: int) -> None:
        """Request readings from K-FAC that are only available during the next step."""
        if self._curvature is not None:
            self._curvature.ask(step)

    def logged(self, record: Mapping[str, float], skipped: int) -> None:
        """Write a logged step with K-FAC's and the solver's numbers; collective, and waits for the device.

        Args:
            record: The loop's values, `step` among them.
            skipped: Steps since the last logged one that were not taken.
        """
        parts, outputs = self._parts, self._outputs
        record = dict(record)
        if parts.kfac is not None:
            numbers = of_all_ranks(parts.kfac.metrics(), parts.kfacs[0].communicator)
            known = record  # of all ranks, where K-FAC's own counts are of one
            record = known | {f"kfac/{name}": value for name, value in numbers.items()} | known
            record |= {f"kfac/seconds/{phase}": value for phase, value in parts.phase_seconds().items()}
        if parts.stepper is not None:
            record |= {f"solver/{name}": value for name, value in parts.stepper.metrics().items()}
        if outputs.writer is not None:
            # A window of nothing but skipped steps has no loss, and is written without one.
            outputs.writer.write({name: value for name, value in record.items() if math.isfinite(value)})
        if self._curvature is not None:
            self._curvature.write(record["kfac/refreshes"])
        if outputs.monitor is not None:
            outputs.monitor.logged(record, skipped)
        outputs.progress.update(Status.of(record))

    def evaluated(self, step: int, result: Evaluation, variances: Mapping[str, RelativeVariance]) -> None:
        """Write an evaluation on the test data."""
        writer, loss = self._outputs.writer, self._parts.loss
        if writer is not None:
            record = {"step": step, "test_loss": result.loss, "test_metric": result.metric}
            figures = result.scores | result.references
            scores = {f"score/{name}": value for name, value in figures.items()}
            writer.write(record | scores | variance_metrics(variances))
        shown = {loss.evaluated: result.loss, loss.metric: result.metric, **result.scores}
        self._outputs.progress.evaluated(step, shown)
        self.show(step, result)

    def show(self, step: int, result: Evaluation) -> None:
        """Write the pictures of an evaluation, if there are any."""
        if self._outputs.writer is not None and result.pictures is not None:
            self._outputs.writer.write_pictures(step, result.pictures)

    def went_back(self, step: int, why: str) -> None:
        """Forget the entries beyond a step: the run continues from there."""
        if self._outputs.writer is not None:
            self._outputs.writer.rewind(step)
        self._outputs.progress.went_back(step, why)


def of_all_ranks(numbers: dict[str, float], communicator: Communicator) -> dict[str, float]:
    """Put the largest asymmetry of any rank in place of this rank's own; collective."""
    ranks = communicator.gather_objects(numbers.get("asymmetry"), label="asymmetry")
    found = [value for value in ranks if value is not None]
    return numbers | ({"asymmetry": max(found)} if found else {})
