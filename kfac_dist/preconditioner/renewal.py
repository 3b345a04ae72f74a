"""Changes of a model after K-FAC was made for it, and blocks that turned out to be wrong.

Either way the blocks are found, planned and built again on every rank, and units that remain keep their state by name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfac_dist.curvature.blocks import Block, Coverage
from kfac_dist.curvature.capture.arbiter import Mismatch
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.engines import Engine

LABEL = "model changes"
# Beginnings of warnings.
MISMATCHED = "the inputs and output gradients captured of these layers don't make the gradients of their weights"
# Consequence of a change of the model, by whether the engine can follow it.
FOLLOWS = {
    True: "its layers are covered anew, and what is known of those that remain goes on",
    False: "DeepSpeed goes on with the parameters that it has laid out, and K-FAC with their layers: change a model "
    "before deepspeed.initialize",
}
IDLE = "no backward pass has come through"
# Names shown in a message before the rest is counted.
_NAMES = 8


class ParameterWatch:
    """Notices trained parameters that came, went or were replaced since K-FAC last looked at the model.

    Freezing is no change: a frozen layer has no gradient, and its block waits until it has one again.

    Args:
        engine: The model.
        communicator: The ranks, of which any may have noticed.
    """

    def __init__(self, engine: Engine, communicator: Communicator) -> None:
        self._engine = engine
        self._communicator = communicator
        self.take()

    def take(self) -> None:
        """Take the model as it is now."""
        self._named = False
        self._known = self._engine.named_parameters()
        self._trained = {name for name, parameter in self._known.items() if parameter.requires_grad}

    def changed(self, *, agree: bool, device: torch.device) -> bool:
        """Return whether the parameters have changed on any rank, as far as ranks may agree now.

        Args:
            agree: Whether ranks vote: collective, and waits for the device. One rank needs none.
            device: Device of the vote.
        """
        own = self._differs()
        if self._communicator.size == 1:
            return own
        if not agree:
            if own and not self._named:
                self._named = True
                warnings.warn(
                    f"{self.message()}: its layers are covered anew at the next refresh of inverses", stacklevel=7
                )
            return False
        votes = torch.tensor([float(own)], dtype=torch.float32, device=device)
        self._communicator.all_reduce(votes, label=LABEL).wait()
        return bool(votes.item())

    def message(self) -> str:
        """Describe the changes."""
        said = "; ".join(self.differences()) or "on another rank"
        return f"the model's trained parameters have changed since KFAC was made ({said})"

    def differences(self) -> list[str]:
        """Return the changes, a phrase for each kind, with the parameters' names."""
        now = self._engine.named_parameters()
        trained = {name for name, parameter in now.items() if parameter.requires_grad}
        kinds = {
            "new": [name for name in now if name not in self._known],
            "gone": [name for name in self._known if name not in now],
            "replaced": [name for name in now if name in self._known and now[name] is not self._known[name]],
            "unfrozen": [
                name for name in now if self._known.get(name) is now[name] and name in trained - self._trained
            ],
        }
        return [f"{kind}: {listed(names)}" for kind, names in kinds.items() if names]

    def _differs(self) -> bool:
        count = 0
        for name, parameter in self._engine.named_parameters().items():
            count += 1
            if self._known.get(name) is not parameter or (parameter.requires_grad and name not in self._trained):
                return True
        return count != len(self._known)


def without(coverage: Coverage, mismatches: Iterable[Mismatch]) -> Coverage:
    """Return a coverage without the blocks that don't reproduce their gradients, and blocks that share their weights.

    The rows of one parameter are covered together or not at all.
    """
    reasons = {mismatch.block: reason_of(mismatch) for mismatch in mismatches}
    lost: dict[str, str] = {}
    for block in coverage.blocks:
        if block.name in reasons:
            lost |= dict.fromkeys(block.parameters, reasons[block.name])
    kept = tuple(block for block in coverage.blocks if block.name not in reasons and not lost.keys() & block.parameters)
    covered = {name for block in kept for name in block.parameters}
    for block in coverage.blocks:
        if block not in kept:
            lost |= {name: next(iter(lost.values())) for name in block.parameters if name not in lost}
    return replace(
        coverage,
        blocks=kept,
        idle=tuple(block.name for block in kept if block.name in coverage.idle),
        mismatched={**coverage.mismatched, **reasons},
        uncovered={**coverage.uncovered, **{n: r for n, r in lost.items() if n not in covered}},
    )


def reason_of(mismatch: Mismatch) -> str:
    """Say why a block that was judged has none any more."""
    if math.isnan(mismatch.scale):
        return mismatch.cause
    off = "by its whole size" if mismatch.off == math.inf else f"by {mismatch.off:.2g} of its norm"
    return f"what its hooks captured misses its gradient {off}: {mismatch.cause}"


def message_of(mismatches: Sequence[Mismatch]) -> str:
    """Return one message that names every block that was judged wrong."""
    shown = [f"  {mismatch.block}: {reason_of(mismatch)}" for mismatch in mismatches[:_NAMES]]
    more = [f"  and {len(mismatches) - _NAMES} more"] if len(mismatches) > _NAMES else []
    return "\n".join(
        [
            f"{MISMATCHED}, so that their K-FAC factors would be wrong; they keep their plain gradient from now on "
            "(kfac.curvature.on_mismatch: error stops instead)",
            *shown,
            *more,
        ]
    )


def carry(before: Mapping[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return the state of newly built parts, `after`, with all that an older state knows of the same units."""
    merged = {**before, "units": _common(before["units"], after["units"])}
    if "moments" in after:
        merged["moments"] = _common(before.get("moments", {}), after["moments"])
    if "transforms" in after:
        merged["transforms"] = _common(before.get("transforms", {}), after["transforms"])
    for key in ("diagonal", "first_order"):
        if key in after:
            merged[key] = {part: _kept(before.get(key, {}).get(part), new) for part, new in after[key].items()}
        else:
            merged.pop(key, None)
    # Sums that were totals stay totals: the ranks' shares are those of the parts that take them.
    return {**merged, "shares": before["shares"]}


def _kept(old: Any, new: Any) -> Any:
    """Return an older value, or of values by parameter those that have kept their shape."""
    if not isinstance(new, Mapping):
        return new if old is None else old
    known = old or {}
    return {n: known[n] if n in known and known[n].shape == value.shape else value for n, value in new.items()}


def _common(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {name: before[name] if _same(before.get(name), new) else new for name, new in after.items()}


def _same(old: Mapping[str, Tensor] | None, new: Mapping[str, Tensor]) -> bool:
    """Whether an older entry of a unit fits: its values have the same shapes."""
    if old is None:
        return False
    return all(key in old and old[key].shape == value.shape for key, value in new.items())


def idle_message(names: Sequence[str]) -> str:
    """Say which layers have not been measured by the time when their inverses are due."""
    return (
        f"{IDLE} {listed(names)} so far, on any rank: they keep their plain gradient until one does. If the model uses "
        "their weights by hand, as in F.linear(x, layer.weight), call the layers instead"
    )


def listed(names: Sequence[str]) -> str:
    """Return names as a list that stays readable."""
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more


def same_blocks(one: Sequence[Block], other: Sequence[Block]) -> set[str]:
    """Return the names of the blocks that two coverages have in common: the same layers with the same parameters."""
    known = {block.name: block for block in other}
    return {
        block.name
        for block in one
        if block.name in known
        and block.module is known[block.name].module
        and block.describe() == known[block.name].describe()
        and all(own is known[block.name].parameters.get(name) for name, own in block.parameters.items())
    }
