"""Settings of DeepSpeed that K-FAC doesn't support, with alternatives."""

from __future__ import annotations

from typing import Any

from kfac_dist.compat.deepspeed import check, settings_of
from kfac_dist.errors import ConfigError, ModelError


def check_supported(engine: Any) -> None:
    """Refuse settings that would give wrong numbers or hang.

    Raises:
        ModelError: The engine has no optimizer, or its model is no ordinary one.
        ConfigError: The configuration has an unsupported key, or the release lacks names that K-FAC needs.
    """
    if engine.optimizer is None or type(engine.optimizer).__name__ in ("DummyOptim", "DeepSpeedZeRoOffload"):
        raise ModelError(
            "the DeepSpeed engine has no optimizer: give deepspeed.initialize one, or name it in its config"
        )
    check(engine)
    if getattr(engine, "pipeline_parallelism", False):
        raise ModelError("K-FAC doesn't serve DeepSpeed's PipelineModule: use ZeRO, with a model of its own")
    if getattr(engine, "has_moe_layers", False):
        raise ModelError("K-FAC doesn't serve DeepSpeed's MoE layers: their gradients are averaged over other ranks")
    for key, found, advice in _refused(engine):
        if found:
            raise ConfigError(f"DeepSpeed's {key} doesn't work with K-FAC: {advice}")


def _refused(engine: Any) -> list[tuple[str, bool, str]]:
    """Return keys, whether they are set, and alternatives."""
    zero = settings_of(engine).zero_config
    stage = int(engine.zero_optimization_stage())
    offloads = [getattr(zero, "offload_optimizer", None), getattr(zero, "offload_param", None)]
    optimizer = str(engine.optimizer_name() or type(engine.basic_optimizer).__name__).lower()
    return [
        (
            "fp16 with zero_optimization.stage 0",
            stage == 0 and engine.fp16_enabled(),
            "it divides by a loss scale that it never applied; take bf16, or stage 1",
        ),
        ("zero_optimization.zero_hpz_partition_size", _hpz(zero) > 1, "set it to 1"),
        ("zero_optimization.zero_quantized_gradients", _on(zero, "zero_quantized_gradients"), "set it to false"),
        ("zero_optimization.zero_quantized_weights", _on(zero, "zero_quantized_weights"), "set it to false"),
        ("zero_optimization.mics_shard_size", (getattr(zero, "mics_shard_size", -1) or -1) > 0, "leave it out"),
        ("zero_optimization.zenflow", getattr(zero, "zenflow", None) is not None, "leave it out"),
        (
            "zero_optimization.offload_optimizer or offload_param to nvme",
            any(str(getattr(offload, "device", "")).lower().endswith("nvme") for offload in offloads),
            "write device: cpu",
        ),
        (
            "zero_optimization.offload_optimizer.super_offload",
            _on(offloads[0], "super_offload"),
            "set it to false",
        ),
        ("optimizer Muon", "muon" in optimizer, "K-FAC takes that place; use SGD or AdamW"),
        (
            f"optimizer {optimizer}",
            any(word in optimizer for word in ("onebit", "zeroone")),
            "it averages compressed gradients inside of its step; use SGD, AdamW or Lamb",
        ),
        ("gradient_allreduce_op: sum", not engine.gradient_average, "write mean"),
        ("sparse_gradients", _on(settings_of(engine), "sparse_gradients_enabled"), "set it to false"),
        ("sequence or tensor parallelism", engine.mpu is not None or engine.sequence_parallel_size > 1, "leave it out"),
        ("torch_autocast", bool(engine.torch_autocast_enabled()), "write bf16 or fp16 with enabled: true instead"),
        ("compile.deepcompile", bool(engine.is_deepcompile_enabled()), "set it to false"),
    ]


def _hpz(zero: Any) -> int:
    return int(getattr(zero, "zero_hpz_partition_size", 1) or 1)


def _on(section: Any, key: str) -> bool:
    return bool(getattr(section, key, False))
