"""Training runs of models under `fully_shard`, whose global batches don't depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kfac_dist import KFAC
from kfac_dist.engines import as_engine
from tests.preconditioner.workloads import CLASSES, GLOBAL_BATCH, MODELS, part, place

WIDTH = 8

# For the files whose tests shard on CPUs.
SHARDS_ON_CPUS = hasattr(torch.cpu.Stream, "record_event")
needs_sharding = pytest.mark.skipif(not SHARDS_ON_CPUS, reason="torch 2.6 shards on GPUs alone")


class AttentionNet(nn.Module):
    """Fused attention: q, k and v share one parameter, and may have three owners."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = inputs.unflatten(1, (-1, 6))
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


class TiedNet(nn.Module):
    """An embedding and the head that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


class ScaledNet(nn.Module):
    """Parameters without a block, of which one has fewer elements than ranks; and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2))
        self.mixing = nn.Parameter(torch.eye(WIDTH))
        self.body = nn.Linear(WIDTH, 7)
        self.unused = nn.Linear(3, 5)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(inputs @ self.mixing))) * self.gain.prod()


class CheckpointedNet(nn.Module):
    """Layers that backward computes again."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(WIDTH, 11)
        self.middle = nn.Sequential(nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 7))
        self.head = nn.Linear(7, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        again: Tensor = checkpoint(self.middle, hidden, use_reentrant=self.reentrant)
        return self.head(torch.tanh(again))


def _gpt2() -> nn.Module:
    from tests.preconditioner.transformer_models import gpt2  # transformers takes seconds to import

    return gpt2()


MAKE: dict[str, Callable[[], nn.Module]] = {
    **MODELS,
    "attention": AttentionNet,
    "tied": TiedNet,
    "scaled": ScaledNet,
    "checkpointed": lambda: CheckpointedNet(reentrant=False),
    "reentrant": lambda: CheckpointedNet(reentrant=True),
    "gpt2": _gpt2,
}
TOKENS = {"token": 5, "tied": 5, "gpt2": 5}
# Modules that are sharded by themselves, inside of the model as a whole.
WRAPPED = {
    "mlp": ("0", "2"),
    "conv": ("stem", "norm", "grouped", "head"),
    "token": ("embedding", "hidden"),
    "attention": ("attention",),
    "checkpointed": ("first", "middle"),
    "reentrant": ("first", "middle"),
    "gpt2": ("model.transformer.h.0", "model.transformer.h.1"),
}


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        model: A key of `MAKE`.
        config: K-FAC's options.
        steps: How many.
        micro_batches: Of each step.
        clip: Norm to which the preconditioned gradient is clipped.
        adam: AdamW instead of SGD.
        frozen: Modules that aren't trained.
        policy: Dtypes of a `MixedPrecisionPolicy` by name, for runs that shard.
    """

    model: str
    config: Mapping[str, Any]
    steps: int = 20
    micro_batches: int = 1
    clip: float | None = None
    adam: bool = False
    frozen: tuple[str, ...] = ()
    policy: Mapping[str, torch.dtype] = field(default_factory=dict)


def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    """All ranks: in one row, or in rows that hold every gradient once."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def sharded(
    model: nn.Module, mesh: DeviceMesh, wrapped: tuple[str, ...] = (), policy: Mapping[str, torch.dtype] | None = None
) -> nn.Module:
    """The model, cut into rows; the policy's output dtype is that of the model as a whole."""
    policy = policy or {}
    inside = MixedPrecisionPolicy(**{key: dtype for key, dtype in policy.items() if key != "output_dtype"})
    for name in wrapped:
        fully_shard(model.get_submodule(name), mesh=mesh, mp_policy=inside)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
    return model


class Training:
    """A model in training with K-FAC: under `fully_shard`, or under DDP or bare without a mesh.

    Args:
        case: What.
        mesh: Its ranks; the world's, which may be one process, if there is none.
        weights: Parameters to start from, whole.
    """

    def __init__(self, case: Case, mesh: DeviceMesh | None, weights: Mapping[str, Tensor] | None = None) -> None:
        self.case = case
        torch.manual_seed(1)
        self.model = MAKE[case.model]()
        if weights is not None:
            self.model.load_state_dict(weights)
        for name in case.frozen:
            self.model.get_submodule(name).requires_grad_(False)
        self.rank, self.size = place() if mesh is None else (_place_in(mesh), mesh.size())
        self.wrapped = self.model
        if mesh is not None:
            sharded(self.model, mesh, WRAPPED.get(case.model, ()), case.policy)
        elif self.size > 1:
            self.wrapped = DistributedDataParallel(self.model, find_unused_parameters=case.model == "scaled")
        self.engine = as_engine(self.wrapped)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.02) if case.adam else torch.optim.SGD(trained, lr=0.1)
        self.kfac = KFAC(self.engine, case.config, optimizer=self.optimizer)

    def step(self, step: int) -> None:
        inputs, labels = global_batch(self.case.model, step)
        own = part(self.rank, self.size)
        divisor = labels.numel() / self.size
        cuts = [own.start + (own.stop - own.start) * i // self.case.micro_batches for i in range(10)]
        self.optimizer.zero_grad()
        for index in range(self.case.micro_batches):
            first, stop = cuts[index], cuts[index + 1]
            last = index == self.case.micro_batches - 1
            terms = float(labels[first:stop].numel())
            self.kfac.micro_batch(first_sample=first, divisor=divisor, terms=terms, last=last)
            with self.engine.synchronize(last):
                outputs = self.wrapped(inputs[first:stop]).float()
                wrong = F.cross_entropy(outputs.flatten(0, -2), labels[first:stop].flatten(), reduction="sum")
                self.kfac.fisher_backward(outputs)
                (wrong / divisor).backward()
        self.kfac.step()
        if self.case.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.case.clip)
        self.optimizer.step()

    def train(self, steps: int | None = None, first: int = 0) -> dict[str, Tensor]:
        for step in range(first, self.case.steps if steps is None else steps):
            self.step(step)
        return self.parameters()

    def parameters(self) -> dict[str, Tensor]:
        """All of every parameter."""
        return {name: whole(p).clone() for name, p in self.model.state_dict().items()}

    def close(self) -> None:
        self.kfac.remove()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be cut, put together; collective."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def global_batch(model: str, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels of all ranks."""
    generator = torch.Generator().manual_seed(100 + step)
    if model in TOKENS:
        inputs = torch.randint(0, 7, (GLOBAL_BATCH, TOKENS[model]), generator=generator)
    elif model == "conv":
        inputs = torch.randn(GLOBAL_BATCH, 2, 6, 6, generator=generator)
    else:
        inputs = torch.randn(GLOBAL_BATCH, 18 if model == "attention" else WIDTH, generator=generator)
    labelled = inputs.shape if model in TOKENS else inputs.shape[:1]
    return inputs, torch.randint(0, CLASSES, labelled, generator=generator)


def train_all(cases: list[Case], shape: tuple[int, ...] | None) -> list[dict[str, Tensor]]:
    """Parameters after each case; on a mesh of a shape, or bare."""
    results = []
    mesh = None if shape is None else mesh_of(shape)
    for case in cases:
        training = Training(case, mesh)
        results.append(training.train())
        training.close()
    return results


def _place_in(mesh: DeviceMesh) -> int:
    ranks = mesh.mesh.flatten().tolist()
    return int(ranks.index(place()[0]))
