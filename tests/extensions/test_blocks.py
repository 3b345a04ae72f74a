"""The registered block of `examples/extensions/block.py` beside `nn.Linear`, and blocks that are wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from examples.extensions import solver as solver_example
from examples.extensions.block import GainLinear, GainLinearBlock
from kfac_dist import KFAC
from kfac_dist.extensions import (
    API_VERSION,
    ExtensionError,
    InputFirstLinearBlock,
    KroneckerBlock,
    LinearBlock,
    register_block,
)
from tests.extensions.parts import ONE_AND_TWO, OPTIONS, RATE, OwnLayer, batches, linear_model, options_with, trained
from tests.harness import run_ranks

assert solver_example.conjugate_gradients  # registered by its import


def gain_model(like: nn.Sequential, gain: float) -> nn.Sequential:
    """The same function by layers of another type, the gain of the first made up for by its weight."""
    first, last = like[0], like[2]
    model = nn.Sequential(GainLinear(5, 6, gain), nn.Tanh(), GainLinear(6, 3)).double()
    with torch.no_grad():
        model[0].kernel.copy_(first.weight.T / gain)
        model[2].kernel.copy_(last.weight.T)
        for ours, theirs in ((model[0], first), (model[2], last)):
            ours.offset.copy_(theirs.bias)
    return model


def blocks(gain: float) -> tuple[Any, Any]:
    like = linear_model()
    own = gain_model(like, gain)
    return trained(like, OPTIONS), trained(own, OPTIONS)


@ONE_AND_TWO
def test_the_block_has_the_factors_of_an_equal_linear_layer(ranks: int) -> None:
    for (wanted, factors), (found, own) in run_ranks(ranks, blocks, 1.0):
        assert set(own) == set(factors) == {"0/A", "0/G", "2/A", "2/G"}
        for name, factor in factors.items():
            torch.testing.assert_close(own[name], factor, rtol=1e-10, atol=1e-12)
        for theirs, ours in zip(wanted, found, strict=True):
            torch.testing.assert_close(ours.T if ours.ndim == 2 else ours, theirs, rtol=1e-10, atol=1e-12)


def first_step(gain: float) -> tuple[Any, Any]:
    like = linear_model()
    own = gain_model(like, gain)
    return trained(like, OPTIONS, steps=1), trained(own, OPTIONS, steps=1)


@ONE_AND_TWO
def test_the_block_measures_its_own_inputs(ranks: int) -> None:
    gain = 0.5
    for (_, factors), (_, own) in run_ranks(ranks, first_step, gain):
        scale = torch.tensor([gain] * 5 + [1.0], dtype=torch.float64)
        torch.testing.assert_close(own["0/A"], factors["0/A"] * scale[:, None] * scale, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(own["0/G"], factors["0/G"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", ["cholesky", "conjugate_gradients"])
def test_registered_blocks_and_solvers_go_on_from_their_saved_state(solver: str) -> None:
    options = options_with("inversion", solver=solver)
    whole, _ = trained(gain_model(linear_model(), 0.5), options, steps=5)
    model = gain_model(linear_model(), 0.5)
    state = None
    for part in (batches(5)[:3], batches(5)[3:]):
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        kfac = KFAC(model, options)
        if state is not None:
            kfac.load_state_dict(state)
        for inputs, labels in part:
            cross_entropy(model(inputs), labels).backward()
            kfac.step()
            optimizer.step()
            optimizer.zero_grad()
        state = kfac.state_dict()
        kfac.remove()
    for ours, theirs in zip(model.parameters(), whole, strict=True):
        assert torch.equal(ours, theirs)


class WrongLinear(GainLinear):
    """Has a block that doesn't know of its gain."""


class WrongBlock(InputFirstLinearBlock):
    """Forgets the gain."""

    parameter_names = ("kernel", "offset")


register_block(WrongLinear, WrongBlock, api_version=1)


def test_a_wrong_block_leaves_its_layer_the_plain_gradient() -> None:
    model = nn.Sequential(WrongLinear(5, 6, gain=0.5), nn.Tanh(), nn.Linear(6, 3)).double()
    kfac = KFAC(model, OPTIONS)
    (inputs, labels), *_ = batches(1)
    cross_entropy(model(inputs), labels).backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    kfac.step()
    assert set(kfac.coverage.mismatched) == {"0"}
    assert [block.name for block in kfac.coverage.blocks] == ["2"]
    equal = [torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), plain, strict=True) if p.grad is not None]
    assert equal == [True, True, False, False]
    kfac.remove()


class Unfinished(KroneckerBlock):
    """Lacks methods."""


class Unmade(LinearBlock):
    """Is made of something else."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__("", module, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layer", "block", "said"),
    [
        (nn.Linear, LinearBlock, "torch.nn.modules.linear.Linear has LinearBlock already"),
        ("torch.nn.modules.linear.Linear", LinearBlock, "has LinearBlock already"),
        (GainLinear, GainLinearBlock, "has GainLinearBlock already"),
        ("GainLinear", LinearBlock, "expected a class that derives from torch.nn.Module, or its full name"),
        (int, LinearBlock, "found the layer type builtins.int; expected a class that derives from torch.nn.Module"),
        (OwnLayer, int, "expected a class that derives from kfac_dist.extensions.KroneckerBlock or Block"),
        (OwnLayer, Unfinished, "Unfinished lacks methods: write input_rows, output_rows, parameter_views"),
        (OwnLayer, Unmade, "Unmade can't be made of (name, module, sharing)"),
    ],
)
def test_no_block_is_refused(layer: Any, block: Any, said: str) -> None:
    with pytest.raises(ExtensionError) as error:
        register_block(layer, block, api_version=1)
    assert str(error.value).startswith("register_block: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(version: Any) -> None:
    with pytest.raises(ExtensionError) as error:
        register_block(OwnLayer, LinearBlock, api_version=version)
    assert f"found api_version={version!r}, this kfac_dist has {API_VERSION}" in str(error.value)
    assert "write api_version=1" in str(error.value)
