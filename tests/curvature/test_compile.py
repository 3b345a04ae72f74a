"""torch.compile: hooks are part of what is compiled, whatever is compiled and whenever; only a full graph can't be."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC

CONFIG: dict[str, Any] = {
    "curvature": {"factor_every": 2, "decay": 0.5},
    "inversion": {"inverse_every": 2, "damping": 0.05},
    "update": {"kl_clip": None},
}
STEPS = 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.LayerNorm(8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)
        return self.head(hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]).mean(1)


Call = Callable[[Tensor], Tensor]


def train(make: Callable[[nn.Module], tuple[Call, nn.Module]], *, late: bool = False) -> dict[str, Tensor]:
    model = Model()
    call, target = make(model)
    if late:
        call(torch.randn(5, 2, 6)).sum().backward()
    kfac = KFAC(target, CONFIG)
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=0.1), torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x, labels = torch.randn(5, 2, 6, generator=generator), torch.randint(3, (5,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(call(x), labels).backward()
        kfac.step()
        optimizer.step()
    assert all(name == name.replace("_orig_mod.", "") for name in kfac.monitor.plan.blocks)
    kfac.remove()
    return {name: value.detach() for name, value in model.named_parameters()}


def in_place(model: nn.Module, backend: str) -> tuple[Call, nn.Module]:
    model.compile(backend=backend)
    return model, model


def wrapped(model: nn.Module, backend: str) -> tuple[Call, nn.Module]:
    return torch.compile(model, backend=backend), model


def given_compiled(model: nn.Module, backend: str) -> tuple[Call, nn.Module]:
    compiled = torch.compile(model, backend=backend)
    return compiled, compiled


@pytest.mark.parametrize(
    ("backend", "how", "late"),
    [
        ("eager", in_place, True),
        ("eager", given_compiled, False),
        ("aot_eager", wrapped, True),
    ],
)
def test_compiled_models_train_as_plain_ones(
    backend: str, how: Callable[[nn.Module, str], tuple[Call, nn.Module]], late: bool
) -> None:
    plain = train(lambda model: (model, model))
    compiled = train(lambda model: how(model, backend), late=late)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-6)


def test_a_full_graph_is_refused_in_words() -> None:
    model = Model()
    kfac = KFAC(model, CONFIG)
    with pytest.raises(Exception, match="leave out fullgraph=True"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(5, 2, 6))
    kfac.remove()


@pytest.mark.skipif(torch.__version__ < "2.13", reason="the compiler has to be told what to leave alone")
def test_attaching_kfac_does_not_import_the_compiler() -> None:
    """It takes seconds, and most runs never need it."""
    import subprocess
    import sys

    code = "import sys, torch; from kfac_dist import KFAC; KFAC(torch.nn.Linear(2, 2), {'update': {'kl_clip': None}})"
    script = f"{code}; sys.exit('torch._dynamo' in sys.modules)"
    assert importlib.util.find_spec("torch._dynamo") is not None
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
