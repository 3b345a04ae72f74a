"""Metric sinks: where the records of `metrics.jsonl` go, too, by code outside of the package.

A sink exists on rank 0 only. Its exception is kept until all ranks check for failures together, and then ends the run
on each of them: a rank that stopped alone would leave the others waiting.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kfac_dist.config.schema import SINK_NAMES, check_new_name
from kfac_dist.errors import ConfigError, ExtensionError, KFACError


class Sink(ABC):
    """Receives the records of a run on rank 0; made of `(directory, first_step, **arguments)`.

    `directory` is the run's, `first_step` the number of steps that a resumed run has done: records beyond it, which an
    earlier attempt may have sent, come again. The arguments are those of `metrics.sinks` in the YAML file. It has no
    state in a checkpoint.
    """

    @abstractmethod
    def write(self, record: dict[str, Any]) -> None:
        """Take one record: `step`, and numbers by name, `null` in `metrics.jsonl` being None; the dict is its own."""

    def rewind(self, step: int) -> None:  # noqa: B027  a sink may keep repeated records
        """Forget the records beyond a step: the run continues from there."""

    def close(self) -> None:  # noqa: B027  most sinks leave nothing open
        """Send the remaining records; called once, also after a failure."""


SINKS: dict[str, Callable[..., Sink]] = {}


def add_sink(name: str, make: Callable[..., Sink]) -> None:
    """Add a sink by name; see `kfac_dist.extensions.register_sink`.

    Raises:
        ExtensionError: The name is taken or no name, or `make` can't make a sink.
    """
    check_new_name("register_sink", name, SINKS)
    if isinstance(make, type) and not issubclass(make, Sink):
        raise ExtensionError(f"register_sink: {make.__name__} must derive from kfac_dist.extensions.Sink")
    if inspect.isabstract(make):
        missing = ", ".join(sorted(getattr(make, "__abstractmethods__", ())))
        raise ExtensionError(f"register_sink: {make.__name__} lacks methods: write {missing}")
    if not callable(make):
        raise ExtensionError(f"register_sink: found {make!r} for {name!r}; expected a class that derives from Sink")
    try:
        inspect.signature(make).bind_partial(Path(), 0)
    except TypeError as error:
        raise ExtensionError(
            f"register_sink: {name!r} can't be made of (directory, first_step): {error}; write "
            "def __init__(self, directory, first_step)"
        ) from None
    SINKS[name] = make
    SINK_NAMES.add(name)


def check_sinks(chosen: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the arguments of `metrics.sinks` with the sinks' signatures; calls nothing.

    Raises:
        ConfigError: A sink takes no such argument, or needs another.
    """
    for name, arguments in chosen.items():
        try:
            inspect.signature(SINKS[name]).bind(Path(), 0, **arguments)
        except TypeError as error:
            raise ConfigError(f"metrics.sinks.{name}: {error}") from None


def build_sinks(chosen: Mapping[str, Mapping[str, Any]], directory: Path, first_step: int) -> dict[str, Sink]:
    """Make the sinks that `metrics.sinks` chooses.

    Raises:
        ConfigError: Wrong arguments, or a sink can't be made.
    """
    check_sinks(chosen)
    sinks: dict[str, Sink] = {}
    for name, arguments in chosen.items():
        try:
            sinks[name] = SINKS[name](directory, first_step, **arguments)
        except KFACError:
            raise
        except Exception as error:  # the user's own code: after any exception the run can't start
            raise ConfigError(f"metrics.sinks.{name}: making it raises {type(error).__name__}: {error}") from error
        if not isinstance(sinks[name], Sink):
            found = type(sinks[name]).__name__
            raise ConfigError(f"metrics.sinks.{name}: found {found}, expected a class derived from kfac_dist's Sink")
    return sinks
