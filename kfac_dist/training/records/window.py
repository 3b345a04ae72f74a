"""The events since the last logged step, kept on the device until they are read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.preconditioner.kfac import KFAC

# Room for so many steps at first; it doubles when they are more.
_STEPS = 16


@dataclass(frozen=True)
class WindowTotals:
    """A window's sums over all ranks, on the host.

    Attributes:
        loss: Mean loss over the terms of the window's steps that were taken; NaN if none was.
        samples_per_second: Over all ranks.
        skipped: Steps that were not taken.
        first_bad: Place in the window of the first step that was not taken or has a loss that isn't finite on some
            rank, and its loss; None if there is none.
        measured: Steps whose curvature was measured.
        dropped: Times that a rank has dropped non-finite statistics of a taken step.
    """

    loss: float
    samples_per_second: float
    skipped: int = 0
    first_bad: tuple[int, float] | None = None
    measured: int = 0
    dropped: int = 0


class Window:
    """Keeps losses and terms without a host sync, until `close` reads them.

    Args:
        device: The losses' device.
        kfacs: The measuring K-FACs.
    """

    def __init__(self, device: torch.device, kfacs: Sequence[KFAC] = ()) -> None:
        # Double: a window may be an epoch long. Losses are this rank's, one a step; terms are already over all ranks.
        self._losses = torch.zeros(_STEPS, dtype=torch.float64, device=device)
        self._taken = torch.ones(_STEPS, dtype=torch.bool, device=device)
        self._steps = 0
        self._terms_on_device = torch.zeros((), dtype=torch.float64, device=device)
        self._terms = 0
        self._samples = 0
        self._kfacs = kfacs
        self._begin_measuring()

    def add_loss(self, total: Tensor) -> None:
        """Add the sum over a micro-batch's terms."""
        self._losses[self._steps].add_(total.detach())

    def add_step(self, samples: int, terms: int | Tensor, taken: Tensor) -> None:
        """Count one step's samples and terms over all ranks; a step that isn't taken adds neither loss nor terms.

        Args:
            samples: Of all ranks.
            terms: Of all ranks.
            taken: 0-dim bool.
        """
        self._samples += samples
        self._taken[self._steps] = taken
        self._steps += 1
        if self._steps == len(self._losses):
            self._losses = torch.cat([self._losses, torch.zeros_like(self._losses)])
            self._taken = torch.cat([self._taken, torch.ones_like(self._taken)])
        if isinstance(terms, Tensor):
            self._terms_on_device += terms * taken
        else:
            self._terms += terms
            self._terms_on_device -= terms * ~taken

    def close(self, communicator: Communicator, seconds: Callable[[], float]) -> WindowTotals:
        """Return the window's means and begin an empty one; collective, and waits for the device.

        Args:
            communicator: The ranks.
            seconds: Tells how long the window took, once the device has finished it.
        """
        losses = torch.where(self._taken, self._losses, 0.0)
        skipped = (~self._taken).sum(dtype=torch.float64)
        sums = torch.stack([losses.sum(), self._terms_on_device / communicator.size, skipped, self._dropped()])
        communicator.all_reduce(sums, label="loss").wait()
        loss, terms, skips, dropped = sums.tolist()
        samples, took = self._samples, seconds()
        terms += self._terms
        loss = math.nan if skips and terms < 1 else loss / max(terms, 1.0)
        first_bad = None if math.isfinite(loss) and not skips else self._first_bad(communicator)
        measured = self._measured()
        self.reset()
        return WindowTotals(
            loss,
            samples / took if took > 0 else 0.0,
            math.ceil(skips / communicator.size),
            first_bad,
            measured,
            round(dropped),
        )

    def reset(self) -> None:
        """Forget the window."""
        self._losses.zero_()
        self._taken.fill_(True)
        self._terms_on_device.zero_()
        self._terms = self._samples = self._steps = 0
        self._begin_measuring()

    def state(self) -> dict[str, Tensor]:
        """Return this rank's part of an open window, for a checkpoint; its length doubles as the window's shape."""
        return {
            "losses": self._losses.clone(),
            "terms": self._terms_on_device.clone(),
            "taken": self._taken.clone(),
            "dropped": self._dropped(),
        }

    def counts(self) -> dict[str, int]:
        """Return the counters of an open window that are the same on every rank, as plain values."""
        return {
            "steps": self._steps,
            "terms": self._terms,
            "samples": self._samples,
            "measured": self._measured(),
        }

    def restore(self, state: dict[str, Tensor], counts: dict[str, int]) -> None:
        """Resume the window that `state` and `counts` describe."""
        device = self._losses.device
        self._losses, self._terms_on_device, self._taken = (
            state[name].to(device) for name in ("losses", "terms", "taken")
        )
        self._steps, self._terms, self._samples = (counts[name] for name in ("steps", "terms", "samples"))
        self._begin_measuring()
        self._dropped_before -= state["dropped"].to(device)
        self._measured_before -= counts["measured"]

    def _begin_measuring(self) -> None:
        self._dropped_before, self._measured_before = self._dropped_so_far(), self._measured_so_far()

    def _dropped(self) -> Tensor:
        return self._dropped_so_far() - self._dropped_before

    def _measured(self) -> int:
        return self._measured_so_far() - self._measured_before

    def _dropped_so_far(self) -> Tensor:
        return sum((kfac.monitor.dropped for kfac in self._kfacs), torch.zeros_like(self._terms_on_device))

    def _measured_so_far(self) -> int:
        return sum(kfac.monitor.measured for kfac in self._kfacs)

    def _first_bad(self, communicator: Communicator) -> tuple[int, float] | None:
        losses = self._losses.tolist()
        fine = (torch.isfinite(self._losses) & self._taken).tolist()
        own = [(place, math.isfinite(losses[place]), losses[place]) for place, good in enumerate(fine) if not good][:1]
        found = [bad for bads in communicator.gather_objects(own, label="loss") for bad in bads]
        if not found:
            return None
        place, _, loss = min(found, key=lambda bad: bad[:2])
        return place, loss


class Stopwatch:
    """Seconds spent training: it stands still during evaluation and checkpoints.

    Args:
        elapsed: Seconds so far.
    """

    def __init__(self, elapsed: float = 0.0) -> None:
        self._elapsed = elapsed
        self._since: float | None = None

    def start(self) -> None:
        """Begin to count."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stand still."""
        self._elapsed = self.seconds
        self._since = None

    @property
    def seconds(self) -> float:
        """Counted so far."""
        return self._elapsed + (time.perf_counter() - self._since if self._since is not None else 0.0)
