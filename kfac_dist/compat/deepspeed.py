"""Private names of DeepSpeed, each behind a function that says its purpose; nothing else in the package uses one.

DeepSpeed has no public hooks into its step or its backward pass. The names that K-FAC needs exist since OLDEST; `check`
refuses a release that lacks them. Names that came later have an alternative here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kfac_dist.errors import ConfigError

OLDEST = "0.19.8"
# Of the engine, in all stages.
_ENGINE = (
    "_config",
    "_running_engine_backward",
    "_take_model_step",
    "_backward_prologue",
    "_backward_prologue_per_tensor",
    "managed_gradient_accumulation",
)
# Of the optimizer of stage 3.
_STAGE_3 = (
    "_get_fp32_opt_state_partition",
    "_get_fp32_grad_state_partition",
    "_reassign_or_swap_out_partitioned_parameters",
)


def check(engine: Any) -> None:
    """Check that this release has the names that K-FAC needs.

    Raises:
        ConfigError: It lacks something: names it, and the releases that have it.
    """
    stage_3 = int(engine.zero_optimization_stage()) == 3
    lacks = [f"engine.{name}" for name in _ENGINE if not hasattr(engine, name)]
    lacks += [f"optimizer.{name}" for name in _STAGE_3 if stage_3 and not hasattr(engine.optimizer, name)]
    if lacks:
        import deepspeed

        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} has no {', '.join(lacks)}, which K-FAC hangs on: install a release "
            f'that has, pip install "deepspeed>={OLDEST}"'
        )


def settings_of(engine: Any) -> Any:
    """Return the configuration as DeepSpeed has read it."""
    return engine._config


# ---- the loop's backward pass


def in_engine_backward(engine: Any) -> bool:
    """Whether `engine.backward(loss)` is running, and not the loop's own `loss.backward()`."""
    return bool(engine._running_engine_backward)


def micro_batch(engine: Any) -> int:
    """Return the number of the micro-batch whose backward pass runs, from 0 in every step."""
    if manages_accumulation(engine):
        return int(engine.micro_steps % engine.gradient_accumulation_steps())
    return max(0, int(engine._unmanaged_backward_count) - int(engine._running_engine_backward))


def manages_accumulation(engine: Any) -> bool:
    """Whether DeepSpeed itself counts micro-batches and ends steps."""
    return bool(engine.managed_gradient_accumulation())


def replace_backward_beginnings(
    engine: Any, replacements: Callable[[Callable[[], None], Callable[[Tensor], Tensor]], tuple[Any, Any]]
) -> None:
    """Replace the engine's hooks at the beginning of a backward pass and on each parameter's first gradient.

    Args:
        engine: DeepSpeed's.
        replacements: Called with the two as they are, returns those to use instead.
    """
    engine._backward_prologue, engine._backward_prologue_per_tensor = replacements(
        engine._backward_prologue, engine._backward_prologue_per_tensor
    )


# ---- its step


class BeforeStep:
    """Calls something at the beginning of each of an engine's optimizer steps, until it is removed.

    Args:
        engine: DeepSpeed's.
        callback: The function to call.
        removed: Called when it is removed.
    """

    def __init__(self, engine: Any, callback: Callable[[], None], removed: Callable[[], None]) -> None:
        self._engine = engine
        self._removed = removed
        self._active = True
        inner = engine._take_model_step

        def take_model_step(*args: Any, **kwargs: Any) -> Any:
            if self._active:
                callback()
            return inner(*args, **kwargs)

        self._outer = engine.__dict__.get("_take_model_step")
        self._own = engine._take_model_step = take_model_step

    def remove(self) -> None:
        """See `Handle.remove`; harmless when repeated."""
        self._active = False
        self._removed()
        if self._engine.__dict__.get("_take_model_step") is not self._own:
            return  # another one came later
        if self._outer is None:
            del self._engine.__dict__["_take_model_step"]
        else:
            self._engine.__dict__["_take_model_step"] = self._outer


# ---- state of its optimizers


def is_padding(gradient: Tensor) -> bool:
    """Whether a tensor among stage 1's and 2's averaged gradients only fills the room between parameters."""
    return bool(getattr(gradient, "_zero_padding", False))


def master_of(optimizer: Any, parameter: Any) -> Tensor:
    """Return this rank's part of a parameter's fp32 values in stage 3, padding and all."""
    found: Tensor = optimizer._get_fp32_opt_state_partition(parameter, False)[0]
    return found


def gradient_of(optimizer: Any, parameter: Any) -> Tensor:
    """Return this rank's writable part of a parameter's averaged gradient in stage 3, padding and all."""
    found: Tensor = optimizer._get_fp32_grad_state_partition(parameter, False)[0]
    return found


def got_gradient(optimizer: Any, parameter: Any) -> bool:
    """Whether a parameter got a gradient in this step of stage 3; unreached parameters keep the last one."""
    seen = getattr(optimizer, "_offload_boundary_param_ids", None)
    return seen is None or parameter.ds_id in seen


def wait_for_offload_copies(optimizer: Any) -> bool:
    """Wait for the copies of gradients to the host that stages 1 and 2 have begun; False if none are noted here."""
    wait = getattr(optimizer, "_wait_for_offload_copies", None)
    if wait is None or not getattr(optimizer, "_offload_gradient_safety_enabled", False):
        return False
    wait()
    return True


def use_masters(optimizer: Any, group: int) -> None:
    """Have stage 3 compute with the fp32 values of a parameter group from now on."""
    optimizer._reassign_or_swap_out_partitioned_parameters(group)
