"""What a checkpoint holds of a run, by name: from live objects to nested dictionaries of tensors, and back.

    model.<parameter or buffer>        optimizer.<parameter>.<state>        kfac.<block>…        rng.rank<r>.<generator>
    own.rank<r>.<part>.<tensor>, if the run stopped where no schedule foresaw it

Learning rates, momentum and the like are not saved: they come from the configuration, schedules being pure functions
of the step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from kfac_dist.engines import Engine
from kfac_dist.preconditioner.kfac import KFAC
from kfac_dist.training.checkpoint import Checkpoint, Checkpoints
from kfac_dist.training.random_state import capture_random_state, restore_random_state


def capture_state(engine: Engine, optimizer: torch.optim.Optimizer, kfac: KFAC | None, rank: int) -> dict[str, Any]:
    """Return the state of a run as nested dictionaries; collective, because K-FAC's part is."""
    state: dict[str, Any] = {
        "model": engine.module.state_dict(),
        "optimizer": _optimizer_state(engine.module, optimizer),
        "rng": {f"rank{rank}": capture_random_state()},
    }
    if kfac is not None:
        state["kfac"] = kfac.sharded_state_dict()
    return state


def restore_state(
    checkpoints: Checkpoints,
    checkpoint: Checkpoint,
    engine: Engine,
    optimizer: torch.optim.Optimizer,
    kfac: KFAC | None,
    rank: int,
    own: dict[str, dict[str, Tensor]],
) -> dict[str, dict[str, Tensor]]:
    """Put a checkpoint's state into a run; collective.

    Ranks that the checkpoint doesn't know (it was written by fewer) keep their freshly seeded random generators.

    Args:
        checkpoints: Reads it.
        checkpoint: What to restore.
        engine: The model.
        optimizer: Its optimizer.
        kfac: Its preconditioner, if there is one.
        rank: This rank.
        own: What this rank has for itself and takes from the checkpoint, if any.

    Returns:
        `own` as the checkpoint has it.

    Raises:
        CheckpointError: It can't be read, or is of another model.
    """
    held = checkpoints.contents(checkpoint)
    state: dict[str, Any] = {
        "model": engine.module.state_dict(),
        "optimizer": _optimizer_template(engine.module, optimizer, held),
        "rng": {f"rank{rank}": capture_random_state()} if f"rng.rank{rank}.torch" in held.state_dict_metadata else {},
        "own": {f"rank{rank}": _like_saved(own, held, f"own.rank{rank}.")} if own else {},
    }
    if kfac is not None:
        state["kfac"] = kfac.sharded_state_dict()
    checkpoints.load(checkpoint, state)
    for name, parameter in engine.module.named_parameters():
        if name in state["optimizer"]:
            optimizer.state[parameter] = state["optimizer"][name]
    if kfac is not None:
        kfac.load_sharded_state_dict(state["kfac"])
    if state["rng"]:
        restore_random_state(state["rng"][f"rank{rank}"])
    restored: dict[str, dict[str, Tensor]] = state["own"].get(f"rank{rank}", {})
    return restored


def _optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: value for key, value in optimizer.state[parameter].items() if value is not None}
        for name, parameter in module.named_parameters()
        if parameter in optimizer.state
    }


def _optimizer_template(
    module: nn.Module, optimizer: torch.optim.Optimizer, held: Metadata
) -> dict[str, dict[str, Tensor]]:
    """Return tensors to load the optimizer's state into.

    A new optimizer has none yet, and a parameter that was never used has none even later, so the checkpoint tells
    which there are: shaped like the parameter (then placed like it), or small ones such as Adam's step count.
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    template: dict[str, dict[str, Tensor]] = {}
    for name, parameter in module.named_parameters():
        prefix = f"optimizer.{name}."
        for full_name, entry in held.state_dict_metadata.items():
            key = full_name.removeprefix(prefix)
            if full_name.startswith(prefix) and "." not in key and id(parameter) in trained:
                assert isinstance(entry, TensorStorageMetadata)
                template.setdefault(name, {})[key] = _like(parameter, entry)
    return template


def _like_saved(own: dict[str, dict[str, Tensor]], held: Metadata, prefix: str) -> dict[str, dict[str, Tensor]]:
    """Return tensors like `own`, sized as in the checkpoint: a window grows with its steps."""

    def sized(name: str, value: Tensor) -> Tensor:
        entry = held.state_dict_metadata.get(name)
        return torch.zeros_like(value) if not isinstance(entry, TensorStorageMetadata) else value.new_zeros(entry.size)

    return {
        part: {name: sized(f"{prefix}{part}.{name}", value) for name, value in tensors.items()}
        for part, tensors in own.items()
    }


def _like(parameter: nn.Parameter, entry: TensorStorageMetadata) -> Tensor:
    dtype = entry.properties.dtype
    if entry.size == parameter.shape and len(entry.size):
        return torch.zeros_like(parameter, dtype=dtype)
    return torch.zeros(entry.size, dtype=dtype)
