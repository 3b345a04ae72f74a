"""DeepSpeed: ZeRO stages 1, 2 and 3, and stage 0, around the engine that `deepspeed.initialize` returned.

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config="ds.json")
    kfac = KFAC(engine, config)
    ...
    engine.backward(loss); engine.step()        # K-FAC runs inside step, at the accumulation boundary

Gradients are preconditioned between their reduction and all that DeepSpeed does in its step. What it does there sees
preconditioned gradients: the check for overflow, the gradient norm, clipping, the optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.compat.deepspeed import (
    BeforeStep,
    in_engine_backward,
    manages_accumulation,
    micro_batch,
    replace_backward_beginnings,
)
from kfac_dist.compat.torch import in_backward, will_be_reached
from kfac_dist.config.schema import Backend
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.distributed.movement.gradient_layout import GradientLayout, ParameterSlices
from kfac_dist.engines.base import BackwardPass, Handle
from kfac_dist.engines.training_engine import TrainingEngine
from kfac_dist.engines.zero.limits import check_supported
from kfac_dist.engines.zero.partitions import Partitions, partitions_of
from kfac_dist.errors import ModelError


def is_deepspeed_engine(model: object) -> bool:
    """Return whether a model is DeepSpeed's, without importing DeepSpeed."""
    return any(kind.__module__.split(".")[0] == "deepspeed" for kind in type(model).__mro__) and hasattr(
        model, "zero_optimization_stage"
    )


class ZeroEngine(TrainingEngine):
    """A model that `deepspeed.initialize` has wrapped.

    Args:
        model: The `DeepSpeedEngine`, with an optimizer.

    Raises:
        ModelError: It has no optimizer.
        ConfigError: Its configuration has something that K-FAC can't serve.
    """

    def __init__(self, model: nn.Module) -> None:
        deepspeed: Any = model
        check_supported(deepspeed)
        self.model = model
        self.module = deepspeed.module
        self.optimizer = deepspeed.optimizer  # not one of torch's, but with its param_groups
        self._deepspeed = deepspeed
        self._names = {p: name for name, p in self.module.named_parameters()}
        self._partitions: Partitions = partitions_of(deepspeed)
        if self._partitions.sharded and any(p.dtype is torch.float64 for p in self._names):
            warnings.warn(
                "the model is float64, but under ZeRO DeepSpeed averages and steps in float32: steps are as exact "
                "as a float32 model's. Train it under DDP or FSDP2 for float64 steps",
                stacklevel=4,
            )
        self.sharded = self._partitions.sharded
        self._communicator: Communicator | None = None
        self._asides = _Asides(deepspeed, self._agree_on_use)

    def communicator(self, timeout_seconds: float, backend: Backend = Backend.TORCH) -> Communicator:
        """See `Engine.communicator`."""
        found = build_communicator(timeout_seconds, self._partitions.group, backend)
        self._communicator = found
        return found

    def shard_size(self, size: int) -> int:
        """See `Engine.shard_size`: ZeRO cuts over all ranks that average gradients."""
        return size if self.sharded else 1

    def layout(self, names: Iterable[str]) -> GradientLayout:
        """See `Engine.layout`.

        Raises:
            ModelError: A parameter is trained, but DeepSpeed's optimizer doesn't have it.
        """
        by_name = {name: p for p, name in self._names.items()}
        found = []
        for name in names:
            p = by_name[name]
            slices = self._partitions.slices(p)
            if slices is None:
                raise ModelError(
                    f"{name} requires gradients, but it is not in the optimizer that deepspeed.initialize was given: "
                    "freeze it, give it to the optimizer, or name its layer in kfac.curvature.exclude"
                )
            shape = getattr(p, "ds_shape", p.shape)
            found.append(
                ParameterSlices.sharded(name, shape, slices)
                if self.sharded
                else ParameterSlices.replicated(name, shape)
            )
        return GradientLayout(tuple(found), self._partitions.size if self.sharded else 1)

    def gradients(self) -> dict[str, Tensor]:
        """See `Engine.gradients`."""
        return {self._names[p]: grad for p, grad in self._partitions.gradients()}

    def parameters(self) -> dict[str, Tensor]:
        """See `Engine.parameters`."""
        return {self._names[p]: value for p, value in self._partitions.masters()}

    @property
    def gradient_dtype(self) -> torch.dtype:
        """See `Engine.gradient_dtype`."""
        return self._partitions.dtype

    @property
    def gradient_scale(self) -> float:
        """See `Engine.gradient_scale`: the loss scale of fp16, which may change from step to step."""
        return float(self._deepspeed.optimizer.loss_scale) if self._deepspeed.fp16_enabled() else 1.0

    @property
    def stepping(self) -> bool:
        """See `Engine.stepping`; with `managed_gradient_accumulation: false` only `engine.step` itself knows."""
        return bool(self._deepspeed.is_gradient_accumulation_boundary())

    def backward_pass(self) -> BackwardPass:
        """See `Engine.backward_pass`.

        Raises:
            ModelError: Gradients are accumulated, and the loop calls `loss.backward()` itself.
        """
        engine = self._deepspeed
        accumulated = engine.gradient_accumulation_steps()
        if accumulated > 1 and in_backward() and not in_engine_backward(engine):
            raise ModelError(
                "with gradient_accumulation_steps > 1, call engine.backward(loss) instead of loss.backward(): of the "
                "latter, DeepSpeed divides the gradients behind the last layer's hooks, so that its factors would have "
                "another scale than the others'"
            )
        scale = self.gradient_scale / accumulated
        last = manages_accumulation(engine) and bool(engine.is_gradient_accumulation_boundary())
        return BackwardPass(scale, micro_batch(engine), last)

    def before_step(self, callback: Callable[[], None]) -> Handle:
        """See `Engine.before_step`: before DeepSpeed clips, checks for overflow and steps."""

        def run() -> None:
            callback()
            self._written()

        return BeforeStep(self._deepspeed, run, self._let_go)

    def _let_go(self) -> None:
        """Compare nothing any more: the communicator closes."""
        self._communicator = None

    def _agree_on_use(self) -> None:
        """Compare, in the first backward, which parameters it will reach: DeepSpeed mixes up gradients if ranks differ.

        Raises:
            ModelError: On every rank: some rank leaves out a layer that another uses.
        """
        comm, self._communicator = self._communicator, None
        if comm is None or comm.size == 1:
            return
        left_out = {name for p, name in self._names.items() if p.requires_grad and not will_be_reached(p)}
        by_rank = comm.gather_objects(left_out)
        for name in self._names.values():
            without = [rank for rank, names in enumerate(by_rank) if name in names]
            if 0 < len(without) < comm.size:
                raise ModelError(
                    f"rank {without[0]} left {name} out of its first step, and other ranks didn't: DeepSpeed averages "
                    "gradients in the order in which they come, so all ranks have to use the same layers. Use it with "
                    "a factor of 0 where it is left out"
                )

    def _written(self) -> None:
        """Prepare DeepSpeed's step once gradients have their final values."""
        self._partitions.rewritten()

    def own_passes(self, vectors: Iterable[Tensor]) -> Iterator[Tensor]:
        """See `Engine.own_passes`: DeepSpeed must not take them for the loop's backward."""
        return self._asides.run(vectors)

    def whole_shapes(self) -> AbstractContextManager[None]:
        """See `Engine.whole_shapes`: outside of forward, ZeRO-3's parameters are empty."""
        return _whole_shapes(list(self._names))

    def synchronize(self, enabled: bool) -> AbstractContextManager[None]:
        """See `TrainingEngine.synchronize`: DeepSpeed counts micro-batches itself."""
        return nullcontext()

    def finite(self) -> Tensor:
        """See `Engine.finite`; gradients may be offloaded to the CPU."""
        device = self._partitions.device
        gradients = [grad for _, grad in self._partitions.gradients()]
        if not gradients:
            return torch.tensor(True, device=device)
        norms = torch._foreach_norm([grad.float() if grad.dtype is torch.float16 else grad for grad in gradients])
        return torch.isfinite(torch.stack([norm.float() for norm in norms]).sum()).to(device)


class _Asides:
    """Lets K-FAC go back from the model's outputs without DeepSpeed noticing.

    DeepSpeed hangs on the outputs: the first gradient that comes there begins a backward pass. ZeRO-3 counts how often
    each module's parameters are still wanted. So the beginning is put off to the pass that really is the loop's, and
    the counts are set back.

    Args:
        engine: DeepSpeed's.
        begins: Called when one of the loop's backward passes begins.
    """

    def __init__(self, engine: Any, begins: Callable[[], None]) -> None:
        self._engine = engine
        self._active = False
        self._owed = False

        def put_off(prologue: Callable[[], None], per_tensor: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
            def begin() -> None:
                self._owed = self._active
                if not self._active:
                    begins()
                    prologue()

            def scale(grad: Tensor) -> Tensor:
                if self._active:
                    return grad
                if self._owed:
                    begin()
                return per_tensor(grad)

            return begin, scale

        replace_backward_beginnings(engine, put_off)

    def run(self, vectors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield each vector for one backward pass."""
        for vector in vectors:
            counts = [
                (module.__dict__, key, module.__dict__[key])
                for module in self._engine.module.modules()
                for key in ("applied_pre_backward_ref_cnt", "ds_grads_remaining")
                if key in module.__dict__
            ]
            self._active = True
            try:
                yield vector
            finally:
                self._active = False
                for values, key, count in counts:
                    values[key] = count


@contextmanager
def _whole_shapes(parameters: list[Any]) -> Iterator[None]:
    """Let ZeRO-3's parameters show their whole shapes: one element each, expanded."""
    kept = [(p, p.data) for p in parameters if hasattr(p, "ds_shape") and p.shape != p.ds_shape]
    for p, data in kept:
        p.data = data.new_zeros(()).expand(p.ds_shape)
    try:
        yield
    finally:
        for p, data in kept:
            p.data = data
