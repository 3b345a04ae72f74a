"""A run's state in a checkpoint, by name: from live objects to nested dictionaries of tensors, and back.

    model.<parameter or buffer>        optimizer.<parameter>.<state>        kfac.<block>…        rng.rank<r>.<generator>
    average.<parameter>, if the run averages its weights                    engine.<counter>, such as a loss scale
    solver.<state>, if a solver finds the steps
    own.rank<r>.<part>.<tensor>, if the run stopped where no schedule foresaw it

Parameters and their state are saved as each rank holds them, whole or in runs of elements (`training.slices`), in the
precision that the optimizer steps: what one engine saved on W ranks, another loads on any number of them, and no rank
ever has the whole model unless it trains it whole.

Learning rates, momentum and the like are not saved: they come from the configuration, schedules being pure functions
of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from kfac_dist.config.schema import StepSolver
from kfac_dist.distributed.communicators.agreement import agreed
from kfac_dist.engines import TrainingEngine
from kfac_dist.engines.local_shards import LocalShard
from kfac_dist.errors import CheckpointError
from kfac_dist.preconditioner.kfac import KFAC
from kfac_dist.preconditioner.state import MISMATCHED, check_units, mismatched
from kfac_dist.training.checkpoints.checkpoint import Checkpoint, Checkpoints
from kfac_dist.training.checkpoints.differences import Difference, misfit
from kfac_dist.training.checkpoints.random_state import capture_random_state, restore_random_state
from kfac_dist.training.checkpoints.slices import SavedRun, Wanted, piecewise, run_name, saved_runs, straight
from kfac_dist.training.game.players import PlayersKFAC
from kfac_dist.training.setup import RunParts

Saved = dict[str, list[SavedRun]]
_UNITS = "kfac.units."


def capture_state(parts: RunParts, rank: int) -> dict[str, Any]:
    """Return the state of a run as nested dictionaries; collective, because K-FAC's part is."""
    engine, optimizer = parts.engine, parts.optimizer
    holdings = engine.holdings()
    state: dict[str, Any] = {
        "model": {run_name(h.name, h.start, h.values, whole=h.whole): h.values for h in holdings} | _buffers(engine),
        "optimizer": {h.name: held for h in holdings if (held := _optimizer_state(h, optimizer))},
        "engine": engine.counters(),
        "rng": {f"rank{rank}": capture_random_state()},
    }
    if parts.kfac is not None:
        state["kfac"] = parts.kfac.sharded_state_dict()
    if parts.stepper is not None:
        state["solver"] = parts.stepper.state_dict()
    if parts.average is not None:
        state["average"] = parts.average.state()
    return state


def restore_state(
    checkpoints: Checkpoints,
    checkpoint: Checkpoint,
    parts: RunParts,
    rank: int,
    own: dict[str, dict[str, Tensor]],
    changed: Sequence[Difference] = (),
    *,
    fresh_kfac: bool = False,
) -> dict[str, dict[str, Tensor]]:
    """Put a checkpoint's state into a run; collective.

    Ranks that the checkpoint doesn't know (it was written by fewer) keep their freshly seeded random generators. A
    solver other than the one that it was written with starts afresh, and so does K-FAC where the checkpoint has no
    state of it, which is noted; an average begins anew with its weights.

    Args:
        checkpoints: Reads it.
        checkpoint: The checkpoint to restore.
        parts: The parts that it is loaded into.
        rank: This rank.
        own: This rank's own values to load from the checkpoint, if any.
        changed: Differences of the configuration from the checkpoint's.
        fresh_kfac: Leave K-FAC as it is.

    Returns:
        `own` as the checkpoint has it.

    Raises:
        CheckpointError: It can't be read, or is of another model.
    """
    engine, optimizer, kfac, stepper = parts.engine, parts.optimizer, parts.kfac, parts.stepper
    average = parts.average
    held = checkpoints.contents(checkpoint)
    saved = saved_runs(held)
    holdings = engine.holdings()
    if kfac is not None and (fresh_kfac or not any(name.startswith("kfac.") for name in saved)):
        why = "checkpoint.kfac is fresh" if fresh_kfac else "the checkpoint has no state of it"
        checkpoints.notice(f"K-FAC begins afresh at step {checkpoint.step}: {why}; its schedules count from here")
        kfac = None
    with (
        agreed(checkpoints.communicator, CheckpointError, f"can't read {checkpoint.path}"),
        _misfits(checkpoint, changed),
    ):
        _check_model(engine, holdings, saved, checkpoint.path)
        if isinstance(kfac, KFAC):
            names = (name.removeprefix(_UNITS) for name in saved if name.startswith(_UNITS))
            check_units(kfac.monitor.plan, {name.rsplit(".", 1)[0] for name in names})
    if kfac is not None:
        _leave_out(checkpoints, checkpoint, kfac, saved)
    wanted = [Wanted(f"model.{h.name}", h.start, h.values) for h in holdings]
    wanted += [want for h in holdings for want in _optimizer_wants(h, optimizer, saved)]
    averaged = [] if average is None else average.wants(saved)
    wanted += averaged
    state: dict[str, Any] = {
        "model": _buffers(engine),
        "engine": {name: value for name, value in engine.counters().items() if f"engine.{name}" in saved},
        "rng": {f"rank{rank}": capture_random_state()} if f"rng.rank{rank}.torch" in saved else {},
        "own": {f"rank{rank}": _like_saved(own, held, f"own.rank{rank}.")} if own else {},
        **straight(wanted, saved),
    }
    same_solver = _is_same_solver(checkpoints, checkpoint, parts)
    if kfac is not None:
        state["kfac"] = kfac.sharded_state_dict()
        if not same_solver or not any(name.startswith("kfac.") and ".damping." in f".{name}" for name in saved):
            _drop(state["kfac"], "damping")
        _drop(state["kfac"], MISMATCHED)  # taken already, and the run may know of others by now
    if stepper is not None and same_solver and kfac is not None:  # of a fresh K-FAC the solver is fresh, too
        state["solver"] = stepper.state_dict()
    with _misfits(checkpoint, changed):
        checkpoints.load(checkpoint, state, piecewise(wanted, saved))
    engine.restored()
    if average is not None and not averaged:
        average.begin()
    engine.load_counters(state["engine"])
    if kfac is not None:
        with _misfits(checkpoint, changed):
            kfac.load_sharded_state_dict(state["kfac"])
    if stepper is not None and "solver" in state:
        stepper.load_state_dict(state["solver"])
    if state["rng"]:
        restore_random_state(state["rng"][f"rank{rank}"])
    restored: dict[str, dict[str, Tensor]] = state["own"].get(f"rank{rank}", {})
    return restored


def _leave_out(checkpoints: Checkpoints, checkpoint: Checkpoint, kfac: KFAC | PlayersKFAC, saved: Saved) -> None:
    """Leave out the layers that the saved run had left out: it has no statistics of them; collective."""
    members = {"kfac": kfac} if isinstance(kfac, KFAC) else {f"kfac.{name}": kfac[name] for name in kfac.names}
    for name, member in members.items():
        prefix = f"{name}.{MISMATCHED}."
        texts = {
            key.removeprefix(prefix): torch.empty(runs[0].entry.size, dtype=torch.uint8)
            for key, runs in saved.items()
            if key.startswith(prefix)
        }
        if texts:
            checkpoints.load(checkpoint, {f"{prefix}{block}": text for block, text in texts.items()})
            member.solver_access.leave_out(mismatched({MISMATCHED: texts}))


@contextmanager
def _misfits(checkpoint: Checkpoint, changed: Sequence[Difference]) -> Iterator[None]:
    """Name the keys by which K-FAC's state has another form, instead of the tensor that shows it."""
    try:
        yield
    except CheckpointError as error:
        text = str(error)
        if "kfac." not in text and "K-FAC" not in text:
            raise
        raise CheckpointError(misfit(checkpoint.path, text, changed)) from error


def _is_same_solver(checkpoints: Checkpoints, checkpoint: Checkpoint, parts: RunParts) -> bool:
    """Return whether a checkpoint was written with the run's solver.

    Solvers' states have names in common, such as λ's, and what one has set the damping to is no other's.
    """
    before = checkpoint.facts.get("config", {}).get("kfac", {}).get("solver", StepSolver.DIRECT)
    now = parts.kfacs[0].solver_access.config.solver if parts.kfacs else before
    if before != now and parts.stepper is not None:
        checkpoints.notice(f"{checkpoint.path}: written with kfac.solver {before}; {now} starts afresh")
    return bool(before == now)


def _drop(state: dict[str, Any], key: str) -> None:
    """Take a key out of nested dictionaries: a `KFAC`'s own, or each player's."""
    state.pop(key, None)
    for value in state.values():
        if isinstance(value, dict) and "units" in value:
            value.pop(key, None)


def _buffers(engine: TrainingEngine) -> dict[str, Any]:
    """Return the entries of the model's state that are no parameters."""
    parameters = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in engine.module.state_dict().items() if name not in parameters}


def _optimizer_state(holding: LocalShard, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what the optimizer keeps for one holding; a value for all of a parameter's elements is every rank's."""
    state: dict[str, Tensor] = {}
    for key, value in optimizer.state.get(holding.key, {}).items() if holding.key is not None else ():
        if value is None:
            continue
        elementwise = holding.is_elementwise(value)
        within = holding.within(value) if elementwise else value
        name = run_name(key, holding.start, within, whole=holding.whole) if elementwise else key
        state[name] = within
    return state


def _optimizer_wants(holding: LocalShard, optimizer: torch.optim.Optimizer, saved: Saved) -> Iterator[Wanted]:
    """Yield a checkpoint's parts of a holding's optimizer state, and allocate the memory for them.

    A new optimizer has no state yet, and a parameter that was never used has none even later, so the checkpoint tells
    which there is: elementwise, or small such as Adam's step count.
    """
    if holding.key is None:
        return
    prefix, size = f"optimizer.{holding.name}.", torch.Size(holding.shape)
    for name, runs in saved.items():
        key = name.removeprefix(prefix)
        if not name.startswith(prefix) or "." in key:
            continue
        entry = runs[0].entry
        elementwise = not runs[0].is_whole or (entry.size == size and len(size) > 0)
        state = optimizer.state[holding.key]
        if key not in state:
            state[key] = (
                torch.zeros_like(holding.key.detach(), dtype=entry.properties.dtype)
                if elementwise
                else torch.zeros(entry.size, dtype=entry.properties.dtype)
            )
        if elementwise:
            yield Wanted(name, holding.start, holding.within(state[key]))
        else:
            yield Wanted(name, 0, state[key])


def _check_model(engine: TrainingEngine, holdings: list[LocalShard], saved: Saved, path: Path) -> None:
    """Compare the parameters with a checkpoint's.

    Raises:
        CheckpointError: Names the first parameter that one of them lacks, or that has another shape.
    """
    other = "it is of another model or configuration"
    known = set(engine.module.state_dict()) | {name for name, _ in engine.module.named_parameters()}
    for name in saved:
        if name.startswith("model.") and name.removeprefix("model.") not in known:
            raise CheckpointError(f"{path}: has {name}, which this run lacks: {other}")
    for holding in holdings:
        name = f"model.{holding.name}"
        if name not in saved:
            raise CheckpointError(f"{path}: has no {name}, which this run has: {other}")
        first, last = saved[name][0], saved[name][-1]
        if first.is_whole and first.entry.size != torch.Size(holding.shape):
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(first.entry.size)}, in this run {holding.shape}: {other}"
            )
        if last.stop != (numel := torch.Size(holding.shape).numel()):
            raise CheckpointError(f"{path}: {name} has {last.stop} elements, in this run {numel}: {other}")


def _like_saved(own: dict[str, dict[str, Tensor]], held: Metadata, prefix: str) -> dict[str, dict[str, Tensor]]:
    """Return tensors like `own`, sized as in the checkpoint: a window grows with its steps."""

    def sized(name: str, value: Tensor) -> Tensor:
        entry = held.state_dict_metadata.get(name)
        return torch.zeros_like(value) if not isinstance(entry, TensorStorageMetadata) else value.new_zeros(entry.size)

    return {
        part: {name: sized(f"{prefix}{part}.{name}", value) for name, value in tensors.items()}
        for part, tensors in own.items()
    }
