"""What DeepSpeed is told, and what is said where it is missing."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from kfac_dist.config.schema import EngineConfig, TrainConfig
from kfac_dist.engines import check_sections
from kfac_dist.engines.zero.config import deepspeed_settings
from kfac_dist.errors import ConfigError

TRAIN = TrainConfig.model_validate({"batch_size": 50, "accumulate": 4, "steps": 1, "clip_grad_norm": 0.5})


def engine(**values: Any) -> EngineConfig:
    return EngineConfig.model_validate({"name": "zero2", **values})


def test_the_run_says_it_once_and_deepspeed_hears_it() -> None:
    section = {"zero_optimization": {"overlap_comm": True}, "fp16": {"initial_scale_power": 8}, "bf16": {}}
    settings = deepspeed_settings(engine(precision="float16", deepspeed=section), TRAIN, world_size=3)
    assert settings["train_micro_batch_size_per_gpu"] == 5
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"] == {"overlap_comm": True, "stage": 2}
    assert settings["fp16"] == {"initial_scale_power": 8, "enabled": True}
    assert "bf16" not in settings
    assert section["fp16"] == {"initial_scale_power": 8}, "the configuration stays as it was"


def test_a_section_that_is_none_is_refused() -> None:
    pytest.importorskip("deepspeed")
    with pytest.raises(ConfigError, match=r"engine.deepspeed.fp16: found 1, expected a mapping"):
        check_sections(engine(deepspeed={"fp16": 1}), TRAIN, on_cpu=True)


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r'engine.name: zero2 needs DeepSpeed: pip install "kfac_dist\[deepspeed\]"'):
        check_sections(engine(), TRAIN, on_cpu=True)
    check_sections(EngineConfig(), TRAIN, on_cpu=True)
