"""The `engine` section: how the model's parameters are distributed.

    ddp                    every rank holds the whole model
    fsdp2                  every rank holds rows of each parameter
    zero1, zero2, zero3    DeepSpeed: each rank holds a share of the optimizer's state, of the gradients too, of all

`deepspeed` is DeepSpeed's own configuration. Settings of other sections (batches, clipping, the optimizer, the stage)
are not repeated in it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Self

from pydantic import Field, model_validator

from kfac_dist.config.section import Count, Flag, OpenNames, Pattern, Positive, Section
from kfac_dist.errors import ConfigError


class EngineName(OpenNames):
    """Distribution of the model's parameters: one of these, or a registered engine."""

    DDP = "ddp"
    FSDP2 = "fsdp2"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"

    @property
    def zero_stage(self) -> int | None:
        """DeepSpeed's stage; None for engines that are not DeepSpeed's."""
        return {EngineName.ZERO1: 1, EngineName.ZERO2: 2, EngineName.ZERO3: 3}.get(self)

    @property
    def cuts(self) -> bool:
        """Whether the planner knows it to cut gradients over ranks; of a registered engine it takes them for whole."""
        return self is not EngineName.DDP and not self.added


class Precision(StrEnum):
    """Precision of the model's computations; optimizers always step in float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


# DeepSpeed's key → ours, which says the same.
_OURS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.accumulate",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clipping": "train.clip_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.lr",
    "zero_optimization.stage": "engine.name",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
    "fp16.auto_cast": "engine.precision",
}


class FSDP2Config(Section):
    """Arguments of `fully_shard`.

    Attributes:
        wrap: Patterns (`fnmatch`, on module names) of modules that are gathered as one, each before its forward pass.
            By default the children of every `ModuleList` or `Sequential` inside of the model that have parameters.
            Modules that match no pattern are gathered with the whole model.
        replicas: Copies of the model, R: ranks are a mesh of R rows, each of which holds the model once.
        reshard_after_forward: Whether to let go of gathered parameters between forward and backward.
        reduce_dtype: Precision in which gradients are averaged, if the model computes in another.
    """

    wrap: tuple[Pattern, ...] | None = None
    replicas: Count = 1
    reshard_after_forward: Flag = True
    reduce_dtype: Precision = Precision.FLOAT32


class EngineConfig(Section):
    """Distribution of the model's parameters.

    Attributes:
        name: A built-in engine, or one that a module under `extensions` registers.
        precision: Precision of the model. `bfloat16` needs fsdp2 or ZeRO, `float16` ZeRO, which scales the loss.
        sync_batchnorm: Make BatchNorm take its statistics over all ranks.
        bucket_cap_mb: DDP: size of the buckets of gradients.
        find_unused_parameters: DDP: the loss may leave parameters out.
        fsdp2: Options of FSDP2.
        deepspeed: DeepSpeed's configuration, as its JSON would have it.
    """

    name: EngineName = EngineName.DDP
    precision: Precision = Precision.FLOAT32
    sync_batchnorm: Flag = False
    bucket_cap_mb: Positive = 25.0
    find_unused_parameters: Flag = False
    fsdp2: FSDP2Config = Field(default_factory=FSDP2Config)
    deepspeed: dict[str, Any] = Field(default_factory=dict)

    @property
    def waits_for_every_gradient(self) -> bool:
        """Whether ranks wait for the gradient of a parameter that the loss leaves out."""
        return self.name is EngineName.DDP and not self.find_unused_parameters

    def shard_size(self, world_size: int) -> int:
        """Return how many consecutive ranks together hold each gradient once: 1 if each holds all.

        Raises:
            ConfigError: The model's copies don't divide the ranks.
        """
        if not self.name.cuts:
            return 1
        copies = self.fsdp2.replicas if self.name is EngineName.FSDP2 else 1
        if world_size % copies:
            raise ConfigError(f"engine.fsdp2.replicas: {copies} copies don't divide {world_size} ranks evenly")
        return world_size // copies

    @model_validator(mode="after")
    def _precision_fits(self) -> Self:
        allowed = {EngineName.DDP: [Precision.FLOAT32], EngineName.FSDP2: [Precision.FLOAT32, Precision.BFLOAT16]}
        if self.precision not in allowed.get(self.name, list(Precision)):
            raise ValueError(
                f"precision {self.precision} is nothing that {self.name} trains in: use "
                + ("zero1, zero2 or zero3" if self.precision is Precision.FLOAT16 else "fsdp2, zero1, zero2 or zero3")
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_says_nothing_twice(self) -> Self:
        for key, ours in _OURS.items():
            value: Any = self.deepspeed
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                raise ValueError(f"deepspeed.{key} follows from {ours}: leave it out, and set that one")
        return self
