"""The parts of a step one by one, for solvers and loops that do more than call `KFAC.step`.

access = kfac.solver_access
access.update_curvature()               the first part of a step
access.precondition(vectors)            any number of times
access.advance()                        the last part
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kfac_dist.config.schema import KFACConfig
from kfac_dist.engines import Engine
from kfac_dist.errors import ConfigError
from kfac_dist.preconditioner.core import Core
from kfac_dist.preconditioner.phases import Phase


class SolverAccess:
    """Curvature, inverses and damping of one K-FAC, for solvers that compute the step from them.

    Args:
        core: The K-FAC's core.
    """

    def __init__(self, core: Core) -> None:
        self._core = core

    @property
    def engine(self) -> Engine:
        """The model, and where its gradients are."""
        return self._core.engine

    @property
    def config(self) -> KFACConfig:
        """The configuration, with every precision settled."""
        return self._core.config

    @property
    def discarded(self) -> int:
        """Calls of `KFAC.discard`."""
        return self._core.discarded

    # ---- a step

    @torch.no_grad()
    def update_curvature(self) -> None:
        """Close the statistics that backward measured and refresh due inverses: the first part of `KFAC.step`.

        Then come any number of calls of `precondition`, and `advance`.
        """
        self._core.update_curvature()

    @torch.no_grad()
    def precondition(self, vectors: dict[str, Tensor]) -> None:
        """Multiply a vector by the current damped inverse, in place; collective, and linear in the vector.

        Nothing of K-FAC's state changes: no clip, no weight decay, no statistics.

        Args:
            vectors: By parameter name, each in the shape in which the engine holds the parameter's gradient. Parameters
                without a block keep their values (with `uncovered: diagonal` they are divided by its damped Fisher).
        """
        core = self._core
        with core.phases(Phase.PRECONDITIONING):
            preconditioner = core.parts.preconditioner
            collected = preconditioner.collect(vectors)
            preconditioner.deliver(preconditioner.precondition(collected, core.damping))

    def advance(self) -> None:
        """End the step: the last part of `KFAC.step`."""
        self._core.advance()

    # ---- damping

    @property
    def damping(self) -> float:
        """λ of the current step, without the weight decay that is part of the loss."""
        return self._core.parts.damping.at(self._core.steps)

    @property
    def damping_factor(self) -> float:
        """The factor that `multiply_damping` has set."""
        return self._core.parts.damping.factor

    def set_damping(self, value: float | None) -> None:
        """Set the damping from now on, in place of the configured one; `multiply_damping` still multiplies it.

        Inverses use it from their next refresh on. It is part of `state_dict`: a resumed run continues with it.

        Args:
            value: λ, without the weight decay that is part of the loss. The same on every rank. None returns to the
                configured damping.

        Raises:
            ConfigError: It is no positive number.
        """
        self._core.parts.damping.set(value)

    def multiply_damping(self, factor: float, *, refresh: bool = False) -> None:
        """Multiply the configured damping from now on, such as after steps that had to be skipped.

        It is part of `state_dict`, and so are pending refreshes: a resumed run continues with them.

        Args:
            factor: Of the configured damping; 1 at first. The same on every rank.
            refresh: Whether every inverse is refreshed at the next step that measures, rather than when it is due.

        Raises:
            ConfigError: The factor is no positive number.
        """
        self._core.parts.damping.multiply(factor)
        if refresh:
            self._core.parts.queue.owe_everything()
            self._core.begin()

    # ---- inverses

    @property
    def can_refresh_again(self) -> bool:
        """Whether this step has refreshed every inverse from its own statistics; a step that is skipped hasn't."""
        return self._core.can_refresh_again

    @torch.no_grad()
    def refresh_again(self) -> None:
        """Solve all inverses anew from the same statistics with the present damping, for use at once; collective.

        Between `update_curvature` and `advance` of a step at which every inverse is due.

        Raises:
            ConfigError: On every rank, before anything is sent: this step has not refreshed every inverse. The others'
                sums and weights are of other steps, and don't belong together.
        """
        if not self.can_refresh_again:
            raise ConfigError(
                f"kfac.refresh_again() at step {self._core.steps}, which has not refreshed every inverse from its own "
                "statistics: call it between update_curvature() and advance() of a step that refreshes all, "
                "with kfac.curvature.stagger and kfac.inversion.stagger 1 at a multiple of "
                f"kfac.inversion.inverse_every ({self.config.inversion.inverse_every})"
            )
        self._core.refresh_again()

    def inverses(self) -> dict[str, Tensor]:
        """Return copies of this rank's inverses, by unit."""
        return {unit.name: group.payload(unit).clone() for group in self._core.parts.groups for unit in group.units}

    def use_inverses(self, values: Mapping[str, Tensor]) -> None:
        """Use the inverses that `inverses` returned on this rank."""
        for group in self._core.parts.groups:
            for unit in group.units:
                group.load(unit, values[unit.name])

    def local_statistics(self) -> dict[str, Tensor]:
        """Return the statistics as this rank alone has them, before a `state_dict` adds the ranks' up.

        That changes them by a rounding. A run that is to go on as if it had never been saved, on as many ranks and
        with the same configuration, loads these on top of its state.
        """
        return self._core.parts.reduction.local()

    def load_local_statistics(self, values: Mapping[str, Tensor]) -> None:
        """Take this rank's own `local_statistics`, after a state of the same moment."""
        self._core.parts.reduction.restore_local(values)

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Leave some blocks out, as if they didn't reproduce their gradients; collective.

        Args:
            reasons: Reason for each in `coverage.uncovered`, by the block's name. Unknown names are ignored.
        """
        self._core.leave_out(reasons)
