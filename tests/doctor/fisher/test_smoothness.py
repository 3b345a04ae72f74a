"""Operations that kink are found whatever they are called by, and concern the parameters that they depend on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kfac_dist.doctor.fisher.smoothness import observe


class Applied(nn.Module):
    """Two linear layers with a function between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.function(self.first(x)))
        return outputs


class Custom(torch.autograd.Function):
    """Hides a clamp from autograd."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


KINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "hardtanh": functional.relu6,
    "threshold": lambda x: functional.threshold(x, 0.1, 0.0),
    "clamp": torch.Tensor.relu,
    "clamp_min": lambda x: x.clamp_min(0),
    "abs": torch.abs,
    "maximum": lambda x: torch.maximum(x, -x),
    "amax": lambda x: x.amax(1, keepdim=True).expand(-1, 4),
    "elu": functional.elu,
    "hardswish": functional.hardswish,
    "max_pool1d": lambda x: functional.max_pool1d(x[:, None], 1)[:, 0],
    "custom": Custom.apply,  # type: ignore[dict-item]
    "sort": lambda x: x.sort(1).values,
}
NAMED = {"clamp": "relu", "custom": "clamp", "max_pool1d": "max_pool"}


@pytest.mark.parametrize("name", KINKS)
def test_functions_methods_and_custom_ones_are_seen(name: str) -> None:
    course = observe(Applied(KINKS[name]), torch.randn(3, 4))
    found = course.kinks_of(["first.weight", "first.bias"])
    assert NAMED.get(name, name) in str(found[-1])
    assert "in the model (Applied)" in str(found[-1])
    assert not course.kinks_of(["last.weight", "last.bias"])


@pytest.mark.parametrize(
    "function",
    [torch.tanh, torch.sigmoid, functional.gelu, functional.silu, functional.softplus, lambda x: x.softmax(1)],
)
def test_smooth_functions_are_not(function: Callable[[Tensor], Tensor]) -> None:
    course = observe(Applied(function), torch.randn(3, 4))
    assert not course.kinks
    assert not course.doubts


def test_modules_are_named_and_the_order_of_layers_is_the_order_of_use() -> None:
    model = nn.Sequential()
    model.add_module("out", nn.Linear(4, 2))
    model.add_module("inner", nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Dropout(0.5)))
    model.forward = lambda x: model.out(torch.tanh(model.inner(x)))  # type: ignore[method-assign, assignment, operator]
    course = observe(model.eval(), torch.randn(3, 4))
    assert [str(kink) for kink in course.kinks] == ["relu in inner.1 (ReLU)"]
    assert sorted(course.last_use, key=course.last_use.__getitem__)[-1].startswith("out.")
    assert not model.inner._forward_hooks  # type: ignore[union-attr]


def test_comparisons_are_doubts_and_masks_of_whole_numbers_are_none() -> None:
    course = observe(Applied(lambda x: x * (x > 0)), torch.randn(3, 4))
    assert not course.kinks
    assert [doubt.name for doubt in course.doubts_of(["first.weight"])] == ["gt"]
    course = observe(Applied(lambda x: x * (torch.arange(4) > 1)), torch.randn(3, 4))
    assert not course.doubts


class Parallel(nn.Module):
    """A smooth branch that begins before the kink of another."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.skip, self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        smooth = self.skip(x)
        return self.join(smooth, self.last(torch.relu(self.first(x))))


def _joined_in_place(smooth: Tensor, kinked: Tensor) -> Tensor:
    base = torch.zeros(len(smooth), 8)
    view = base[:, :4]
    view.add_(smooth)
    return base.abs() + kinked.repeat(1, 2)


JOINS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], set[str]]] = {
    "beside": (torch.add, {"first"}),
    "above": (lambda smooth, kinked: torch.tanh(smooth + kinked), {"first"}),
    "before another kink": (lambda smooth, kinked: (smooth + kinked).abs(), {"skip", "first", "last"}),
    "by its shape alone": (lambda smooth, kinked: torch.zeros_like(smooth).abs() + kinked, {"first"}),
    "through a view": (_joined_in_place, {"skip", "first"}),
    "through an output argument": (
        lambda smooth, kinked: torch.add(smooth, 0, out=torch.empty(3, 4)).abs() + kinked,
        {"skip", "first"},
    ),
    "through a sparse matrix": (
        lambda smooth, kinked: torch.sparse.mm(torch.eye(3).to_sparse() * 2, smooth).abs() + kinked,
        {"skip", "first"},
    ),
}


@pytest.mark.parametrize("name", JOINS)
def test_a_kink_concerns_only_what_its_input_depends_on(name: str) -> None:
    join, expected = JOINS[name]
    model = Parallel(join)
    course = observe(model, torch.randn(3, 4))
    assert {layer for layer in ("skip", "first", "last") if course.kinks_of([f"{layer}.weight"])} == expected


def test_a_model_that_is_called_twice_keeps_its_smooth_last_layer() -> None:
    once = Applied(torch.relu)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = once

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.inner(x), self.inner(-x)])

    course = observe(Twice(), torch.randn(3, 4))
    assert len(course.kinks_of(["inner.first.weight"])) == 2
    assert not course.kinks_of(["inner.last.weight"])


def test_attention_and_norms_are_smooth() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, activation="gelu", batch_first=True).eval()
    course = observe(layer, torch.randn(2, 3, 4))
    assert not course.kinks
    assert set(course.last_use) == {name for name, _ in layer.named_parameters()}
