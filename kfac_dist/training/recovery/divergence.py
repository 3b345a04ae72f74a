"""Steps whose loss, gradients or statistics are not finite: skips on all ranks, and rollbacks if they continue.

    every step      taken = all averaged gradients are finite; where they aren't they become zeros      on the device
    logged steps    a skip: damping × factor;  k in a row: back to the newest checkpoint;  again: DivergedError

Of a step with finite gradients a rank may still find statistics that aren't: it drops its own, and the step is taken.
Logged windows of which a rank has dropped any count as skips do: the damping rises, and k in a row go back.

A loss that isn't finite on one rank makes its gradients NaN, averaging makes all ranks' NaN: so they agree without
asking each other. Under sharded engines, whose ranks see different slices, one number is summed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from kfac_dist.config.schema import DivergenceConfig
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.engines import TrainingEngine
from kfac_dist.errors import KFACError


class DivergedError(KFACError):
    """Loss or gradients are no longer finite numbers, and going back didn't help; raised on every rank."""


class Guard:
    """Keeps non-finite gradients from the optimizer, without a host sync.

    Engines with a loss scale skip such steps themselves, and look for a better scale by them.

    Args:
        engine: Has the gradients.
        communicator: The ranks.
        device: The losses' device.
    """

    def __init__(self, engine: TrainingEngine, communicator: Communicator, device: torch.device) -> None:
        self._engine = engine
        self._communicator = communicator
        self._trusts_engine = "cur_scale" in engine.counters()  # without one DeepSpeed counts skipped steps, too
        self._taken = torch.ones((), dtype=torch.bool, device=device)
        self._row = torch.zeros((), dtype=torch.int64, device=device)

    def poison(self, total: Tensor) -> Tensor:
        """Return a loss's factor: 1, or NaN if it isn't finite, so that its gradients are NaN on every rank."""
        finite = torch.isfinite(total.detach())
        return torch.where(finite, 1.0, torch.nan).to(total.dtype)

    @torch.no_grad()
    def taken(self) -> Tensor:
        """Return whether the step is taken, 0-dim bool, the same on every rank; else gradients are zeros now.

        Called once a step, when its gradients are final; collective.
        """
        if self._trusts_engine:
            return self._taken
        taken = self._engine.finite_everywhere(self._communicator).to(self._row.device)
        # One by one: no batched operation writes zeros over NaN without the host knowing where.
        for gradient in self._engine.gradients().values():
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            values.masked_fill_(~taken.to(values.device), 0.0)
        self._row = (self._row + 1) * ~taken
        return taken

    @property
    def row(self) -> int:
        """Steps that were skipped in a row until now; waits for the device."""
        return int(self._row)

    def restore(self, row: int) -> None:
        """Resume from a number of skipped steps."""
        self._row.fill_(row)


class Verdict(Enum):
    """The consequence of a logged step."""

    GO_ON = auto()
    GO_BACK = auto()


@dataclass
class Recovery:
    """A run's handling of skipped steps; every rank decides alike.

    Attributes:
        damping_factor: Current factor on the damping.
        changed_at: Step at which it last changed.
        rollbacks: Number of times that the run went back.
        dropped: Number of times that a rank has dropped statistics of a taken step so far.
        dropping: Logged windows in a row in which that happened.
    """

    damping_factor: float = 1.0
    changed_at: int = 0
    rollbacks: int = 0
    dropped: int = 0
    dropping: int = 0

    def note_dropped(self, dropped: int, measured: int) -> None:
        """Take note of a window's statistics.

        Args:
            dropped: Times that a rank has dropped some.
            measured: Steps that were measured; a window without any tells nothing.
        """
        self.dropped += dropped
        if measured:
            self.dropping = self.dropping + 1 if dropped else 0

    def judge(
        self,
        config: DivergenceConfig,
        *,
        step: int,
        skipped: int,
        row: int,
        calm: int,
        last: bool,
        dropped: int = 0,
    ) -> Verdict:
        """Raise or lower the damping, and tell whether to go back.

        Args:
            config: The options.
            step: Steps done.
            skipped: Steps skipped since the last logged one.
            row: Steps skipped in a row until now.
            calm: Steps without a skip after which the damping is lowered.
            last: Whether this is the run's last step.
            dropped: Times that statistics were dropped since the last logged step.
        """
        if skipped or dropped:
            self._change(step, config.damping_factor)
        elif self.damping_factor > 1 and step - self.changed_at >= calm:
            self._change(step, 1 / config.damping_factor)
        on = max(row, self.dropping) < config.skips and not (last and row)
        return Verdict.GO_ON if on else Verdict.GO_BACK

    def went_back(self, to: Recovery, config: DivergenceConfig, step: int) -> None:
        """Record a rollback to a checkpoint of this step; the damping there is raised above the failed one."""
        self.rollbacks += 1
        self.dropping = 0
        self.damping_factor = max(self.damping_factor, to.damping_factor * config.damping_factor)
        self.changed_at = step

    def facts(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def _change(self, step: int, factor: float) -> None:
        self.damping_factor = max(1.0, self.damping_factor * factor)
        self.changed_at = step
