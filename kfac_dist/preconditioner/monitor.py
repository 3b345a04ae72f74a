"""Numbers, spectra and times of one K-FAC, for logs, reports and the doctor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from kfac_dist.preconditioner.core import Core
from kfac_dist.preconditioner.invert.inspection import RefreshReading
from kfac_dist.preconditioner.phases import PhaseTimer
from kfac_dist.preconditioner.plan import Plan


class Monitor:
    """Readings of one K-FAC; none changes a number of its steps.

    Args:
        core: The K-FAC's core.
    """

    def __init__(self, core: Core) -> None:
        self._core = core

    @property
    def phases(self) -> PhaseTimer:
        """The timer of a step's parts, which runs once `phases.enabled` is set."""
        return self._core.phases

    @property
    def plan(self) -> Plan:
        """The work of every rank."""
        return self._core.parts.plan

    @property
    def measured(self) -> int:
        """Steps that were measured."""
        return self._core.measured

    @property
    def dropped(self) -> Tensor:
        """Times that this rank dropped statistics of a taken step, because they weren't finite; on the device.

        The other ranks keep theirs, and averages stay right; they age if it continues.
        """
        return self._core.dropped()

    def not_finite(self) -> list[str]:
        """Return the blocks whose statistics this rank has found not to be finite, in taken steps; waits for it."""
        return self._core.not_finite()

    @property
    def names_dropped(self) -> bool:
        """Whether a refresh warns, once, of layers whose statistics were dropped; off where the loop tells of them."""
        return self._core.names_dropped

    @names_dropped.setter
    def names_dropped(self, value: bool) -> None:
        self._core.names_dropped = value

    def metrics(self) -> dict[str, float]:
        """Return numbers worth logging; see `KFAC.metrics`."""
        core, parts = self._core, self._core.parts
        traffic = core.communicator.traffic
        asymmetries = self.asymmetries()
        return {
            "damping": parts.damping.at(core.steps),
            "kl_scale": float(parts.trust_region.kl_scale),
            "predicted_kl": float(parts.trust_region.predicted_kl),
            "refreshes": parts.refresh.refreshes,
            "failed_inversions": parts.refresh.failures,
            "raised_dampings": parts.refresh.raised,
            "dropped_statistics": int(core.dropped()),
            "collectives": traffic.total_calls,
            "bytes_sent": traffic.total_bytes,
            **({"asymmetry": max(asymmetries.values())} if asymmetries else {}),
        }

    def inspect(self, outside: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Read spectrum, condition and damping of every factor at its next refresh, by the rank that inverts it.

        That costs an eigenvalue decomposition beside the inversion, and changes nothing else.

        Args:
            outside: Makes a context for the reading, such as one that stops a clock.
        """
        self._core.parts.refresh.inspector.ask(self._core.parts.plan.owned(self._core.communicator.rank), outside)

    def inspection(self) -> list[RefreshReading]:
        """Return all ranks' readings since the last call, by step and rank; collective."""
        ranks = self._core.communicator.gather_objects(self._core.parts.refresh.inspector.take(), label="inspection")
        return sorted((reading for own in ranks for reading in own), key=lambda reading: (reading.step, reading.rank))

    def asymmetries(self) -> dict[tuple[str, str], float]:
        """Return `max|M − Mᵀ| / max|M|` of this rank's last inverted units; waits for the device.

        Measured on running averages before half of each is mirrored or left unread, and on inverses before they are
        made symmetric. Keys are a unit's name and `factor` or `inverse`. Units that can't be asymmetric aren't listed:
        eigenbases, diagonals, and factors that came as packed triangles, which are mirrored before they are measured.
        """
        return {
            (unit.name, kind): value
            for kind, values in zip(("factor", "inverse"), self._core.parts.refresh.asymmetries.tolist(), strict=True)
            for unit, value in zip(self._core.parts.plan.units, values, strict=True)
            if value >= 0
        }
