"""A checkpoint's contents, by unit name, so that it loads under any number of ranks and any placement.

    step, shares                    steps taken; how many ranks' averages add up to the total
    refreshes                       how many there have been
    units/<name>/scalars            weight and trace, then weights by class, `[2 + C]`
    units/<name>/sum                the running sum S, or one for each class
    units/<name>/payload            the inverse in use
    units/<name>/overdue            whether its refresh was due and has not happened
    units/<name>/refreshed          whether it has ever been refreshed
    units/<name>/samples            how samples share its layer's output and lie in it (`Measurement.places`)
    units/<name>/pending, due       with an inverse lag: the inverse used from step `due` on
    damping                         the run's own damping and factor
    adaptation                      how the damping has followed the trust region, if it does
    diagonal, first_order           the diagonal Fisher, or AdamW's averages, of parameters without a block
    moments/<name>                  EKFAC's second moments, under scalars, sum and payload; whether they are `ready`
    transforms/<block>              states of transforms of its gradient, by transform and key, if there are any
    mismatched/<block>              why a block was left out during the run, in UTF-8, if there are such blocks

Between refreshes every rank has its own sums. Saving adds them up first (the average is linear, so this changes them by
rounding at most) and every rank continues with the result, as the resumed run does. Saving waits for inverses that are
being solved or sent: they are `pending`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from kfac_dist.curvature.factors import Unit
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.movement.owner_buffer import Segment, SegmentLayout, share_segments
from kfac_dist.errors import CheckpointError, CollectiveError
from kfac_dist.preconditioner.invert.refresh import PendingRefresh
from kfac_dist.preconditioner.parts import Parts
from kfac_dist.preconditioner.plan import Plan
from kfac_dist.preconditioner.precondition import states

LABEL = "checkpoint"
_LOAD = "load_state_dict"
# The key of the blocks that were left out during the run.
MISMATCHED = "mismatched"
_NEVER = -1
# Seconds after which a rank says that it waits for others in a call that all of them have to make.
PATIENCE = 5.0


def meet(communicator: Communicator, call: str, said: Any = None) -> list[Any]:
    """Come together with the other ranks in a method of `KFAC` that all of them have to call.

    Args:
        communicator: The ranks.
        call: The method's name.
        said: Message to the other ranks.

    Returns:
        Each rank's message.

    Raises:
        CollectiveError: Another rank hasn't come in time, or has called another method.
    """
    if communicator.size == 1:
        return [said]
    what = f"KFAC.{call}(), which every rank has to call"

    def impatient() -> None:
        warnings.warn(
            f"rank {communicator.rank} of {communicator.size} has waited {PATIENCE:g} s for the others in {what}: "
            "call it outside of `if rank == 0`, and write the file inside",
            stacklevel=2,
        )

    timer = threading.Timer(PATIENCE, impatient)
    timer.daemon = True
    timer.start()
    try:
        answers = communicator.gather_objects((call, said), label=LABEL)
    except CollectiveError as error:
        raise CollectiveError(
            f"rank {communicator.rank} of {communicator.size} was alone in {what}: {error}"
        ) from error
    finally:
        timer.cancel()
    for rank, (other, _) in enumerate(answers):
        if other != call:
            raise CollectiveError(
                f"rank {communicator.rank} called KFAC.{call}(), rank {rank} KFAC.{other}(): every rank has to call "
                "the same, in the same order"
            )
    return [answer for _, answer in answers]


def agree_to_load(parts: Parts, values: Mapping[str, Any], leaving: Set[str] = frozenset()) -> None:
    """Refuse a state that doesn't fit on some rank, or isn't the same step's on all; collective.

    Args:
        parts: The parts that it is loaded into.
        values: The state.
        leaving: Blocks that are left out before it is loaded, as in the run that was saved.

    Raises:
        CheckpointError: On every rank.
    """
    try:
        _check(parts, values, leaving)
        problem, step = None, int(values["step"])
    except CheckpointError as error:
        problem, step = error, -1
    answers = meet(parts.communicator, _LOAD, (None if problem is None else str(problem), step))
    if problem is not None:
        raise problem
    for rank, (reason, _) in enumerate(answers):
        if reason is not None:
            raise CheckpointError(f"rank {rank}: {reason}")
    steps = [step for _, step in answers]
    if len(set(steps)) > 1:
        raise CheckpointError(f"ranks load K-FAC states of different steps: {steps}, by rank; load one state on all")


def refuse_to_load(communicator: Communicator, problem: CheckpointError) -> None:
    """Send the reason why this rank can't load to the ranks in `agree_to_load`; collective."""
    meet(communicator, _LOAD, (str(problem), -1))


def held(parts: Parts, step: int) -> dict[str, Any]:
    """Return this rank's state: sums that are global here, and payloads of its column; collective."""
    parts.reduction.consolidate()
    pending = _pending(parts)
    holders, places = parts.refresh.holders, parts.measurement.places()
    units: dict[str, dict[str, Tensor]] = {}
    for unit in parts.plan.units:
        entry = {
            "scalars": parts.reduction.consolidated_scalars(unit).clone(),
            "overdue": torch.tensor(parts.plan.blocks[unit.block].slot in parts.queue.overdue),
            "refreshed": torch.tensor(parts.plan.blocks[unit.block].slot in parts.queue.refreshed),
            "samples": torch.tensor(places[unit.block]),
        }
        if parts.reduction.keeps(unit):
            entry["sum"] = parts.averages.sums(unit).clone()
        if unit.name in holders:
            entry["payload"] = holders[unit.name].payload(unit).clone()
            if parts.lagged:
                payload, due = pending.get(unit.name, (torch.zeros_like(entry["payload"]), _NEVER))
                entry |= {"pending": payload, "due": torch.tensor(due)}
        units[unit.name] = entry
    return {
        "step": torch.tensor(step),
        "shares": torch.tensor(parts.reduction.shares),
        "refreshes": torch.tensor(parts.refresh.refreshes),
        "units": units,
        "damping": parts.damping.state_dict(),
        **({parts.uncovered.key: parts.uncovered.state_dict()} if parts.uncovered.names else {}),
        **({} if parts.moments is None else {"moments": parts.moments.held()}),
        **({"transforms": parts.preconditioner.states.held()} if _transform_shapes(parts) else {}),
        **({"adaptation": parts.damping.adaptation.state_dict()} if parts.damping.adaptation.active else {}),
        **({MISMATCHED: {name: _as_bytes(why) for name, why in parts.mismatched.items()}} if parts.mismatched else {}),
    }


def gather(parts: Parts, step: int) -> dict[str, Any]:
    """Return the state of all units, the same on every rank; collective."""
    values = held(parts, step)
    if parts.communicator.size == 1:
        return values
    for key in ("sum", "payload", *(("pending",) if parts.lagged else ())):
        _gather_key(parts, parts.plan, values["units"], key)
    if parts.moments is not None:
        for key in ("sum", "payload"):
            _gather_key(parts, parts.moments.plan, values["moments"], key)
    if parts.lagged:
        _gather_due(parts, values["units"])
    if "transforms" in values:
        values["transforms"] = _gather_transforms(parts, values["transforms"])
    return values


def load(parts: Parts, values: Mapping[str, Any]) -> int:
    """Take a state into the parts and return its step.

    Raises:
        CheckpointError: A unit is missing or has another shape.
    """
    _check(parts, values)
    parts.damping.load_state_dict(values.get("damping"))
    parts.uncovered.load_state_dict(values.get(parts.uncovered.key))
    parts.damping.adaptation.load_state_dict(values.get("adaptation"))
    scale = float(values["shares"]) / parts.reduction.shares
    holders = parts.refresh.holders
    parts.refresh.refreshes = int(values["refreshes"])
    parts.refresh.pending.clear()
    coming: dict[int, list[tuple[Unit, Tensor]]] = {}
    for unit in parts.plan.units:
        entry = values["units"][unit.name]
        parts.reduction.restore(unit, entry.get("sum"), entry["scalars"], scale)
        if unit.name in holders:
            holders[unit.name].load(unit, entry["payload"].to(parts.averages.device))
            if "due" in entry and int(entry["due"]) != _NEVER:
                # Without a lag, pending payloads are used at once.
                due = int(entry["due"]) if parts.lagged else int(values["step"])
                coming.setdefault(due, []).append((unit, entry["pending"].to(parts.averages.device)))
    parts.refresh.pending.extend(
        PendingRefresh(due, [unit for unit, _ in payloads], payloads) for due, payloads in sorted(coming.items())
    )
    if parts.moments is not None:
        parts.moments.restore(values.get("moments"))
    parts.preconditioner.states.load(values.get("transforms", {}))
    return int(values["step"])


def marked(parts: Parts, values: Mapping[str, Any], mark: str) -> set[int]:
    """Return the slots of which a unit carries a mark, `overdue` or `refreshed`."""
    return {parts.plan.blocks[unit.block].slot for unit in parts.plan.units if values["units"][unit.name][mark]}


def places(parts: Parts, values: Mapping[str, Any]) -> dict[str, int]:
    """Return how samples share each block's output and where they lie in it, as far as the state knows."""
    return {unit.block: int(values["units"][unit.name].get("samples", 0)) for unit in parts.plan.units}


def mismatched(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the blocks that the run has left out before the state was saved, and why."""
    return {name: bytes(text.tolist()).decode() for name, text in values.get(MISMATCHED, {}).items()}


def _as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def check_units(plan: Plan, saved: Iterable[str]) -> None:
    """Refuse a state whose units, by name, are not all that the plan makes of the same blocks.

    A unit's values depend on its block's other units: a chain's eigenbases alone have no meaning.

    Raises:
        CheckpointError: For the first unit of a known block that the plan hasn't.
    """
    known = {unit.name for unit in plan.units}
    for name in saved:
        if name not in known and name.rsplit("/", 2)[0] in plan.blocks:
            raise CheckpointError(
                f"the K-FAC state has a unit {name!r}, which this configuration hasn't: resume with the same "
                "kfac.inversion.structure, max_factor_dim and splits, and the same kfac.curvature.fisher"
            )


def _pending(parts: Parts) -> dict[str, tuple[Tensor, int]]:
    return {
        unit.name: (payload.clone(), refreshed.due)
        for refreshed in parts.refresh.pending
        for unit, payload in parts.refresh.arrived(refreshed)
    }


def _gather_key(parts: Parts, plan: Plan, units: dict[str, dict[str, Tensor]], key: str) -> None:
    """Give every rank a key of every unit, from the unit's owner: it holds all of its own units' values."""
    owners = plan.assignment.owners
    stored = {unit.name: unit.statistics for unit in plan.units}
    numel = {
        unit.name: stored[unit.name].numel if key == "sum" else parts.refresh.payload_numel(unit) for unit in plan.units
    }
    layout = SegmentLayout(
        [Segment(unit.name, numel[unit.name], owners[unit.name]) for unit in plan.units], parts.communicator.size
    )
    dtype = parts.averages.average.dtype if key == "sum" else parts.averages.working
    buffer = torch.empty(layout.sharing_numel, dtype=dtype, device=parts.averages.device)
    for unit in plan.units:
        if owners[unit.name] == parts.communicator.rank:
            layout.view(buffer, unit.name).copy_(units[unit.name][key].flatten())
    share_segments(parts.communicator, buffer, layout, label=LABEL).wait()
    for unit in plan.units:
        values = layout.view(buffer, unit.name)
        units[unit.name][key] = values.view(stored[unit.name].shape) if key == "sum" else values


def _gather_due(parts: Parts, units: dict[str, dict[str, Tensor]]) -> None:
    own = {unit.name: int(units[unit.name]["due"]) for unit in parts.plan.units if parts.owns(unit)}
    for gathered in parts.communicator.gather_objects(own, label=LABEL):
        for name, due in gathered.items():
            units[name]["due"] = torch.tensor(due)


def _transform_shapes(parts: Parts) -> dict[str, dict[str, tuple[int, ...]]]:
    return states.shapes_of(parts.preconditioner.transforms, parts.plan)


def _gather_transforms(parts: Parts, held: Mapping[str, states.BlockState]) -> dict[str, states.BlockState]:
    """Give every rank the state of every block's transforms, from a rank that preconditions the block."""
    shapes, comm = _transform_shapes(parts), parts.communicator
    rows = [(block, key, shape) for block, own in shapes.items() for key, shape in own.items()]
    owners = {block: parts.plan.blocks[block].owners[0] for block in shapes}
    layout = SegmentLayout(
        [Segment(f"{block}/{key}", torch.Size(shape).numel(), owners[block]) for block, key, shape in rows], comm.size
    )
    buffer = torch.empty(layout.sharing_numel, dtype=parts.averages.working, device=parts.averages.device)
    for block, key, _ in rows:
        if owners[block] == comm.rank:
            layout.view(buffer, f"{block}/{key}").copy_(held[block][key].flatten())
    share_segments(comm, buffer, layout, label=LABEL).wait()
    found: dict[str, states.BlockState] = {}
    for block, key, shape in rows:
        found.setdefault(block, {})[key] = layout.view(buffer, f"{block}/{key}").view(shape)
    return found


def _check(parts: Parts, values: Mapping[str, Any], leaving: Set[str] = frozenset()) -> None:
    saved = values.get("units", {})
    for key in ("step", "shares", "refreshes"):
        if key not in values:
            raise CheckpointError(
                f"the K-FAC state has no {key!r}: it isn't what this version's KFAC.state_dict() returns"
            )
    check_units(parts.plan, saved)
    staying = {name: shapes for name, shapes in _transform_shapes(parts).items() if name not in leaving}
    states.check(staying, values.get("transforms", {}))
    for unit in parts.plan.units:
        if unit.block in leaving:
            continue
        if unit.name not in saved:
            raise CheckpointError(
                f"the K-FAC state has no unit {unit.name!r}: it belongs to another model, to other "
                "kfac.curvature.include/exclude, or to other kfac.inversion.max_factor_dim or splits"
            )
        scalars, own = saved[unit.name]["scalars"], parts.averages.scalars
        if len(scalars) != len(own):
            raise CheckpointError(
                f"the K-FAC state of unit {unit.name!r} is of {len(scalars) - 2} classes, this configuration's of "
                f"{len(own) - 2}: resume with the same kfac.curvature.class_conditional"
            )
        found, shape = saved[unit.name].get("sum"), unit.statistics.shape
        if found is not None and tuple(found.shape) != shape:
            raise CheckpointError(
                f"the K-FAC state of unit {unit.name!r} has shape {tuple(found.shape)}, this model's is {shape}: "
                "it belongs to another model, or to other kfac.inversion.max_factor_dim or splits"
            )
        payload = saved[unit.name].get("payload")
        if payload is not None and payload.numel() != parts.refresh.payload_numel(unit):
            raise CheckpointError(
                f"the K-FAC state of unit {unit.name!r} was made by another kfac.inversion.solver: resume with that one"
            )
