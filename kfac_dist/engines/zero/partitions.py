"""The places where DeepSpeed's optimizers keep averaged gradients and the parameters that they step.

    stage 0, fp32 or bf16    p.grad, whole on every rank                                   WholeGradients
    stage 1, bf16 with fp32  p._hp_grad, whole on every rank (`BF16_Optimizer`)            HighPrecisionGradients
    stages 1 and 2           each parameter group flattened and cut into W ranges          FlatPartitions
    stage 3                  each parameter flattened and cut into W ranges                ParameterPartitions

Every rank knows all ranges from DeepSpeed's own tables, without communication. Gradients are there between the last
backward of a step and the step; what is written into them is what DeepSpeed steps with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kfac_dist.compat.deepspeed import got_gradient, gradient_of, is_padding, master_of, wait_for_offload_copies
from kfac_dist.distributed.movement.gradient_layout import Slice
from kfac_dist.precision import widened

Held = Iterator[tuple[Any, Tensor]]


class Partitions(ABC):
    """One kind of DeepSpeed optimizer.

    Attributes:
        sharded: Whether ranks hold slices.
        group: The ranks that average gradients.
        size: Their number.
        rank: Index of this one.
        device: The model's device.
    """

    sharded = True

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self.group: dist.ProcessGroup | None = engine.seq_data_parallel_group
        self.size = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)
        self.device: torch.device = next(engine.module.parameters()).device

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The precision in which gradients are held."""

    @abstractmethod
    def slices(self, parameter: Any) -> Iterable[Slice] | None:
        """Return who holds which range of a parameter, nothing if it isn't sharded; None if no rank trains it."""

    @abstractmethod
    def gradients(self) -> Held:
        """Yield parameters with this rank's writable part of their gradients, as far as they got one."""

    @abstractmethod
    def masters(self) -> Held:
        """Yield parameters with this rank's part of their values, as the optimizer steps them."""

    def await_copies(self) -> None:
        """Wait for DeepSpeed's copies to the host, which run in parallel with the following work.

        It waits for them itself in its step, which is after K-FAC has read the gradients.
        """
        if not self._offloads or self.device.type == "cpu":
            return
        if not wait_for_offload_copies(self._optimizer):  # stage 3, and releases that note no copy
            torch.get_device_module(self.device).synchronize(self.device)

    @property
    def _offloads(self) -> bool:
        """Whether gradients lie on the host while the model computes elsewhere."""
        return False

    def rewritten(self) -> None:  # noqa: B027  most optimizers compute it again
        """Update DeepSpeed's values derived from gradients before they were written."""


class WholeGradients(Partitions):
    """Stage 0: every rank holds every gradient in `.grad`."""

    sharded = False

    @property
    def dtype(self) -> torch.dtype:
        """See `Partitions.dtype`."""
        return torch.bfloat16 if self._engine.bfloat16_enabled() else torch.float32

    def slices(self, parameter: Any) -> Iterable[Slice] | None:
        """See `Partitions.slices`."""
        return ()

    def gradients(self) -> Held:
        """See `Partitions.gradients`."""
        yield from ((p, p.grad) for p in self._engine.module.parameters() if p.requires_grad and p.grad is not None)

    def masters(self) -> Held:
        """See `Partitions.masters`; in bf16 the rounded values, with which the model computes."""
        yield from ((p, widened(p.detach())) for p in self._engine.module.parameters() if p.requires_grad)


class HighPrecisionGradients(Partitions):
    """`BF16_Optimizer`: every rank accumulates and averages whole gradients in another precision than the model's."""

    sharded = False

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._known = {p for group in self._optimizer.bf16_groups for p in group}

    @property
    def dtype(self) -> torch.dtype:
        """See `Partitions.dtype`."""
        found: torch.dtype = self._optimizer.grad_acc_dtype
        return found

    def slices(self, parameter: Any) -> Iterable[Slice] | None:
        """See `Partitions.slices`."""
        return () if parameter in self._known else None

    def gradients(self) -> Held:
        """See `Partitions.gradients`."""
        optimizer = self._optimizer
        for group, gradients, known in zip(
            optimizer.bf16_groups, optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True
        ):
            for p, grad, present in zip(group, gradients, known, strict=True):
                if present:
                    yield p, grad.view(p.shape)

    def masters(self) -> Held:
        """See `Partitions.masters`; the rounded values, with which the model computes."""
        yield from ((p, p.detach().float()) for group in self._optimizer.bf16_groups for p in group)


class FlatPartitions(Partitions):
    """Stages 1 and 2: every parameter group is flattened and cut into one range a rank, straight through parameters."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._groups = {p: index for index, group in enumerate(self._optimizer.bit16_groups) for p in group}

    @property
    def dtype(self) -> torch.dtype:
        """See `Partitions.dtype`."""
        optimizer = self._optimizer
        held: torch.dtype = (
            optimizer.master_weights_and_grads_dtype if optimizer.cpu_offload else optimizer.gradient_accumulation_dtype
        )
        return held

    @property
    def _offloads(self) -> bool:
        return bool(self._optimizer.cpu_offload)

    def slices(self, parameter: Any) -> Iterable[Slice] | None:
        """See `Partitions.slices`."""
        if parameter not in self._groups:
            return None
        index = self._groups[parameter]
        return [self._range(parameter, index, rank) for rank in self._holders(parameter, index)]

    def gradients(self) -> Held:
        """See `Partitions.gradients`."""
        self.await_copies()
        optimizer = self._optimizer
        kept = optimizer.offload_gradient_dict if optimizer.cpu_offload else optimizer.averaged_gradients
        for index, parameters in enumerate(optimizer.params_in_partition):
            found = kept.get(index)
            if found is None:
                continue
            flat = getattr(found, "flat_partition", None)
            # The others are padding, some of it between parameters.
            views = None if flat is not None else [grad for grad in found if not is_padding(grad)]
            for position, p in enumerate(parameters):
                first, numel = self._place(p, index)
                if optimizer.cpu_offload and optimizer.get_param_id(p) not in optimizer.norm_for_param_grads:
                    continue
                if flat is not None:
                    yield p, flat.narrow(0, first, numel)
                elif views is not None:
                    yield p, views[position].view(-1)

    def masters(self) -> Held:
        """See `Partitions.masters`."""
        optimizer = self._optimizer
        for index, parameters in enumerate(optimizer.params_in_partition):
            flat = optimizer.single_partition_of_fp32_groups[index].detach()
            yield from ((p, flat.narrow(0, *self._place(p, index))) for p in parameters)

    def rewritten(self) -> None:
        """See `Partitions.rewritten`: with offload, clipping reads norms that were taken as gradients came."""
        optimizer = self._optimizer
        if not optimizer.cpu_offload:
            return
        norms = optimizer.norm_for_param_grads
        for p, grad in self.gradients():
            norms[optimizer.get_param_id(p)] = _norm(grad)
        for index, parameters in enumerate(optimizer.params_in_partition):
            for p, grad in zip(parameters, optimizer.offload_gradient_dict[index], strict=True):
                if optimizer.get_param_id(p) not in norms:
                    grad.zero_()  # of an earlier step

    def _holders(self, parameter: Any, index: int) -> list[int]:
        found: list[int] = self._optimizer.param_to_partition_ids[index][self._optimizer.get_param_id(parameter)]
        return found

    def _range(self, parameter: Any, index: int, rank: int) -> Slice:
        start = int(self._optimizer.grad_start_offset[index][rank][self._optimizer.get_param_id(parameter)])
        return Slice(rank, start, start + self._place(parameter, index, rank)[1])

    def _place(self, parameter: Any, index: int, rank: int | None = None) -> tuple[int, int]:
        """Return where a rank's part of a parameter begins in its range of the group, and how long it is."""
        optimizer, rank = self._optimizer, self.rank if rank is None else rank
        key = optimizer.get_param_id(parameter)
        first = int(optimizer.grad_partition_insertion_offset[index][rank][key])
        start = int(optimizer.grad_start_offset[index][rank][key])
        return first, int(min(parameter.numel() - start, optimizer.partition_size[index] - first))


class ParameterPartitions(Partitions):
    """Stage 3: every parameter is flattened and cut into ceil(numel / W) elements a rank; the last may have fewer."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._trained = [p for group in self._optimizer.fp16_groups for p in group if p.requires_grad]
        self._known = set(self._trained)

    @property
    def dtype(self) -> torch.dtype:
        """See `Partitions.dtype`."""
        optimizer = self._optimizer
        held: torch.dtype = (
            optimizer.master_weights_and_grads_dtype
            if optimizer.offload_optimizer
            else optimizer.gradient_accumulation_dtype
        )
        return held

    @property
    def _offloads(self) -> bool:
        return bool(self._optimizer.offload_optimizer)

    def slices(self, parameter: Any) -> Iterable[Slice] | None:
        """See `Partitions.slices`."""
        if parameter not in self._known:
            return None
        return [Slice(rank, *self._range(parameter, rank)) for rank in range(self.size)]

    def gradients(self) -> Held:
        """See `Partitions.gradients`."""
        self.await_copies()
        yield from self._held(p for p in self._trained if got_gradient(self._optimizer, p))

    def masters(self) -> Held:
        """See `Partitions.masters`."""
        for p in self._trained:
            start, stop = self._range(p, self.rank)
            if start < stop:
                yield p, master_of(self._optimizer, p).detach().narrow(0, 0, stop - start)

    def rewritten(self) -> None:
        """See `Partitions.rewritten`: with offload, clipping reads norms that were taken as gradients came."""
        optimizer = self._optimizer
        if optimizer.offload_optimizer:
            for p, grad in self.gradients():
                optimizer.norm_for_param_grads[optimizer.get_param_id(p)] = _norm(grad)
        for _, grad in self._held(p for p in self._trained if not got_gradient(self._optimizer, p)):
            grad.zero_()  # of an earlier step, preconditioned even: DeepSpeed would step with it again

    def _held(self, parameters: Iterable[Any]) -> Held:
        for p in parameters:
            start, stop = self._range(p, self.rank)
            if start < stop:
                yield p, gradient_of(self._optimizer, p).narrow(0, 0, stop - start)

    def _range(self, parameter: Any, rank: int) -> tuple[int, int]:
        step, numel = parameter.partition_numel(), parameter.ds_numel
        return min(rank * step, numel), min((rank + 1) * step, numel)


def partitions_of(engine: Any) -> Partitions:
    """Return where an engine's optimizer keeps gradients."""
    match int(engine.zero_optimization_stage()):
        case 0:
            return WholeGradients(engine)
        case 3:
            return ParameterPartitions(engine)
        case _ if hasattr(engine.optimizer, "bf16_groups"):
            return HighPrecisionGradients(engine)
        case _:
            return FlatPartitions(engine)


def _norm(grad: Tensor) -> Tensor:
    return grad.double().norm(2)  # type: ignore[no-any-return]
