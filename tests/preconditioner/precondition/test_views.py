"""Gradients to the blocks' matrices and back, over views that are made once."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import KFAC

INTERVALS = {
    "curvature": {"factor_every": 100},
    "inversion": {"inverse_every": 100, "early_refresh": 0, "damping": 0.1},
}


class Parallel(nn.Module):
    """Layers of several kinds side by side; attention's q, k and v are rows of one parameter."""

    def __init__(self, layers: int, *, others: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.others = nn.ModuleList()
        if others:
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.spread = nn.ConvTranspose1d(4, 4, 1, groups=2)
            self.others.extend([nn.LayerNorm(4), self.attention, self.spread])

    def forward(self, inputs: Tensor) -> Tensor:
        out = torch.stack([layer(inputs) for layer in self.layers]).mean(0)
        if self.others:
            out = out + self.others[0](inputs) + self.spread(inputs.mT).mT
            out = out + self.attention(inputs, inputs, inputs, need_weights=False)[0]
        return out


def started(model: Parallel) -> tuple[KFAC, torch.optim.Optimizer]:
    """Return K-FAC after its first step, which measures and refreshes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kfac = KFAC(model, INTERVALS, optimizer=optimizer)
    backward(model)
    kfac.step()
    optimizer.step()
    return kfac, optimizer


def backward(model: Parallel) -> None:
    model.zero_grad()
    model(torch.randn(3, 2, 4)).square().sum((1, 2)).mean().backward()


def calls(layers: int) -> Counter[str]:
    """Return how often an ordinary step calls each Python function."""
    torch.manual_seed(0)
    model = Parallel(layers)
    kfac, optimizer = started(model)
    backward(model)
    kfac.step()  # what is made on first use
    optimizer.step()
    backward(model)
    found: Counter[str] = Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            found[f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}"] += 1

    sys.setprofile(note)
    try:
        kfac.step()
    finally:
        sys.setprofile(None)
    kfac.remove()
    return found


def test_an_ordinary_step_calls_no_more_functions_for_more_blocks() -> None:
    few = calls(3)
    assert calls(12) == few
    assert any("kfac.py:KFAC.step" in name for name in few)


def test_views_are_made_at_construction_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Parallel(2, others=True)
    kfac, _ = started(model)
    for block in kfac.coverage.blocks:
        monkeypatch.setattr(block, "parameter_views", None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model)  # with `.grad` tensors of their own
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    kfac.step()
    changed = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.equal(plain[name])]
    assert changed == list(before)
    kfac.remove()


def test_missing_gradients_count_as_zero_and_stay_missing() -> None:
    torch.manual_seed(0)
    model = Parallel(3, others=True)
    kfac, _ = started(model)
    vectors = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    kfac.solver_access.precondition({name: vector.clone() for name, vector in vectors.items()})
    gone = {"layers.1.weight", "layers.1.bias", "layers.2.bias", "attention.in_proj_bias", "spread.weight"}
    with_zeros = {name: torch.zeros_like(v) if name in gone else v.clone() for name, v in vectors.items()}
    without = {name: v.clone() for name, v in vectors.items() if name not in gone}
    kfac.solver_access.precondition(with_zeros)
    kfac.solver_access.precondition(without)
    assert without.keys() == vectors.keys() - gone
    for name, vector in without.items():
        assert vector.equal(with_zeros[name]), name
        assert not vector.equal(vectors[name]), name
    assert not with_zeros["layers.1.weight"].any()  # no block leaves its own values to another
    assert with_zeros["layers.2.bias"].any()
    kfac.remove()


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_any_precision_and_memory_format_go_through_the_same_views(channels_last: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Flatten())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kfac = KFAC(model, INTERVALS, optimizer=optimizer)
    model(torch.randn(3, 4, 5, 5)).square().sum(1).mean().backward()
    kfac.step()
    rounded = {name: torch.randn_like(p).bfloat16() for name, p in model.named_parameters()}
    wide = {name: v.float() for name, v in rounded.items()}
    if channels_last:
        rounded = {n: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for n, v in rounded.items()}
    kfac.solver_access.precondition(wide)
    kfac.solver_access.precondition(rounded)
    for name, vector in rounded.items():
        assert vector.equal(wide[name].bfloat16()), name
    kfac.remove()
