"""From a model (wrapped by the user, or by the configuration) to its engine."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfac_dist.compat.torch import shorten_unchosen_timeouts
from kfac_dist.config.schema import EngineConfig, EngineName, TrainConfig
from kfac_dist.distributed.startup.bootstrap import World
from kfac_dist.engines.base import Engine
from kfac_dist.engines.ddp import DDPEngine
from kfac_dist.engines.training_engine import TrainingEngine
from kfac_dist.engines.zero.engine import ZeroEngine, is_deepspeed_engine
from kfac_dist.errors import ConfigError, ExtensionError, ModelError

OptimizerOf = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Make = Callable[[nn.Module, EngineConfig, World], TrainingEngine]
# Engines registered from outside of the package.
REGISTERED: dict[EngineName, Make] = {}


def add_engine(name: str, make: Make) -> None:
    """Add an engine by name; see `kfac_dist.extensions.register_engine`.

    Raises:
        ExtensionError: The name is taken or no name, or `make` can't make an engine.
    """
    where = "register_engine"
    if isinstance(make, type) and not issubclass(make, TrainingEngine):
        raise ExtensionError(f"{where}: {make.__name__} must derive from kfac_dist.extensions.Engine")
    if inspect.isabstract(make):
        missing = ", ".join(sorted(getattr(make, "__abstractmethods__", ())))
        raise ExtensionError(f"{where}: {getattr(make, '__name__', make)} lacks methods: write {missing}")
    if not callable(make):
        raise ExtensionError(f"{where}: found {make!r} for {name!r}; expected a class that derives from Engine")
    try:
        inspect.signature(make).bind(None, None, None)
    except TypeError as error:
        raise ExtensionError(
            f"{where}: {name!r} can't be made of (model, config, world): {error}; write "
            "def __init__(self, model, config, world)"
        ) from None
    REGISTERED[EngineName.add(name, where)] = make


def as_engine(model: nn.Module | Engine) -> Engine:
    """Return the engine of a model that the user has wrapped already (or not at all).

    Raises:
        ModelError: It is wrapped in a way that no engine serves.
    """
    if isinstance(model, Engine):
        return model
    if is_deepspeed_engine(model):
        return ZeroEngine(model)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ModelError(
            "the model is wrapped in FullyShardedDataParallel, whose flat parameters hide the layers' own: shard it by "
            "torch.distributed.fsdp.fully_shard instead"
        )
    if not _fully_sharded(model):
        return DDPEngine(model)
    from kfac_dist.engines.fsdp2 import FSDP2Engine

    return FSDP2Engine(model)


def _fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied; its package, whose import takes a second, is imported already then."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def check_engine(config: EngineConfig, train: TrainConfig, world: World) -> None:
    """Refuse settings that can be refused without a model.

    Raises:
        ConfigError: A sharded engine without a launcher; DeepSpeed is missing, or refuses its section.
    """
    if config.name.cuts and world.backend is None:
        raise ConfigError(
            f"engine.name: {config.name} needs ranks that a launcher started, if only one: torchrun --standalone "
            "--nproc-per-node 1 -m kfac_dist train ..."
        )
    check_sections(config, train, on_cpu=world.device.type == "cpu")


def check_sections(config: EngineConfig, train: TrainConfig, *, on_cpu: bool) -> None:
    """Refuse settings that can be refused without ranks or a model.

    Raises:
        ConfigError: DeepSpeed is missing, or refuses its section.
    """
    if config.name.zero_stage is not None:
        from kfac_dist.engines.zero.config import check_settings

        check_settings(config, train, on_cpu=on_cpu)


def build_engine(
    model: nn.Module, config: EngineConfig, train: TrainConfig, world: World, build_optimizer: OptimizerOf
) -> tuple[TrainingEngine, torch.optim.Optimizer]:
    """Move a model to this rank's device, distribute it as the configuration says, and build its optimizer; collective.

    Args:
        model: The model; what is returned may be made of it.
        config: Its distribution.
        train: Batches and clipping, which DeepSpeed is told at its start.
        world: The ranks.
        build_optimizer: Makes an optimizer of the parameters: those of the distributed model, or the model's own if
            the engine wants to distribute them itself.

    Raises:
        ConfigError: See `check_engine`; FSDP2's options don't fit the model or the number of ranks.
    """
    engine, optimizer = _built(model, config, train, world, build_optimizer)
    shorten_unchosen_timeouts()
    return engine, optimizer


def _built(
    model: nn.Module, config: EngineConfig, train: TrainConfig, world: World, build_optimizer: OptimizerOf
) -> tuple[TrainingEngine, torch.optim.Optimizer]:
    check_engine(config, train, world)
    if config.sync_batchnorm and world.world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(world.device)
    engine: TrainingEngine
    if config.name in REGISTERED:
        engine = REGISTERED[config.name](model, config, world)
        if not isinstance(engine, TrainingEngine):
            raise ConfigError(
                f"engine.name: {config.name} made {type(engine).__name__}, expected a class derived from "
                "kfac_dist.extensions.Engine"
            )
        return engine, build_optimizer(engine.module.parameters())
    match config.name:
        case EngineName.DDP:
            engine = _build_ddp(model, config, world)
        case EngineName.FSDP2:
            from kfac_dist.engines.fsdp2 import build_fsdp2

            engine = build_fsdp2(model, config.fsdp2, config.precision, world.device)
        case EngineName.ZERO1 | EngineName.ZERO2 | EngineName.ZERO3:
            from kfac_dist.engines.zero.loop import build_zero

            return build_zero(model, config, train, world, build_optimizer)
    return engine, build_optimizer(engine.module.parameters())


def _build_ddp(model: nn.Module, config: EngineConfig, world: World) -> TrainingEngine:
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
