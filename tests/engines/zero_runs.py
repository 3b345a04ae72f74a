"""Training runs under DeepSpeed, and the same runs in one process that knows nothing of it."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC
from kfac_dist.compat.deepspeed import manages_accumulation
from kfac_dist.engines import Engine, as_engine
from kfac_dist.optimizers.dissected import MSVAG
from tests.preconditioner import workloads

STEPS = 20


class TiedNet(nn.Module):
    """An embedding whose weight is the head's, too, and attention in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(workloads.CLASSES, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, workloads.CLASSES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        return self.head(hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0])


def narrow() -> nn.Module:
    """Parameters of fewer elements than there are ranks."""
    return nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 1), nn.Tanh(), nn.Linear(1, workloads.CLASSES))


def frozen() -> nn.Module:
    """A layer, and a bias, that aren't trained."""
    model = workloads.mlp()
    for p in (model[0].weight, model[0].bias, model[4].bias):
        p.requires_grad_(False)
    return model


class SkippingNet(nn.Module):
    """A layer that only some steps use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, workloads.CLASSES)
        self.skips = False

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        return self.head(hidden if self.skips else hidden + self.second(hidden))


def gpt2() -> nn.Module:
    """Hugging Face's, from its configuration."""
    from tests.preconditioner.transformer_models import gpt2

    return gpt2()


workloads.MODELS |= {"tied": TiedNet, "narrow": narrow, "frozen": frozen, "skipping": SkippingNet, "gpt2": gpt2}
workloads.INPUTS |= {
    "tied": lambda g: torch.randint(0, workloads.CLASSES, (workloads.GLOBAL_BATCH, 5), generator=g),
    "narrow": workloads.INPUTS["mlp"],
    "frozen": workloads.INPUTS["mlp"],
    "skipping": workloads.INPUTS["mlp"],
    "gpt2": workloads.INPUTS["token"],
}
TOKENS = ("token", "tied", "gpt2")


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        stage: Of ZeRO.
        model: Name of a workload.
        kfac: K-FAC's options beyond the test's own.
        zero: The `zero_optimization` section beyond its stage.
        deepspeed: Further sections.
        accumulated: Micro-batches a step.
        clip: Norm to which the preconditioned gradient is clipped.
        optimizer: `sgd`, `adamw`, `msvag`, or `plain`: SGD without momentum.
        groups: Whether each parameter has its own group, with a learning rate of its own.
        init: Whether the model is built by `zero.Init`.
        by_hand: Whether the loop calls `kfac.step()` itself.
    """

    stage: int
    model: str = "mlp"
    kfac: Mapping[str, Any] = field(default_factory=dict)
    zero: Mapping[str, Any] = field(default_factory=dict)
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    accumulated: int = 1
    clip: float = 0.0
    optimizer: str = "sgd"
    groups: bool = False
    init: bool = False
    by_hand: bool = False

    @property
    def mathematics(self) -> Case:
        """What of it one process does, too."""
        kfac = {key: value for key, value in self.kfac.items() if key != "distribution"}
        return Case(0, self.model, kfac, clip=self.clip, optimizer=self.optimizer, groups=self.groups)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return next((kinds[key] for key in kinds if key in self.deepspeed), torch.float32)

    def kfac_config(self) -> dict[str, Any]:
        """K-FAC without a clip, which would hide a wrong scale."""
        config: dict[str, Any] = {
            "curvature": {"factor_every": 2, "decay": 0.8, "likelihood": "categorical"},
            "inversion": {"inverse_every": 4, "damping": 0.1},
            "update": {"kl_clip": None},
        }
        if self.model in TOKENS:
            config["curvature"]["loss_terms"] = "token"
        for section, values in self.kfac.items():
            config[section] = {**config.get(section, {}), **values}
        return config

    def deepspeed_config(self, size: int) -> dict[str, Any]:
        """What `deepspeed.initialize` gets."""
        return {
            "train_micro_batch_size_per_gpu": workloads.GLOBAL_BATCH // size // self.accumulated,
            "gradient_accumulation_steps": self.accumulated,
            "gradient_clipping": self.clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 30,
            **self.deepspeed,
            "zero_optimization": {"stage": self.stage, **self.zero},
        }

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed wraps, over trained parameters."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": [p], "lr": 0.02 / (1 + i)} for i, p in enumerate(trained)] if self.groups else trained
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=0.002, weight_decay=0.01)
        if self.optimizer == "msvag":
            return MSVAG(groups, lr=0.02, weight_decay=0.01)
        return torch.optim.SGD(groups, lr=0.02, momentum=0.9 if self.optimizer == "sgd" else 0.0)


def global_batch(model: str, step: int) -> tuple[Tensor, Tensor]:
    """Inputs, and a label for each sample or token."""
    inputs, labels = workloads.global_batch(model, step)
    if model in TOKENS:
        labels = torch.randint(0, workloads.CLASSES, inputs.shape, generator=torch.Generator().manual_seed(step))
    return inputs, labels


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.float().flatten(0, -2), labels.flatten())


def alone(case: Case, steps: int = STEPS) -> dict[str, Tensor]:
    """Train in one process."""
    model = workloads.build(case.model)
    optimizer = case.build_optimizer(model)
    kfac = KFAC(model, case.kfac_config(), optimizer=optimizer)
    go_on_alone(case, model, model, optimizer, kfac, range(steps))
    kfac.remove()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def go_on_alone(
    case: Case,
    module: nn.Module,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    kfac: KFAC,
    steps: Iterable[int],
) -> None:
    """Take some steps without DeepSpeed, on this rank's part of the global batches."""
    rank, size = workloads.place()
    for step in steps:
        inputs, labels = global_batch(case.model, step)
        part = slice(rank * len(inputs) // size, (rank + 1) * len(inputs) // size)
        module.skips = skips(step)
        outputs = model(inputs[part])
        kfac.fisher_backward(outputs)
        optimizer.zero_grad()
        loss_of(outputs, labels[part]).backward()
        kfac.step()
        if case.clip:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()


def skips(step: int) -> bool:
    """Whether `SkippingNet` leaves its layer out."""
    return step % 3 == 1


@contextmanager
def deepspeed_world() -> Iterator[Any]:
    """DeepSpeed on the process group that exists, and nothing left of it afterwards."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # collectives that torch has renamed
    # Without LOCAL_SIZE, DeepSpeed asks numactl at every step how many ranks a node has.
    os.environ.update(LOCAL_RANK=os.environ["RANK"], LOCAL_SIZE=os.environ["WORLD_SIZE"], DS_ACCELERATOR="cpu")
    import deepspeed

    gc.freeze()  # ZeRO-3 searches all objects for garbage whenever it starts

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # A kernel for shared memory, compiled in half a minute; only inference uses it.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    # Some processors have no fast one, which is all that DeepSpeed means by it.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    linear = F.linear
    try:
        yield deepspeed
    finally:
        deepspeed.comm.destroy_process_group()
        sys.modules["deepspeed.comm.comm"].cdb = None  # type: ignore[attr-defined]
        # Processes serve ranks of several tests: what ZeRO-3 replaces and counts would differ by what they did before.
        F.linear = linear
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
        deepspeed.zero.Init.param_id = 0


class Run:
    """A DeepSpeed engine in training with K-FAC."""

    def __init__(self, case: Case, state: Mapping[str, Any] | None = None) -> None:
        import deepspeed

        self.case = case
        self.rank, self.size = workloads.place()
        config = case.deepspeed_config(self.size)
        with deepspeed.zero.Init(config_dict_or_path=config) if case.init else nullcontext():
            model = workloads.build(case.model)
        if state is not None:
            model.load_state_dict(state["model"], strict=False)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=case.build_optimizer(model), config=config)
        self.wrapped: Engine = as_engine(self.engine)
        self.kfac = KFAC(self.wrapped, case.kfac_config())
        if state is not None:
            self.kfac.load_state_dict(state["kfac"])

    def step(self, step: int, plant: Callable[[Tensor], Tensor] = lambda outputs: outputs) -> None:
        """One optimizer step on this rank's part of the global batch."""
        inputs, labels = global_batch(self.case.model, step)
        self.engine.module.skips = skips(step)
        part = workloads.GLOBAL_BATCH // self.size // self.case.accumulated
        for micro in range(self.case.accumulated):
            first = (micro * self.size + self.rank) * part
            own = inputs[first : first + part]
            outputs = plant(self.engine(own.to(self.case.dtype) if own.is_floating_point() else own))
            self.kfac.fisher_backward(outputs)
            self.engine.backward(loss_of(outputs, labels[first : first + part]))
            if self.case.by_hand:
                self.kfac.step()
            if micro == self.case.accumulated - 1 or manages_accumulation(self.engine):
                self.engine.step()

    def parameters(self) -> dict[str, Tensor]:
        """The parameters that the optimizer steps, whole; collective."""
        held = self.wrapped.parameters()
        shards: list[Any] = [None] * self.size
        dist.all_gather_object(shards, held)
        layout = self.wrapped.layout(sorted({name for shard in shards for name in shard}))
        return {
            p.name: held[p.name].float()
            if p.slices is None
            else torch.cat([shards[piece.rank][p.name] for piece in p.slices]).view(p.shape)
            for p in layout.parameters
        }

    def close(self) -> None:
        """Let go of it."""
        self.kfac.remove()
        self.engine.destroy()


def train(case: Case, steps: int = STEPS) -> dict[str, Tensor]:
    """Train under DeepSpeed; collective."""
    run = Run(case)
    for step in range(steps):
        run.step(step)
    assert run.kfac.steps == steps
    found = run.parameters()
    run.close()
    return found


def train_all(cases: list[Case]) -> list[dict[str, Tensor]]:
    """Train each case, in one world."""
    with deepspeed_world():
        return [train(case) for case in cases]


def train_some(case: Case, steps: range, state: Mapping[str, Any] | None) -> dict[str, Any]:
    """Take some steps under DeepSpeed, from a state or the beginning; returns the state after them."""
    with deepspeed_world():
        run = Run(case, state)
        for step in steps:
            run.step(step)
        found = {"model": run.parameters(), "kfac": run.kfac.state_dict()}
        run.close()
        return found


def train_some_ddp(case: Case, steps: range, state: Mapping[str, Any]) -> dict[str, Any]:
    """Go on from a state under DDP."""
    model = workloads.build(case.model)
    model.load_state_dict(state["model"], strict=False)
    wrapped = workloads.wrap(model)
    optimizer = case.build_optimizer(model)
    kfac = KFAC(wrapped, case.kfac_config(), optimizer=optimizer)
    kfac.load_state_dict(state["kfac"])
    go_on_alone(case, model, wrapped, optimizer, kfac, steps)
    kfac.remove()
    return {"model": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}}


def alone_all(cases: list[Case]) -> list[dict[str, Tensor]]:
    """Train each case in this process, once where cases share their mathematics."""
    known: dict[str, dict[str, Tensor]] = {}
    for case in cases:
        key = repr(case.mathematics)
        if key not in known:
            known[key] = alone(case)
    return [known[repr(case.mathematics)] for case in cases]
