"""A run's DeepSpeed configuration: its section, completed by other sections, and checked by DeepSpeed."""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from kfac_dist.config.schema import EngineConfig, Precision, TrainConfig
from kfac_dist.errors import ConfigError

PREFIX = "engine.deepspeed"
# Sections that are completed by other sections of the run.
_COMPLETED = ("zero_optimization", "bf16", "fp16")


def import_deepspeed(config: EngineConfig, *, on_cpu: bool) -> ModuleType:
    """Import DeepSpeed, quietly.

    Raises:
        ConfigError: It isn't installed.
    """
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f'engine.name: {config.name} needs DeepSpeed: pip install "kfac_dist[deepspeed]" ({error})'
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if on_cpu:
        # Its kernel serves inference_all_reduce alone, and would be compiled for half a minute, if there is a compiler.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    module: ModuleType = deepspeed
    return module


def deepspeed_settings(config: EngineConfig, train: TrainConfig, world_size: int) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`.

    Args:
        config: The engine section; a ZeRO engine.
        train: Batches and clipping.
        world_size: Ranks. DeepSpeed multiplies it with the size of a micro-batch, and uses the product to count.
    """
    settings = copy.deepcopy(config.deepspeed)
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    settings.setdefault("steps_per_print", sys.maxsize)
    settings["train_micro_batch_size_per_gpu"] = -(-train.batch_size // (train.accumulate * world_size))
    settings["gradient_accumulation_steps"] = train.accumulate
    settings["gradient_clipping"] = train.clip_grad_norm or 0.0
    settings["zero_optimization"] = {**settings.get("zero_optimization", {}), "stage": config.name.zero_stage}
    for key, precision in (("bf16", Precision.BFLOAT16), ("fp16", Precision.FLOAT16)):
        if config.precision is precision:
            settings[key] = {**settings.get(key, {}), "enabled": True}
        elif key in settings:
            settings.pop(key)  # options of a precision that this run doesn't use
    return settings


def check_settings(config: EngineConfig, train: TrainConfig, *, on_cpu: bool) -> None:
    """Have DeepSpeed check its section.

    Raises:
        ConfigError: DeepSpeed isn't installed, or refuses the section: names the key.
    """
    import_deepspeed(config, on_cpu=on_cpu)
    from deepspeed.runtime.config import DeepSpeedConfig

    for key in _COMPLETED:
        if not isinstance(found := config.deepspeed.get(key, {}), dict):
            raise ConfigError(f"{PREFIX}.{key}: found {found!r}, expected a mapping")
    settings = _Read(deepspeed_settings(config, train, world_size=1))
    try:
        DeepSpeedConfig(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error, config.deepspeed))) from error
    except (ValueError, TypeError, AssertionError, KeyError, AttributeError) as error:
        raise ConfigError(f"{PREFIX}: DeepSpeed refuses it: {error}") from error
    from deepspeed.accelerator import get_accelerator

    if config.precision is Precision.FLOAT16 and not get_accelerator().is_fp16_supported():
        raise ConfigError("engine.precision: DeepSpeed finds no support for float16 on this device: use bfloat16")
    known = _known_keys() | settings.seen
    for key in config.deepspeed:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ConfigError(f"{PREFIX}.{key}: DeepSpeed knows no such key{hint}")


class _Read(dict[str, Any]):
    """A mapping that remembers which keys were asked for: DeepSpeed ignores those that it doesn't know."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """See `dict.get`."""
        self.seen.add(key)
        return super().get(key, default)


def _known_keys() -> set[str]:
    """Return the names that DeepSpeed gives to keys: some are read only when what they configure is built."""
    from deepspeed.runtime import constants

    return {value for value in vars(constants).values() if isinstance(value, str) and value.isidentifier()}


def _lines(error: ValidationError, section: dict[str, Any]) -> Iterator[str]:
    for detail in error.errors():
        path = [str(part) for part in detail["loc"]]
        inside = next((name for name, value in section.items() if _has(value, path)), None)
        where = ".".join([PREFIX, *([inside] if inside else []), *path])
        unknown = detail["type"] == "extra_forbidden"
        yield f"{where}: " + (
            "DeepSpeed knows no such key" if unknown else f"{detail['msg']}, found {detail['input']!r}"
        )


def _has(value: Any, path: list[str]) -> bool:
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True
