"""What only looks at the model is no pass of the loop: torch.func, traces, exports, fake tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from kfac_dist.errors import ModelError
from tests.curvature.measured import assert_close, build_kfac, factors, measure

# Of vmap's performance, and of tracing and sparse tensors.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "DeprecationWarning")]

INPUTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """A layer in every way of watching: by its own calls, and inside of attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = torch.tanh(self.first(inputs)).unsqueeze(-2).expand(*inputs.shape[:-1], 3, 8)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(self.norm(tokens)).mean(-2)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 3)))


def loss(outputs: Tensor) -> Tensor:
    return F.cross_entropy(outputs, LABELS)


def per_sample(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of each sample's loss."""

    def one(parameters: dict[str, Tensor], inputs: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (inputs[None],)), label[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return vmap(grad(one), in_dims=(None, 0, 0))(parameters, INPUTS, LABELS)  # type: ignore[no-any-return]


def of_the_batch(model: nn.Module) -> dict[str, Tensor]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return grad(lambda values: loss(functional_call(model, values, (INPUTS,))))(parameters)  # type: ignore[no-any-return]


def traced(model: nn.Module) -> Tensor:
    return torch.jit.trace(model, INPUTS)(INPUTS)  # type: ignore[no-any-return]


def exported(model: nn.Module) -> Tensor:
    return torch.export.export(model, (INPUTS,), strict=False).module()(INPUTS)  # type: ignore[no-any-return]


def exported_strictly(model: nn.Module) -> Tensor:
    return torch.export.export(model, (INPUTS,), strict=True).module()(INPUTS)  # type: ignore[no-any-return]


def made_by_fx(model: nn.Module) -> Tensor:
    return make_fx(model)(INPUTS)(INPUTS)  # type: ignore[no-any-return]


def symbolic(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.fx.symbolic_trace(model)(INPUTS)  # type: ignore[no-any-return]


def faked(model: nn.Module) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.empty(5, 4)).shape == (5, 3)


@pytest.mark.parametrize("look", [per_sample, of_the_batch, traced, exported, made_by_fx, faked])
@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_look_at_the_model_is_not_measured(look: Callable[[nn.Module], Any], moment: str) -> None:
    expected = measure(Model(), INPUTS, loss)
    alone = look(Model())
    model = Model()
    kfac = build_kfac(model)
    found = look(model) if moment == "before" else None
    outputs = model(INPUTS)
    found = look(model) if moment == "between" else found
    loss(outputs).backward()
    found = look(model) if moment == "after" else found
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kfac.step()
    for name, value in factors(kfac).items():
        assert_close(value, expected[name])
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("look", [exported_strictly, symbolic])
def test_graphs_of_a_model_know_nothing_of_kfac(look: Callable[[nn.Module], Tensor]) -> None:
    expected = measure(plain(), INPUTS, loss)
    model = plain()
    kfac = build_kfac(model)
    torch.testing.assert_close(look(model).detach(), model(INPUTS).detach())
    kfac.discard()
    loss(model(INPUTS)).backward()
    kfac.step()
    for name, value in factors(kfac).items():
        assert_close(value, expected[name])


def test_scripts_are_made_of_copies() -> None:
    model = plain()
    kfac = build_kfac(model)
    with pytest.raises(ModelError, match=r"copy\.deepcopy\(model\)"):
        torch.jit.script(model)
    kfac.remove()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_inputs_are_measured_as_dense_ones(sharing: str, layout: str) -> None:
    inputs = INPUTS * (INPUTS > 0)
    expected = measure(plain(), inputs, loss, sharing=sharing)
    sparse = inputs.to_sparse() if layout == "coo" else inputs.to_sparse_csr()
    for name, value in measure(plain(), sparse, loss, sharing=sharing).items():
        assert_close(value, expected[name])
