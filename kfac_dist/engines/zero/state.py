"""The places where DeepSpeed keeps a ZeRO engine's weights and its optimizer's state, by parameter, for checkpoints.

    stages 1, 2   a rank's share of a parameter group is one flat fp32 tensor: consecutive parameters, the first and the
                  last of them cut anywhere
    stage 3       a rank's share of each parameter is its r-th part; the parts of a sub-group make one flat fp32 tensor

The optimizer's state is kept under those flat tensors. Frozen parameters are in none of them: they are whole on every
rank in stages 1 and 2, and cut like the others in stage 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_dist.compat.deepspeed import use_masters
from kfac_dist.engines.local_shards import LocalShard, holdings_of

# State of the loss scale, by DeepSpeed's names.
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_ENGINE = ("global_steps", "micro_steps", "global_samples", "skipped_steps")


def zero_holdings(engine: Any) -> list[LocalShard]:
    """Return this rank's parts under a DeepSpeed engine of stage 1, 2 or 3."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    whole = engine.zero_optimization_stage() < 3
    held = list((_ranges if whole else _parts)(engine.optimizer, names))
    frozen = [(name, parameter) for parameter, name in names.items() if not parameter.requires_grad]
    return held + list(holdings_of(frozen) if whole else _frozen_parts(frozen))


@torch.no_grad()
def use_restored_weights(engine: Any) -> None:
    """Compute with the fp32 weights that were written into `zero_holdings`; collective."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        optimizer.update_lp_params()
        return
    for parameter in engine.module.parameters():
        parameter.partition()  # a copy gathered by a forward pass is outdated
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        use_masters(optimizer, group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def zero_counters(engine: Any) -> dict[str, Tensor]:
    """Return DeepSpeed's counts, and under fp16 the loss scaler's state."""
    scaler = _scaler(engine)
    found = {name: getattr(engine, name) for name in _ENGINE}
    found |= {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)}
    return {name: torch.tensor(float(value), dtype=torch.float64) for name, value in found.items()}


def load_zero_counters(engine: Any, values: dict[str, Tensor]) -> None:
    """Load the result of `zero_counters`."""
    scaler = _scaler(engine)
    for name, value in values.items():
        number = float(value) if name == "cur_scale" else int(value)
        if name in _ENGINE:
            setattr(engine, name, number)
        elif hasattr(scaler, name):
            setattr(scaler, name, number)


def _scaler(engine: Any) -> Any:
    """Return the loss scaler; in other precisions than fp16 it is a constant 1, and has to stay that."""
    return engine.optimizer.loss_scaler if engine.fp16_enabled() else None


def _ranges(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[LocalShard]:
    """Stages 1 and 2."""
    for group, parameters in enumerate(optimizer.bit16_groups):
        flat = optimizer.single_partition_of_fp32_groups[group]
        rank = dist.get_rank(optimizer.real_dp_process_group[group])
        for parameter in parameters:
            number = optimizer.get_param_id(parameter)
            if rank not in optimizer.param_to_partition_ids[group][number]:
                continue
            start = int(optimizer.grad_start_offset[group][rank][number])
            offset = int(optimizer.grad_partition_insertion_offset[group][rank][number])
            count = min(parameter.numel() - start, int(optimizer.partition_size[group]) - offset)
            if count > 0:
                yield _holding(names[parameter], parameter.shape, start, flat, offset, count)


def _parts(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[LocalShard]:
    """Stage 3."""
    for group, parameters in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[group]
        for parameter in parameters:
            start, count = _own_part(parameter)
            _, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            if count > 0:
                yield _holding(names[parameter], parameter.ds_shape, start, flat, offset, count)


def _frozen_parts(frozen: list[tuple[str, nn.Parameter]]) -> Iterator[LocalShard]:
    for name, parameter in frozen:
        start, count = _own_part(parameter)
        if count > 0:
            held = _holding(name, parameter.ds_shape, start, parameter.ds_tensor.data, 0, count)  # type: ignore[attr-defined]
            yield LocalShard(held.name, held.shape, held.start, held.values, None)


def _own_part(parameter: Any) -> tuple[int, int]:
    """Return first element and number of elements of this rank's part; the last parts are short, or empty."""
    size = parameter.partition_numel()
    start = dist.get_rank(parameter.ds_process_group) * size
    return start, min(size, parameter.ds_numel - start)


def _holding(name: str, shape: torch.Size, start: int, flat: Tensor, offset: int, count: int) -> LocalShard:
    values = flat.detach().view(-1)[offset : offset + count]
    whole = count == shape.numel()
    return LocalShard(name, tuple(shape), start, values.view(shape) if whole else values, flat, offset)
