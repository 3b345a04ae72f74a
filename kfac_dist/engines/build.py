"""From a model (wrapped by the user, or by the configuration) to its engine."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfac_dist.config.schema import EngineConfig, EngineName
from kfac_dist.distributed.bootstrap import World
from kfac_dist.engines.base import Engine
from kfac_dist.engines.ddp import DDPEngine
from kfac_dist.engines.zero import ZeroEngine, is_deepspeed_engine


def as_engine(model: nn.Module | Engine) -> Engine:
    """Return the engine of a model that the user has wrapped already (or not at all)."""
    if isinstance(model, Engine):
        return model
    if is_deepspeed_engine(model):
        return ZeroEngine(model)
    if not _fully_sharded(model):
        return DDPEngine(model)
    from kfac_dist.engines.fsdp2 import FSDP2Engine

    return FSDP2Engine(model)


def _fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied; who did that has imported its package, which takes a second."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def build_engine(model: nn.Module, config: EngineConfig, world: World) -> Engine:
    """Move a model to this rank's device and distribute it as the configuration says; collective."""
    match config.name:
        case EngineName.DDP:
            return _build_ddp(model, config, world)


def _build_ddp(model: nn.Module, config: EngineConfig, world: World) -> Engine:
    if config.sync_batchnorm and world.world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(world.device)
    if world.world_size == 1:
        return DDPEngine(model)
    wrapped = DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        bucket_cap_mb=config.bucket_cap_mb,
        find_unused_parameters=config.find_unused_parameters,
        gradient_as_bucket_view=True,
    )
    return DDPEngine(wrapped)
