"""Shapes of what goes in and comes out say how many samples there are, or that nothing says it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist.curvature.capture.samples import (
    UNBATCHED,
    PassShapes,
    TensorDim,
    find_number,
    find_positions,
    find_samples,
)
from kfac_dist.curvature.capture.samples import shapes_of as found_in

B, T, D, C, N, E = 4, 6, 3, 5, 12, 20

CASES: list[tuple[str, PassShapes, int | None]] = [
    ("plain", PassShapes(((B, D),), ((B, C),)), B),
    ("a number a sample", PassShapes(((B, D),), ((B,),)), B),
    ("positions first", PassShapes(((1, T), (B, T)), ((B, T, C),)), B),
    ("edges first, a label a node", PassShapes(((2, E), (N, D)), ((N, C),)), N),
    ("edges first, a label a graph", PassShapes(((2, E), (N, D), (N,)), ((B, C),)), B),
    ("sequences, time first", PassShapes(((T, B, D),), ((B, C),)), B),
    ("outputs and states", PassShapes(((B, T, D),), ((B, T, C), (2, B, C))), B),
    ("router's logits", PassShapes(((B, T),), ((B, T, C), (B * T, 3))), B),
    ("turned round", PassShapes(((B, T),), ((T, B, C),)), None),
    ("two inputs, two outputs", PassShapes(((B, D), (T, D)), ((B, T), (T, B))), None),
    ("a loss alone", PassShapes(((B, T), (B, T))), B),
    ("a loss alone, positions first", PassShapes(((1, T), (B, T), (B,))), B),
    ("a loss alone of a graph", PassShapes(((2, E), (N, D))), None),
    ("layers called", PassShapes(layers=[(B, T, D), (B, D)]), B),
    ("layers called, ragged", PassShapes(layers=[(B, D), (N, D)]), None),
    ("one sample", PassShapes(((D,),), ((C,),), [UNBATCHED]), 1),
    ("one sample of several positions", PassShapes(((T, D),), ((C,),), [(T, D), UNBATCHED], [], C), 1),
    ("as many classes as positions", PassShapes(((C, D),), ((C,),), [(C, D), UNBATCHED], [], C), None),
    ("samples one by one", PassShapes(((B, D),), ((B, C),), [UNBATCHED] * B, [], C), B),
    ("a vector of all samples' own", PassShapes(((B, D),), ((B, C),), [UNBATCHED, (B, D)], [], B * C), B),
    ("time first, a mask of samples first", PassShapes(((T, B, D), (B, T)), ((T, B, C),)), None),
    ("time first, as a layer was given it", PassShapes(((T, B, D),), ((T, B, C),), [], [(T, B, 7)]), B),
    ("time first, with states", PassShapes(((T, B, D),), ((T, B, C), (2, B, C)), [], [(T, B, D)]), B),
    ("time first, a number each", PassShapes(((T, B, D),), ((T, B),), [], [(T, B, D)]), B),
    ("time first, a loss alone", PassShapes(((T, B, D), (T, B)), (), [], [(T, B, D)]), B),
    ("turned round inside", PassShapes(((B, T, D),), ((B, T, C),), [], [(T, B, D)]), B),
    ("time first, a label a sample", PassShapes(((T, B, D),), ((B, C),), [], [(T, B, D)]), B),
    ("a vector of classes", PassShapes(((2, E), (N, D)), ((C,),), [(N, D), (N, 7)], [], N * C), None),
    ("a number a graph", PassShapes(((2, E), (N, D)), ((B,),), [(N, D), (N, 7)], [], N * C), B),
    ("nothing", PassShapes(), None),
]


@pytest.mark.parametrize(("name", "shapes", "samples"), CASES, ids=[name for name, *_ in CASES])
def test_samples(name: str, shapes: PassShapes, samples: int | None) -> None:
    place = find_samples(shapes)
    assert (None if place is None else shapes.read(place)) == samples


def test_a_number_is_found_in_the_outputs_before_the_inputs() -> None:
    shapes = PassShapes(((T, B, D), (N,)), ((T, B, C),))
    assert find_number(shapes, T) == TensorDim("outputs", 0)
    assert find_number(shapes, B) == TensorDim("outputs", 0, 1)
    assert find_number(shapes, B * 1.01, 0.02) == TensorDim("outputs", 0, 1)
    assert find_number(shapes, N) == TensorDim("inputs", 1)
    assert find_number(shapes, N + 1) is None


@pytest.mark.parametrize(
    ("outputs", "nearest", "positions"),
    [
        ((B, T, C), B * T, B * T),
        ((B, C, T), B * T, B * T),  # classes second
        ((B, C, T, T), B, B * T * T),  # a map that was enlarged after its last layer
        ((B, T, T, C), B * T * T, B * T * T),
        ((B, C), 3, B),  # an expert is nearest to the loss
        ((B, T), B * T, B * T),
        ((B, T), B, B),
        ((B,), B, B),
    ],
)
def test_positions(outputs: tuple[int, ...], nearest: int, positions: int) -> None:
    assert find_positions(PassShapes(((B, T),), (outputs,)), B, nearest) == positions


@dataclass
class Output:
    loss: Tensor
    logits: Tensor
    states: tuple[Tensor, ...] | None = None


def test_tensors_lie_in_mappings_tuples_dataclasses_and_objects() -> None:
    logits, fixed = torch.zeros(4, 2, requires_grad=True), torch.zeros(3, 2)
    nested: Any = SimpleNamespace(store=SimpleNamespace(mapping={"x": fixed, "name": "graph"}), number=3)
    assert found_in({"x": logits, "rest": (fixed, [None, torch.tensor(1.0)])}) == ((4, 2), (3, 2))
    assert found_in(Output(logits.sum(), logits, (fixed,)), trained=True) == ((4, 2),)
    assert found_in(((nested,), {})) == ((3, 2),)
    assert found_in(nn.Linear(2, 2)) == ()
    nested.own = nested  # an object that holds itself
    assert found_in(nested)[0] == (3, 2)
