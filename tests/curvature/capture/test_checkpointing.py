"""Capture under activation checkpointing: the second forward pass of a region brings what the first didn't keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from tests.curvature.capture.test_capture import chain, inputs
from tests.curvature.measured import assert_close, build_kfac, factors, measure


class Checkpointed(nn.Module):
    def __init__(self, enabled: bool, reentrant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, 2)
        self.enabled, self.reentrant = enabled, reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.body, x, use_reentrant=self.reentrant) if self.enabled else self.body(x)
        return self.head(hidden)


@pytest.mark.parametrize("fisher", ["empirical", "type2", "mc", "input_only"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(fisher: str, reentrant: bool) -> None:
    if reentrant and fisher in ("mc", "type2"):
        pytest.skip("re-entrant checkpointing doesn't support torch.autograd.grad")
    x, labels = inputs().requires_grad_(reentrant), torch.tensor([0, 1, 1, 0, 1])
    options = {"fisher": fisher, "likelihood": "categorical"}
    plain = measure(Checkpointed(False), x, lambda out: F.cross_entropy(out, labels), **options)
    kfac = build_kfac(model := Checkpointed(True, reentrant), **options)
    for _ in range(2):  # the recomputed forward passes of one step must not leak into the next
        found = measure(model, x, lambda out: F.cross_entropy(out, labels), kfac=kfac)
    kfac.remove()
    for name, value in plain.items():
        if fisher == "mc":  # labels of another step
            assert found[name].shape == value.shape
        else:
            assert_close(found[name], value)
    for name, block in kfac.monitor.plan.blocks.items():
        for unit in block.units:
            assert float(kfac._parts.averages.scalars[0, kfac._parts.averages.layout.index(unit)]) == 5.0, name


class EndsInLayer(Checkpointed):
    """A region whose last layer's gradient arrives before the region is computed again."""

    def __init__(self, enabled: bool) -> None:
        super().__init__(enabled)
        self.body = self.body[:4]


@pytest.mark.parametrize("model_type", [Checkpointed, EndsInLayer])
@pytest.mark.parametrize("fisher", ["empirical", "type2", "input_only"])
def test_activation_checkpointing_and_accumulation_together(model_type: type[Checkpointed], fisher: str) -> None:
    """What is computed again in backward belongs to no further forward pass."""
    x, labels = inputs(), torch.tensor([0, 1, 1, 0, 1])

    def accumulate(enabled: bool) -> dict[str, Tensor]:
        kfac = build_kfac(model := model_type(enabled), fisher=fisher, likelihood="categorical")
        for part in (slice(0, 3), slice(3, 5)):
            kfac.micro_batch(first_sample=part.start, divisor=5, last=part.stop == 5)
            outputs = model(x[part])
            kfac.fisher_backward(outputs)
            (F.cross_entropy(outputs, labels[part], reduction="sum") / 5).backward()
        kfac.step()
        kfac.remove()
        return factors(kfac)

    plain = accumulate(False)
    for name, value in accumulate(True).items():
        assert_close(value, plain[name])


def test_checkpointing_the_whole_model_is_no_accumulation(recwarn: pytest.WarningsRecorder) -> None:
    x = inputs()
    kfac = build_kfac(model := chain())
    checkpoint(model, x, use_reentrant=False).sum().backward()
    kfac.step()
    kfac.remove()
    assert not [warning for warning in recwarn if "micro_batch" in str(warning.message)]


# ---- what is held between forward and backward


class Regions(nn.Module):
    """A layer used in two checkpointed regions, one of them nested, and once outside."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.other, self.enabled = nn.Linear(3, 3), nn.Linear(3, 3), enabled

    def call(self, region: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return checkpoint(region, x, use_reentrant=False) if self.enabled else region(x)

    def inner(self, x: Tensor) -> Tensor:
        return torch.sin(self.layer(torch.tanh(x)))

    def outer(self, x: Tensor) -> Tensor:
        return self.other(self.call(self.inner, self.layer(2 * x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.call(self.outer, self.call(self.inner, x)))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_each_region_gives_its_own_uses_their_inputs(sharing: str) -> None:
    def loss(out: Tensor) -> Tensor:
        return out.square().sum() / 5

    plain = measure(Regions(False), inputs(), loss, sharing=sharing)
    for name, value in measure(Regions(True), inputs(), loss, sharing=sharing).items():
        assert_close(value, plain[name])


def test_checkpointed_layers_hold_no_activations() -> None:
    """Between forward and backward only what checkpointing itself holds is alive: the region's input."""
    model, alive = Checkpointed(True), []
    kfac = build_kfac(model)
    model.body[3].register_forward_pre_hook(
        lambda module, args: alive.append(StorageWeakRef(args[0].untyped_storage()))
    )
    loss = model(inputs()).square().sum()
    assert [held.expired() for held in alive] == [True]
    loss.backward()
    kfac.step()
    assert [held.expired() for held in alive] == [True, True]
    assert factors(kfac)
    kfac.remove()
