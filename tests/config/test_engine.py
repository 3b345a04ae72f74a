"""The engine section: what contradicts the rest of a run is refused, what another engine reads is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.config.schema import EngineConfig, EngineName
from kfac_dist.config.yaml.load import load_config
from kfac_dist.errors import ConfigError

CONFIG = Path(__file__).parents[2] / "configs/byte_gpt.yaml"


@pytest.mark.parametrize(
    ("deepspeed", "message"),
    [
        ("{train_batch_size: 4}", "engine.deepspeed.train_batch_size follows from train.batch_size: leave it out"),
        ("{gradient_clipping: 1.0}", "engine.deepspeed.gradient_clipping follows from train.clip_grad_norm"),
        ("{gradient_accumulation_steps: 2}", "engine.deepspeed.gradient_accumulation_steps follows from train.accum"),
        ("{optimizer: {type: Adam}}", "engine.deepspeed.optimizer follows from optimizer"),
        ("{zero_optimization: {stage: 3}}", "engine.deepspeed.zero_optimization.stage follows from engine.name"),
        ("{bf16: {enabled: true}}", "engine.deepspeed.bf16.enabled follows from engine.precision"),
    ],
)
def test_deepspeed_says_nothing_that_the_run_says(deepspeed: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIG, ["engine.name=zero2", f"engine.deepspeed={deepspeed}"])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "precision", "advice"),
    [
        ("ddp", "bfloat16", "use fsdp2, zero1, zero2 or zero3"),
        ("ddp", "float16", "use zero1, zero2 or zero3"),
        ("fsdp2", "float16", "use zero1, zero2 or zero3"),
    ],
)
def test_precisions_belong_to_engines(name: str, precision: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.precision {precision} is nothing that {name} trains in: {advice}"):
        load_config(CONFIG, [f"engine.name={name}", f"engine.precision={precision}"])


def test_sections_of_other_engines_may_stay() -> None:
    config = load_config(
        CONFIG, ["engine.name=fsdp2", "engine.deepspeed={fp16: {initial_scale_power: 8}}", "engine.bucket_cap_mb=5"]
    )
    assert config.engine.name is EngineName.FSDP2
    assert not config.engine.waits_for_every_gradient
    assert EngineConfig().waits_for_every_gradient


def test_an_unknown_engine_names_those_that_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"engine\.name: found 'zero4', expected one of ddp, fsdp2, zero1, zero2, zero3"
    ):
        load_config(CONFIG, ["engine.name=zero4"])
