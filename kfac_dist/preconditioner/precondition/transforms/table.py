"""The stages of a run: a row for each of the package's, and registered ones.

A row makes a stage of the configuration, or none where that doesn't ask for it. A new stage is a file beside this one
and a row; where it comes in the list its own `stage` says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kfac_dist.config.schema import (
    TRANSFORM_NAMES,
    Direction,
    KFACConfig,
    OrthogonalConfig,
    StepSolver,
    Structure,
    UpdateConfig,
    check_new_name,
)
from kfac_dist.errors import ConfigError, ExtensionError, KFACError
from kfac_dist.preconditioner.precondition.transforms.base import Transform, keeps_state
from kfac_dist.preconditioner.precondition.transforms.grafting import Grafting
from kfac_dist.preconditioner.precondition.transforms.inverse import DampedInverse
from kfac_dist.preconditioner.precondition.transforms.momentum import Momentum
from kfac_dist.preconditioner.precondition.transforms.orthogonal import Orthogonalised, StepLength
from kfac_dist.preconditioner.precondition.transforms.trust_region import TrustRegion
from kfac_dist.preconditioner.precondition.transforms.whitening import Whitening


@dataclass(frozen=True)
class Ingredients:
    """The things that stages are made of.

    Attributes:
        update: The configuration.
        trust_region: Made before, because its readings are logged even while it is off.
    """

    update: UpdateConfig
    trust_region: TrustRegion

    @property
    def orthogonal(self) -> OrthogonalConfig | None:
        """The settings of orthogonal steps, if weight matrices take them."""
        return self.update.orthogonal_options if self.update.direction is Direction.ORTHOGONAL else None


def _inverse(given: Ingredients) -> Transform | None:
    return DampedInverse() if given.orthogonal is None else None


def _momentum(given: Ingredients) -> Transform | None:
    own = given.orthogonal
    return None if own is None else Momentum(own.momentum, nesterov=own.nesterov)


def _whitening(given: Ingredients) -> Transform | None:
    own = given.orthogonal
    return None if own is None or not own.whitens else Whitening(own.power_a, own.power_g, own.damping)


def _orthogonalised(given: Ingredients) -> Transform | None:
    own = given.orthogonal
    return None if own is None else Orthogonalised(own.iteration, own.iterations, own.dtype)


def _step_length(given: Ingredients) -> Transform | None:
    return None if given.orthogonal is None else StepLength(given.orthogonal.length)


def _grafting(given: Ingredients) -> Transform | None:
    return None if given.update.graft is None else Grafting(given.update.graft)


def _trust_region(given: Ingredients) -> Transform | None:
    return None if given.update.kl_clip is None else given.trust_region


# In the order in which they come within a stage; those of `update.transforms` come before.
ROWS: Mapping[str, Callable[[Ingredients], Transform | None]] = {
    "inverse": _inverse,
    "momentum": _momentum,
    "whitening": _whitening,
    "orthogonalised": _orthogonalised,
    "step_length": _step_length,
    "grafting": _grafting,
    "trust_region": _trust_region,
}
# Transforms registered from outside of the package.
REGISTERED: dict[str, Callable[..., Transform]] = {}


def add_transform(name: str, make: Callable[..., Transform]) -> None:
    """Add a transform by name; see `kfac_dist.extensions.register_transform`.

    Raises:
        ExtensionError: The name is taken or no name, or `make` can't make a transform.
    """
    where = "register_transform"
    check_new_name(where, name, [*ROWS, *REGISTERED])
    if isinstance(make, type) and not issubclass(make, Transform):
        raise ExtensionError(f"{where}: {make.__name__} must derive from kfac_dist.extensions.Transform")
    if inspect.isabstract(make):
        missing = ", ".join(sorted(getattr(make, "__abstractmethods__", ())))
        raise ExtensionError(f"{where}: {make.__name__} lacks methods: write {missing}")
    if not callable(make):
        raise ExtensionError(f"{where}: found {make!r} for {name!r}; expected a class that derives from Transform")
    try:
        inspect.signature(make).bind_partial()
    except TypeError as error:
        raise ExtensionError(f"{where}: {name!r} can't be made: {error}") from None
    REGISTERED[name] = make
    TRANSFORM_NAMES.add(name)


def check_transforms(chosen: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the arguments of `update.transforms` with the transforms' signatures; calls nothing.

    Raises:
        ConfigError: A transform takes no such argument, or needs another.
    """
    for name, arguments in chosen.items():
        try:
            inspect.signature(REGISTERED[name]).bind(**arguments)
        except TypeError as error:
            raise ConfigError(f"kfac.update.transforms.{name}: {error}") from None


def build_transforms(config: KFACConfig, trust_region: TrustRegion) -> dict[str, Transform]:
    """Return the stages of a run by name, in the order in which they are applied.

    Raises:
        ConfigError: A transform of `update.transforms` can't be made, or doesn't go with the rest of the configuration.
    """
    check_transforms(config.update.transforms)
    made = {name: _made(name, arguments, config) for name, arguments in config.update.transforms.items()}
    given = Ingredients(config.update, trust_region)
    own = {name: stage for name, row in ROWS.items() if (stage := row(given)) is not None}
    return dict(sorted([*made.items(), *own.items()], key=lambda item: item[1].stage))


def _made(name: str, arguments: Mapping[str, Any], config: KFACConfig) -> Transform:
    key = f"kfac.update.transforms.{name}"
    try:
        transform: object = REGISTERED[name](**arguments)
    except KFACError:
        raise
    except Exception as error:  # the user's own code: after any exception the run can't start
        raise ConfigError(f"{key}: making it raises {type(error).__name__}: {error}") from error
    if not isinstance(transform, Transform):
        found = type(transform).__name__
        raise ConfigError(f"{key}: found {found}, expected a class derived from kfac_dist.extensions.Transform")
    if transform.linear and keeps_state(transform):
        raise ConfigError(f"{key}: it says that it is linear, and has a state; a fixed linear map has none")
    if config.solver is not StepSolver.DIRECT and not transform.linear:
        raise ConfigError(
            f"{key} has no effect while kfac.solver is {config.solver}, which finds the step from linear stages alone: "
            "leave it out"
        )
    if config.inversion.structure is Structure.BLOCK_TRIDIAGONAL and transform.whole_matrix:
        raise ConfigError(
            f"{key} takes layers one by one, and kfac.inversion.structure block_tridiagonal couples them: leave one of "
            "them out"
        )
    return transform
