"""Copies and pickles of a model that K-FAC watches are plain models, and know nothing of K-FAC."""

from __future__ import annotations

import ast
import copy
import gc
import io
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from kfac_dist.curvature.capture.capture import Capture
from kfac_dist.hooks import after_forward, before_forward
from tests.curvature.measured import assert_close, build_kfac, factors, measure
from tests.harness import run_ranks

PACKAGE = Path(__file__).parents[1] / "kfac_dist"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs",
         "_forward_hooks_always_called")  # fmt: skip
TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 2], [3, 3, 1, 0]])
TARGETS = torch.tensor([0, 1, 1])


class Model(nn.Module):
    """Every way of watching a layer: by its own calls, inside of attention, and tied."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 7)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        hidden = hidden + self.convolution(hidden.mT).mT
        return self.head(self.norm(hidden)).mean(1)


def loss(outputs: Tensor) -> Tensor:
    return F.cross_entropy(outputs, TARGETS)


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"kfac_dist" not in buffer.getvalue()
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model)


def hooks_on(model: nn.Module) -> int:
    own = sum(len(getattr(module, name)) for module in model.modules() for name in HOOKS)
    return own + sum("__reduce_ex__" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, averaged, pickled])
@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_copy_made_at_any_time_is_plain(duplicate: Callable[[nn.Module], nn.Module], moment: str) -> None:
    expected = measure(Model(), TOKENS, loss)
    model = Model()
    kfac = build_kfac(model)
    copies = [duplicate(model)] if moment == "before" else []
    outputs = model(TOKENS)
    if moment == "between":
        copies.append(duplicate(model))
    loss(outputs).backward()
    kfac.step()
    if moment == "after":
        copies.append(duplicate(model))
    for name, value in factors(kfac).items():
        assert_close(value, expected[name])
    assert hooks_on(copies[0]) == 0
    torch.testing.assert_close(copies[0](TOKENS), model(TOKENS))


def test_a_copy_of_a_compiled_model_is_plain() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(16, 2))
    compiled = torch.compile(model, backend="eager")
    kfac = build_kfac(model)
    for twin in (copy.deepcopy(compiled), pickled(compiled)):
        assert hooks_on(twin) == 0
        torch.testing.assert_close(twin(TOKENS), model(TOKENS))
    loss(compiled(TOKENS)).backward()
    kfac.step()
    expected = measure(copy.deepcopy(model), TOKENS, loss)
    for name, value in factors(kfac).items():
        assert_close(value, expected[name])


def test_a_copys_passes_enter_nothing() -> None:
    expected = measure(Model(), TOKENS, loss)
    model = Model()
    kfac = build_kfac(model)
    teacher = averaged(model)
    outputs = model(TOKENS)
    (loss(outputs) + 0.0 * teacher(TOKENS.flip(0)).sum()).backward()
    kfac.step()
    found = factors(kfac)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_close(value, expected[name])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_takes_a_kfac_of_its_own(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    expected = measure(Model(), TOKENS, loss)
    model = Model()
    first = build_kfac(model)
    twin = duplicate(model)
    second = build_kfac(twin)
    loss(twin(TOKENS)).backward()
    second.step()
    for name, value in factors(second).items():
        assert_close(value, expected[name])
    assert first.monitor.measured == 0
    second.remove()
    assert hooks_on(twin) == 0
    assert hooks_on(model) > 0, "the original is still watched"
    first.remove()
    assert hooks_on(model) == 0


def test_copies_hold_nothing_of_kfac() -> None:
    model = Model()
    kfac = build_kfac(model)
    capture, before = weakref.ref(kfac._parts.measurement._capture), captures()
    copies = [copy.deepcopy(model) for _ in range(3)]
    assert captures() <= before
    kfac.remove()
    del kfac, model
    gc.collect()
    assert capture() is None
    assert len(copies) == 3


def captures() -> int:
    gc.collect()
    return sum(type(thing) is Capture for thing in gc.get_objects())


def test_hooks_of_others_are_copied() -> None:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(double, with_kwargs=True, always_call=True)
    after_forward(layer, lambda *_: 1 / 0)
    before_forward(layer, lambda *_: 1 / 0)
    for twin in (copy.deepcopy(layer), pickled(layer)):
        assert hooks_on(twin) == 3
        torch.testing.assert_close(twin(torch.ones(2)), 2 * (layer.weight.sum(1) + layer.bias))


def double(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    return 2 * output


def test_a_class_that_copies_itself_gets_hooks_that_do_nothing() -> None:
    layer = parametrizations.weight_norm(nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2), layer)
    calls: list[int] = []
    handle = after_forward(layer, lambda *_: calls.append(1))
    twin = copy.deepcopy(model)
    twin(torch.ones(2))
    assert calls == []
    model(torch.ones(2))
    assert calls == [1]
    again = copy.deepcopy(twin)
    assert again[1].__dict__["__reduce_ex__"]._module() is again[1]
    after_forward(again[1], lambda *_: None).remove()
    assert hooks_on(again) == 0
    handle.remove()
    handle.remove()
    assert hooks_on(model) == 0


def test_a_pickle_is_read_without_this_package(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 2))
    kfac = build_kfac(model)
    file = tmp_path / "model.pt"
    torch.save(model, file)
    expected = model(torch.ones(1, 3)).tolist()
    kfac.remove()
    program = (
        "import sys, torch\n"
        "sys.modules['kfac_dist'] = None\n"
        f"model = torch.load({str(file)!r}, weights_only=False)\n"
        "handles = [module.register_forward_hook(lambda m, a, o: None) for module in model.modules()]\n"
        "print(model(torch.ones(1, 3)).tolist())\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    torch.testing.assert_close(torch.tensor(ast.literal_eval(ended.stdout)), torch.tensor(expected))


def copied_in_ddp() -> dict[str, Any]:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = DistributedDataParallel(Model())
    kfac = build_kfac(model)
    parts = slice(rank, 3, size)
    kfac.micro_batch(first_sample=rank, divisor=3 / size, terms=len(TOKENS[parts]))
    outputs = model(TOKENS[parts])
    twins = [copy.deepcopy(model), pickled(model)]
    for twin in twins:
        F.cross_entropy(twin(TOKENS[parts]), TARGETS[parts]).backward()
    (F.cross_entropy(outputs, TARGETS[parts], reduction="sum") * size / 3).backward()
    kfac.step()
    kfac.state_dict()
    found = factors(kfac)
    hooks = [hooks_on(twin.module) for twin in twins]
    kfac.remove()
    return {"factors": found, "hooks": [*hooks, hooks_on(model.module)]}


@pytest.mark.parametrize("ranks", [1, 2])
def test_copies_of_a_ddp_model(ranks: int) -> None:
    expected = measure(Model(), TOKENS, loss)
    for found in run_ranks(ranks, copied_in_ddp):
        assert found["hooks"] == [0, 0, 0]
        for name, value in found["factors"].items():
            assert_close(value, expected[name], 1e-4)


def test_no_other_kind_of_hook_is_put_on_modules() -> None:
    kinds = {"register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
             "register_full_backward_pre_hook", "register_backward_hook", "register_module_forward_hook"}  # fmt: skip
    places = {
        file.name
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in kinds
    }
    assert places == {"hooks.py", "reference.py"}  # the latter uses nothing of the package
