"""Small training runs whose global batches don't depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_dist import KFAC
from kfac_dist.engines import as_engine

GLOBAL_BATCH = 12
CLASSES = 4


class ConvNet(nn.Module):
    """Convolutions (one grouped), a group norm and a linear layer, whose factors differ in size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.grouped = nn.Conv2d(6, 4, 3, groups=2, stride=2, bias=False)
        self.head = nn.Linear(4 * 2 * 2, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.stem(inputs)))
        return self.head(torch.tanh(self.grouped(hidden)).flatten(1))


class TokenNet(nn.Module):
    """Embedding, layer norm, two linear layers over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 9)
        self.head = nn.Linear(9, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.norm(self.embedding(tokens)))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 11), nn.Tanh(), nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, CLASSES))


def deep(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers - 1)), nn.Linear(6, CLASSES))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "conv": ConvNet, "token": TokenNet}
INPUTS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "mlp": lambda g: torch.randn(GLOBAL_BATCH, 8, generator=g),
    "conv": lambda g: torch.randn(GLOBAL_BATCH, 2, 6, 6, generator=g),
    "token": lambda g: torch.randint(0, 7, (GLOBAL_BATCH, 5), generator=g),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name]()


def global_batch(name: str, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    inputs = INPUTS[name](generator)
    shape = inputs.shape if name == "token" else inputs.shape[:1]
    return inputs, torch.randint(0, CLASSES, shape, generator=generator)


def part(rank: int, size: int) -> slice:
    """This rank's samples: uneven wherever the batch doesn't divide, in the first ranks' favour."""
    base, extra = divmod(GLOBAL_BATCH, size)
    start = rank * base + min(rank, extra)
    return slice(start, start + base + (rank < extra))


def place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wrap(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, **options) if place()[1] > 1 else model


class Run:
    """A model in training with K-FAC, one optimizer step of the global batch at a time."""

    def __init__(self, name: str, config: Mapping[str, Any], lr: float = 0.1) -> None:
        self.name = name
        self.rank, self.size = place()
        self.model = build(name)
        self.wrapped = wrap(self.model)
        inputs, _ = global_batch(name, 0)
        as_engine(self.wrapped).settle(lambda: self.wrapped(inputs[part(self.rank, self.size)]).sum().backward())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)
        self.kfac = KFAC(self.wrapped, config, optimizer=self.optimizer)

    def gradients(self, step: int, plant: Callable[[Tensor], Tensor] | None = None) -> float:
        """Run forward and backward of this rank's part; the ranks' mean gradient is that of the global mean loss."""
        inputs, labels = global_batch(self.name, step)
        own = part(self.rank, self.size)
        share = inputs[own] if plant is None else plant(inputs[own])
        divisor = labels.numel() / self.size
        terms = float(labels[own].numel())
        self.kfac.micro_batch(first_sample=own.start, divisor=divisor, terms=terms, classes=labels[own])
        self.optimizer.zero_grad()
        outputs = self.wrapped(share)
        loss = F.cross_entropy(outputs.flatten(0, -2), labels[own].flatten(), reduction="sum") / divisor
        self.kfac.fisher_backward(outputs)
        loss.backward()
        return loss.item()

    def step(self, step: int) -> float:
        loss = self.gradients(step)
        self.kfac.step()
        self.optimizer.step()
        return loss

    def train(self, steps: int, first: int = 0) -> dict[str, Tensor]:
        for step in range(first, first + steps):
            self.step(step)
        return self.parameters()

    def parameters(self) -> dict[str, Tensor]:
        return {key: value.detach().clone() for key, value in self.model.named_parameters()}

    def factors(self) -> dict[str, Tensor]:
        """Global factors by unit, as a checkpoint holds them."""
        state = self.kfac.state_dict()
        return {name: unit["sum"].float().triu() / unit["scalars"][0] for name, unit in state["units"].items()}

    def close(self) -> None:
        self.kfac.remove()


def relative(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Largest difference of any tensor, relative to that tensor's largest value."""
    return max(float((got[key] - wanted[key]).abs().max() / wanted[key].abs().max()) for key in wanted)
