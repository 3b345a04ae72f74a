"""The differences between a configuration and that of a checkpoint, key by key.

A run may resume with another batch size, learning rate, engine or length: one line says so. Where K-FAC's state
no longer fits, the keys that decide its form are named instead of the tensors that differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from kfac_dist.config.schema import Config

# Keys without influence on the results: places of files, timeouts, output.
_IRRELEVANT = ("run.name", "run.directory", "run.device", "run.timeout_seconds", "checkpoint", "metrics", "compare")
_DIVIDING = ("kfac", "engine", "data", "train", "loss")
_FORM = (
    "kfac.curvature.class_conditional",
    "kfac.curvature.exclude",
    "kfac.curvature.factor_dtype",
    "kfac.curvature.fisher",
    "kfac.curvature.include",
    "kfac.curvature.uncovered",
    "kfac.inversion.adapt",
    "kfac.inversion.inverse_dtype",
    "kfac.inversion.inverse_lag",
    "kfac.inversion.max_factor_dim",
    "kfac.inversion.solver",
    "kfac.inversion.splits",
    "kfac.inversion.structure",
)
_MOST_LETTERS = 60


@dataclass(frozen=True)
class Difference:
    """A key that two configurations have different values of.

    Attributes:
        key: Its dotted path.
        before: In the checkpoint.
        now: In this run.
    """

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} → {_shown(self.now)}"

    @property
    def forms_state(self) -> bool:
        """Whether K-FAC's state has another form for it."""
        return _below(self.key, _FORM)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Return every key that matters to a run and that both have, with other values, in the order of `now`.

    Args:
        before: A configuration as plain values; an earlier version's may lack keys, and have others.
        now: This run's.
    """
    return [difference for difference in _compare(before, now, "") if not _below(difference.key, _IRRELEVANT)]


def divides_work_alike(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether ranks of two configurations, on as many ranks, have the same samples and measure the same of them.

    Args:
        before: A configuration as plain values; an earlier version's may lack keys, which then had today's defaults,
            and have keys that are gone.
        now: This run's.
    """
    try:
        known = Config.model_validate(before).model_dump(mode="json")
    except ValidationError:  # it would be refused today
        return False
    return all(known[section] == now[section] for section in _DIVIDING)


def misfit(path: object, reason: str, found: Sequence[Difference]) -> str:
    """Return why K-FAC's state does not fit, by the keys that decide its form, and a remedy.

    Args:
        path: The checkpoint.
        reason: The tensor that did not fit, and why; kept if no key explains it.
        found: Differences of this run.
    """
    keys = [difference for difference in found if difference.forms_state]
    if not keys:
        return reason
    back = ", ".join(f"{difference.key} = {_shown(difference.before)}" for difference in keys)
    return (
        f"{path}: K-FAC's state has another form here: {', '.join(map(str, keys))}; set {back} again, or begin K-FAC's "
        "statistics afresh with checkpoint.kfac=fresh"
    )


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> list[Difference]:
    found: list[Difference] = []
    for key, value in now.items():
        if key not in before or before[key] == value:
            continue
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and isinstance(before[key], Mapping):
            gone = [Difference(f"{name}.{other}", before[key][other], None) for other in before[key].keys() - value]
            come = [Difference(f"{name}.{other}", None, value[other]) for other in value.keys() - before[key].keys()]
            found += _compare(before[key], value, f"{name}.")
            # A section has the same keys always; arguments of the user's own have not.
            found += sorted(gone + come, key=lambda difference: difference.key) if _is_free(name) else []
        else:
            found.append(Difference(name, before[key], value))
    return found


def _is_free(name: str) -> bool:
    """Whether a mapping's keys are the user's."""
    return name.endswith((".args", "splits", "sharing_overrides", "engine.deepspeed"))


def _below(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 1]}…"
