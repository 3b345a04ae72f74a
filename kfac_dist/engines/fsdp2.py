"""FSDP2: a model to which the user has applied `torch.distributed.fsdp.fully_shard`; rank r holds rows of everything.

one mesh dimension      W = S ranks hold each gradient once
(replicate, shard)      W = R × S: each row of the mesh, S consecutive ranks, holds each gradient once

        shard 0   shard 1
row 0      0         1          rank = row * S + shard; gradients are averaged over all of them, so that every row
row 1      2         3          holds the same values
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from kfac_dist.compat.torch import times_written, uncompiled
from kfac_dist.config.schema import Backend, FSDP2Config, Precision
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.distributed.movement.gradient_layout import GradientLayout, ParameterSlices
from kfac_dist.engines.local_shards import LocalShard
from kfac_dist.engines.training_engine import TrainingEngine
from kfac_dist.errors import ConfigError, ModelError


class FSDP2Engine(TrainingEngine):
    """A model whose trained parameters `fully_shard` has cut along their first dimension, over one mesh.

    Args:
        model: The module that the training loop calls: the sharded one, or the one compiled from it.

    Raises:
        ModelError: A trained parameter is not sharded, or not by rows, or over another mesh than the others; or it is
            offloaded to a CPU while the model runs elsewhere; or torch is too old to shard on CPUs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.module = uncompiled(model)
        self.take_parameters()
        self._mesh = _common_mesh(self._trained)
        if self._mesh.device_type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise ModelError(f"fully_shard of torch {torch.__version__} runs on GPUs alone: on CPUs it needs torch 2.7")
        self._shards = self._mesh.size(self._mesh.ndim - 1)
        self.sharded = self._shards > 1
        self._group: dist.ProcessGroup | None = None

    def communicator(self, timeout_seconds: float, backend: Backend = Backend.TORCH) -> Communicator:
        """See `Engine.communicator`: over all ranks of the mesh."""
        ranks = self._mesh.mesh.flatten().tolist()
        if self._group is None and len(ranks) < dist.get_world_size():
            # A group of one mesh dimension is there already, one of both isn't.
            self._group = (
                self._mesh.get_group()
                if self._mesh.ndim == 1
                else dist.new_group(ranks, use_local_synchronization=True)
            )
        return build_communicator(timeout_seconds, self._group, backend)

    def shard_size(self, size: int) -> int:
        """See `Engine.shard_size`."""
        return self._shards

    def layout(self, names: Iterable[str]) -> GradientLayout:
        """See `Engine.layout`."""
        rows = (
            ParameterSlices.rows(name, self._trained[name].shape, self._shards)
            if self.sharded
            else ParameterSlices.replicated(name, self._trained[name].shape)
            for name in names
        )
        return GradientLayout(tuple(rows), self._shards)

    def gradients(self) -> dict[str, Tensor]:
        """See `Engine.gradients`."""
        return self._held({name: p.grad for name, p in self._trained.items() if isinstance(p.grad, DTensor)})

    def parameters(self) -> dict[str, Tensor]:
        """See `Engine.parameters`."""
        return self._held(self._trained)

    def trained(self) -> Iterable[nn.Parameter]:
        """See `Engine.trained`: the sharded ones, also while the module has whole ones."""
        return cast(Iterable[nn.Parameter], self._trained.values())

    def take_parameters(self) -> bool:
        """See `Engine.take_parameters`."""
        self._sharded_modules = [module for module in self.module.modules() if isinstance(module, FSDPModule)]
        trained = {name: p for name, p in self.named_parameters().items() if p.requires_grad}
        self._trained = {name: _checked(name, parameter) for name, parameter in trained.items()}
        return True

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """See `Engine.named_parameters`: the sharded ones, also after an evaluation, which leaves whole ones."""
        for module in self._sharded_modules:
            module.reshard()
        return super().named_parameters()

    @torch.no_grad()
    def times_written(self, tensors: Iterable[Tensor]) -> int:
        """See `Engine.times_written`: writes into a DTensor and into its shard are counted separately."""
        known = list(tensors)
        return times_written(known) + times_written(cast(DTensor, tensor).to_local() for tensor in known)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """See `Engine.gradient_dtype`: that of the parameters, for any mixed precision policy."""
        kinds = {parameter.dtype for parameter in self._trained.values()}
        return kinds.pop() if len(kinds) == 1 else torch.float32

    def synchronize(self, enabled: bool) -> AbstractContextManager[None]:
        """See `TrainingEngine.synchronize`."""
        return nullcontext() if enabled else self._without_reduction()

    @contextmanager
    def _without_reduction(self) -> Iterator[None]:
        for module in self._sharded_modules:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in self._sharded_modules:
                module.set_requires_gradient_sync(True, recurse=False)

    @torch.no_grad()  # or `to_local` would be an operation of autograd's
    def holdings(self) -> list[LocalShard]:
        """See `TrainingEngine.holdings`."""
        for module in self._sharded_modules:
            module.reshard()  # an evaluation leaves the outermost module with whole parameters
        return super().holdings()

    @torch.no_grad()
    def _held(self, tensors: dict[str, DTensor]) -> dict[str, Tensor]:
        """Return what this rank holds: flat where it is a slice; nothing of what it has no rows of."""
        local = {name: tensor.to_local() for name, tensor in tensors.items()}
        if not self.sharded:
            return local
        return {name: rows.view(-1) for name, rows in local.items() if rows.numel()}


def _checked(name: str, parameter: nn.Parameter) -> DTensor:
    """Return a parameter that is sharded as the engine expects it."""
    if not isinstance(parameter, DTensor):
        raise ModelError(
            f"{name} is trained, but not sharded: fully_shard averages gradients over the ranks only for what it "
            "shards. Apply fully_shard to the whole model as well (after its layers), leave the parameter out of "
            "ignored_params, or freeze it"
        )
    *outer, last = parameter.placements
    if not (isinstance(last, Shard) and type(last) is Shard and last.dim == 0) or any(
        not isinstance(placement, Replicate) for placement in outer
    ):
        raise ModelError(
            f"{name} is placed as {tuple(parameter.placements)}: K-FAC takes parameters that are sharded by rows, "
            "Shard(0) over one mesh dimension or (Replicate(), Shard(0)) over two; leave out shard_placement_fn and "
            "tensor parallelism"
        )
    if parameter.device.type != parameter.device_mesh.device_type:
        raise ModelError(
            f"{name} lies on {parameter.device.type}, but the model runs on {parameter.device_mesh.device_type}: K-FAC "
            "preconditions where the layers run; leave out CPUOffloadPolicy"
        )
    return parameter


def _common_mesh(parameters: dict[str, DTensor]) -> DeviceMesh:
    """Return the one mesh of all parameters, whose ranks ascend."""
    if not parameters:
        raise ModelError("the model has no trained parameter")
    meshes = {name: parameter.device_mesh for name, parameter in parameters.items()}
    first, mesh = next(iter(meshes.items()))
    other = next((name for name, found in meshes.items() if found != mesh), None)
    if other is not None:
        raise ModelError(
            f"{first} and {other} are sharded over different meshes, {mesh} and {meshes[other]}: K-FAC needs one mesh "
            "for all parameters"
        )
    ranks = mesh.mesh.flatten().tolist()
    if mesh.ndim > 2 or ranks != sorted(ranks):
        raise ModelError(
            f"the mesh of the model's parameters has ranks {mesh.mesh.tolist()}: K-FAC needs one dimension, or "
            "(replicate, shard), with ranks in ascending order; make it with init_device_mesh"
        )
    return mesh


_DTYPES = {Precision.FLOAT32: torch.float32, Precision.BFLOAT16: torch.bfloat16, Precision.FLOAT16: torch.float16}


def build_fsdp2(model: nn.Module, config: FSDP2Config, precision: Precision, device: torch.device) -> FSDP2Engine:
    """Shard a model over all ranks; collective.

    Args:
        model: The model, on its device.
        config: The distribution.
        precision: In what it computes.
        device: This rank's.

    Raises:
        ConfigError: `wrap` has a pattern that matches no module, or `replicas` doesn't divide the number of ranks.
    """
    modules = modules_to_wrap(model, config.wrap)
    mesh = _mesh(config.replicas, device.type)
    policy = (
        MixedPrecisionPolicy()
        if precision is Precision.FLOAT32
        else MixedPrecisionPolicy(param_dtype=_DTYPES[precision], reduce_dtype=_DTYPES[config.reduce_dtype])
    )
    for module in modules:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return FSDP2Engine(model)


def modules_to_wrap(model: nn.Module, patterns: tuple[str, ...] | None) -> list[nn.Module]:
    """Return the modules below the whole model that are gathered as one, the innermost first.

    Args:
        model: The whole model.
        patterns: Names; None takes the children of each `ModuleList` and `Sequential` inside of the model. A model that
            is itself one of those is a list of layers, which are gathered together.

    Raises:
        ConfigError: A pattern matches nothing.
    """
    named = {name: module for name, module in model.named_modules() if name and any(True for _ in module.parameters())}
    if patterns is None:
        lists = [m for name, m in named.items() if isinstance(m, nn.ModuleList | nn.Sequential)]
        children = {id(child) for container in lists for child in container.children()}
        found = [name for name, module in named.items() if id(module) in children]
    else:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise ConfigError(
                    f"engine.fsdp2.wrap: {pattern!r} matches no module with parameters; there are "
                    f"{', '.join(list(named)[:8])}{', …' if len(named) > 8 else ''}"
                )
        found = [name for name in named if any(fnmatchcase(name, pattern) for pattern in patterns)]
    # A container has no forward pass of its own in which it could be gathered.
    return [named[name] for name in reversed(found) if not isinstance(named[name], nn.ModuleList | nn.ModuleDict)]


def _mesh(replicas: int, device_type: str) -> DeviceMesh:
    ranks = dist.get_world_size()
    if ranks % replicas:
        raise ConfigError(f"engine.fsdp2.replicas: {replicas} copies don't divide {ranks} ranks evenly")
    if replicas == 1:
        return init_device_mesh(device_type, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))
