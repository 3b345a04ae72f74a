"""`fully_shard`, as a configuration asks for it."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from kfac_dist.config.schema import FSDP2Config, Precision
from kfac_dist.engines.fsdp2 import FSDP2Engine
from kfac_dist.errors import ConfigError

_DTYPES = {Precision.FLOAT32: torch.float32, Precision.BFLOAT16: torch.bfloat16, Precision.FLOAT16: torch.float16}


def build_fsdp2(model: nn.Module, config: FSDP2Config, precision: Precision, device: torch.device) -> FSDP2Engine:
    """Shard a model over all ranks; collective.

    Args:
        model: The model, on its device.
        config: How.
        precision: In what it computes.
        device: This rank's.

    Raises:
        ConfigError: `wrap` has a pattern that matches no module, or `replicas` doesn't divide the number of ranks.
    """
    modules = modules_to_wrap(model, config.wrap)
    mesh = _mesh(config.replicas, device.type)
    policy = (
        MixedPrecisionPolicy()
        if precision is Precision.FLOAT32
        else MixedPrecisionPolicy(param_dtype=_DTYPES[precision], reduce_dtype=_DTYPES[config.reduce_dtype])
    )
    for module in modules:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return FSDP2Engine(model)


def modules_to_wrap(model: nn.Module, patterns: tuple[str, ...] | None) -> list[nn.Module]:
    """Return the modules below the whole model that are gathered as one, the innermost first.

    Args:
        model: The whole model.
        patterns: Names; None takes the children of each `ModuleList` and `Sequential` inside of the model. A model that
            is itself one of those is a list of layers, which are gathered together.

    Raises:
        ConfigError: A pattern matches nothing.
    """
    named = {name: module for name, module in model.named_modules() if name and any(True for _ in module.parameters())}
    if patterns is None:
        lists = [m for name, m in named.items() if isinstance(m, nn.ModuleList | nn.Sequential)]
        children = {id(child) for container in lists for child in container.children()}
        found = [name for name, module in named.items() if id(module) in children]
    else:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise ConfigError(
                    f"engine.fsdp2.wrap: {pattern!r} matches no module with parameters; there are "
                    f"{', '.join(list(named)[:8])}{', …' if len(named) > 8 else ''}"
                )
        found = [name for name in named if any(fnmatchcase(name, pattern) for pattern in patterns)]
    # A container has no forward pass of its own in which it could be gathered.
    return [named[name] for name in reversed(found) if not isinstance(named[name], nn.ModuleList | nn.ModuleDict)]


def _mesh(replicas: int, device_type: str) -> DeviceMesh:
    ranks = dist.get_world_size()
    if ranks % replicas:
        raise ConfigError(f"engine.fsdp2.replicas: {replicas} copies don't divide {ranks} ranks evenly")
    if replicas == 1:
        return init_device_mesh(device_type, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))
