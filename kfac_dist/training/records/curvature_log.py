"""Spectra, conditions and damping of the factors, some times in a run: from K-FAC's refreshes to `curvature.jsonl`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict

from kfac_dist.preconditioner.kfac import KFAC
from kfac_dist.training.game.players import PlayersKFAC
from kfac_dist.training.records.metrics import MetricsWriter


class CurvatureLog:
    """Asks for readings at even distances, and writes them once they have been made; every rank has one.

    Args:
        kfac: The K-FAC to read.
        writer: Rank 0's writer; None on the others.
        times: Number of readings in a run; 0 for none.
        total_steps: Length of the run.
        paused: Makes a context in which the run's clock stands.
    """

    def __init__(
        self,
        kfac: KFAC | PlayersKFAC,
        writer: MetricsWriter | None,
        times: int,
        total_steps: int,
        paused: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._kfac = kfac
        self._paused = paused
        self._writer = writer
        self._every = max(1, total_steps // times) if times else 0
        self._asked = -1
        self._refreshes = 0.0

    def ask(self, step: int) -> None:
        """Ask for a reading if it is time for one.

        Args:
            step: The step that comes next, counted from 0.
        """
        if self._every and step // self._every != self._asked:
            self._asked = step // self._every
            self._kfac.monitor.inspect(self._paused)

    def write(self, refreshes: float) -> None:
        """Write the readings since the last call; collective if there was a refresh.

        Args:
            refreshes: Refreshes so far, the same on every rank.
        """
        if not self._every or refreshes == self._refreshes:
            return
        self._refreshes = refreshes
        for reading in self._kfac.monitor.inspection():
            if self._writer is not None:
                spectra = {f.unit: [value for value in f.spectrum if value is not None] for f in reading.factors}
                self._writer.write_curvature(asdict(reading), spectra)
