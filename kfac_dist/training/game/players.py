"""The players of a game, each with its own K-FAC; together they have the interface of one `KFAC` for a training loop.

Curvature, inverses, damping and trust region are each player's: K-FAC's blocks belong to the symmetric part of the
game's Jacobian. The gradients already contain the players' interaction (`optimizers.symplectic`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor

from kfac_dist.preconditioner.invert.inspection import RefreshReading
from kfac_dist.preconditioner.kfac import KFAC


class PlayersKFAC:
    """Several `KFAC`s that step, save and load together. Its methods are collective where theirs are.

    Args:
        members: K-FAC of each player, by name; the first one's damping is shown.
        damping_factors: Factor of each player's damping.
    """

    def __init__(self, members: Mapping[str, KFAC], damping_factors: Mapping[str, float]) -> None:
        self._members = dict(members)
        self._factors = dict(damping_factors)
        self.multiply_damping(1.0)

    def __getitem__(self, player: str) -> KFAC:
        """Return a player's K-FAC."""
        return self._members[player]

    @property
    def names(self) -> tuple[str, ...]:
        """The players' names."""
        return tuple(self._members)

    @property
    def members(self) -> tuple[KFAC, ...]:
        """Every player's K-FAC."""
        return tuple(self._members.values())

    @property
    def solver_access(self) -> PlayersKFAC:
        """This object, as a loop's `KFAC.solver_access`: damping, and each rank's own statistics."""
        return self

    @property
    def monitor(self) -> PlayersKFAC:
        """This object, as `KFAC.monitor` of logs: readings of spectra."""
        return self

    def step(self) -> None:
        """Precondition every player's gradients; see `KFAC.step`."""
        for kfac in self.members:
            kfac.step()

    def multiply_damping(self, factor: float, *, refresh: bool = False) -> None:
        """Multiply every player's damping, beyond its own factor; see `SolverAccess`."""
        for player, kfac in self._members.items():
            kfac.solver_access.multiply_damping(factor * self._factors[player], refresh=refresh)

    def metrics(self) -> dict[str, float]:
        """Return every player's numbers under its name, and those of all: the first one's damping, sums of the rest.

        Of asymmetries, which a player has that inverts something here, it is the largest.
        """
        by_player = {player: kfac.metrics() for player, kfac in self._members.items()}
        together: dict[str, float] = {}
        for numbers in by_player.values():
            for name, value in numbers.items():
                match name:
                    case "damping":
                        together.setdefault(name, value)
                    case "asymmetry":
                        together[name] = max(value, together.get(name, 0.0))
                    case "kl_scale":  # neither a sum nor either one's
                        pass
                    case _:
                        together[name] = together.get(name, 0.0) + value
        return together | {
            f"{player}/{name}": numbers[name]
            for player, numbers in by_player.items()
            for name in ("damping", "kl_scale", "failed_inversions")
        }

    def inspect(self, outside: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Read every player's factors at their next refresh; see `Monitor.inspect`."""
        for kfac in self.members:
            kfac.monitor.inspect(outside)

    def inspection(self) -> list[RefreshReading]:
        """Return the readings, with the player before each layer's name; see `Monitor.inspection`."""
        return [
            replace(
                reading,
                factors=tuple(
                    replace(factor, block=f"{player}.{factor.block}", unit=f"{player}.{factor.unit}")
                    for factor in reading.factors
                ),
            )
            for player, kfac in self._members.items()
            for reading in kfac.monitor.inspection()
        ]

    def remove(self) -> None:
        """Take every K-FAC off its model."""
        for kfac in self.members:
            kfac.remove()

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return every player's state by its name; see `KFAC.sharded_state_dict`."""
        return {player: kfac.sharded_state_dict() for player, kfac in self._members.items()}

    def load_sharded_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take a `sharded_state_dict`; see `KFAC.load_sharded_state_dict`."""
        for player, kfac in self._members.items():
            kfac.load_sharded_state_dict(values[player])

    def local_statistics(self) -> dict[str, Tensor]:
        """Return this rank's own statistics, by player; see `SolverAccess`."""
        return {
            f"{player}.{name}": value
            for player, kfac in self._members.items()
            for name, value in kfac.solver_access.local_statistics().items()
        }

    def load_local_statistics(self, values: Mapping[str, Tensor]) -> None:
        """Take `local_statistics`; see `SolverAccess`."""
        for player, kfac in self._members.items():
            prefix = f"{player}."
            own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
            kfac.solver_access.load_local_statistics(own)
