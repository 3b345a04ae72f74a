"""Which layers get a block, under which setting, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from kfac_dist.config.schema import CurvatureConfig, Sharing
from kfac_dist.curvature.blocks import BLOCK_TYPES, Coverage, find_blocks
from kfac_dist.errors import ModelError
from tests.curvature.measured import build_kfac


def find(model: nn.Module, **config: Any) -> Coverage:
    return find_blocks(model, CurvatureConfig(**config))


def names(coverage: Coverage) -> list[str]:
    return [block.name for block in coverage.blocks]


def assert_partition(model: nn.Module, coverage: Coverage) -> None:
    """Every parameter is covered by exactly one block, or has a reason."""
    covered = [name for block in coverage.blocks for name in block.parameters]
    assert len(covered) == len(set(covered))
    assert not set(covered) & set(coverage.uncovered)
    assert set(covered) | set(coverage.uncovered) == {name for name, _ in model.named_parameters()}


def encoder() -> nn.Module:
    return nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "head": nn.Linear(4, 2)})


def test_every_table_row_makes_a_block() -> None:
    arguments: dict[type[nn.Module], tuple[Any, ...]] = {
        nn.Linear: (2, 3), nn.Conv1d: (2, 3, 1), nn.Conv2d: (2, 3, 1), nn.Conv3d: (2, 3, 1), nn.Embedding: (2, 3),
        nn.ConvTranspose1d: (2, 3, 1), nn.ConvTranspose2d: (2, 3, 1), nn.ConvTranspose3d: (2, 3, 1),
        nn.LayerNorm: (2,), nn.RMSNorm: (2,), nn.GroupNorm: (1, 2), nn.BatchNorm1d: (2,), nn.BatchNorm2d: (2,),
        nn.BatchNorm3d: (2,), nn.SyncBatchNorm: (2,),
    }  # fmt: skip
    assert set(arguments) == set(BLOCK_TYPES)
    for kind, positional in arguments.items():
        model = nn.Sequential(kind(*positional))
        coverage = find(model)
        assert type(coverage.blocks[0]) is BLOCK_TYPES[kind]
        assert_partition(model, coverage)
        assert coverage.blocks[0].describe().startswith(BLOCK_TYPES[kind].__name__)


@pytest.mark.parametrize(
    ("config", "blocks", "reasons"),
    [
        ({}, ["encoder.0", "encoder.1", "head"], set()),
        ({"include": ["encoder.*"]}, ["encoder.0", "encoder.1"], {"not matched by kfac.curvature.include"}),
        ({"exclude": ["*.1", "he?d"]}, ["encoder.0"], {"matched by '*.1'", "matched by 'he?d'"}),
        ({"include": ["encoder.*", "head"], "exclude": ["encoder.*"]}, ["head"], {"matched by 'encoder.*'"}),
        ({"fisher": "input_only"}, ["encoder.0", "head"], {"input_only measures no output gradients"}),
    ],
)
def test_patterns(config: dict[str, Any], blocks: list[str], reasons: set[str]) -> None:
    model = encoder()
    coverage = find(model, **config)
    assert names(coverage) == blocks
    assert_partition(model, coverage)
    for reason in reasons:
        assert any(found.startswith(reason) for found in coverage.uncovered.values())
    assert len({found.split(" of ")[0] for found in coverage.uncovered.values()}) == len(reasons)


def test_the_first_matching_sharing_override_wins() -> None:
    coverage = find(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)),
        sharing="expand",
        sharing_overrides={"1": "reduce", "[12]": "expand", "*": "reduce"},
    )
    assert [block.sharing for block in coverage.blocks] == [Sharing.REDUCE, Sharing.REDUCE, Sharing.EXPAND]


def test_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    coverage = find(model)
    assert names(coverage) == ["2"]
    assert coverage.uncovered == {
        "0.weight": "frozen", "0.bias": "frozen", "1.weight": "frozen", "1.bias": "its weight is frozen",
        "2.bias": "frozen",
    }  # fmt: skip
    assert_partition(model, coverage)


def test_tied_weights_keep_the_plain_gradient() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5))
    model[2].weight = model[0].weight
    coverage = find(model)
    assert names(coverage) == ["1"]
    assert coverage.uncovered["0.weight"] == "its weight is tied to that of 2"
    assert coverage.uncovered["2.bias"] == "its weight is tied to that of 0"


def test_a_module_at_two_places_is_one_block() -> None:
    shared = nn.Linear(3, 3)
    assert names(find(nn.Sequential(shared, nn.Tanh(), shared))) == ["0"]


class Scaled(nn.Linear):
    """A linear layer with a parameter that no block knows."""

    def __init__(self) -> None:
        super().__init__(3, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def test_parameters_that_a_subclass_adds_are_uncovered() -> None:
    """A `scale` must not be taken for the bias that isn't there."""
    model = nn.Sequential(Scaled())
    coverage = find(model)
    assert list(coverage.blocks[0].parameters) == ["0.weight"]
    assert coverage.blocks[0].matrix_shape == (1, 3, 3)
    assert coverage.uncovered == {"0.scale": "not part of what LinearBlock covers"}
    assert_partition(model, coverage)


def test_layers_whose_weight_is_computed_get_no_block() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    coverage = find(model)
    assert names(coverage) == ["1"]
    assert coverage.uncovered["0.bias"] == "its weight is computed from other parameters"
    assert_partition(model, coverage)


def test_types_without_a_block_are_named() -> None:
    model = nn.Sequential(nn.PReLU(), nn.RNN(2, 2), nn.Bilinear(2, 2, 2), nn.LayerNorm(2))
    coverage = find(model)
    assert names(coverage) == ["3"]
    assert coverage.uncovered["0.weight"] == "PReLU has no block"
    assert coverage.uncovered["1.weight_ih_l0"] == "RNN has no block"
    assert_partition(model, coverage)


def test_layers_that_cannot_be_measured_say_why() -> None:
    model = nn.Sequential(
        nn.LazyLinear(3), nn.Embedding(3, 3, sparse=True), nn.Linear(2, 2, dtype=torch.complex64), nn.Linear(2, 2)
    )
    coverage = find(model)
    assert names(coverage) == ["3"]
    assert "run a forward pass" in coverage.uncovered["0.weight"]
    assert coverage.uncovered["1.weight"] == "its gradients are sparse"
    assert coverage.uncovered["2.bias"] == "its weight is complex"
    assert_partition(model, coverage)


def test_norms_without_parameters_and_bare_parameters() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.zeros(3))
            self.norm = nn.BatchNorm1d(3, affine=False)
            self.head = nn.Linear(3, 1)

    coverage = find(Root())
    assert names(coverage) == ["head"]
    assert coverage.uncovered == {"position": "Root has no block"}


def test_a_bare_layer_is_a_model() -> None:
    coverage = find(nn.Linear(2, 2))
    assert list(coverage.blocks[0].parameters) == ["weight", "bias"]


def test_no_block_at_all_is_an_error() -> None:
    with pytest.raises(ModelError, match="no layer of the model gets a K-FAC block"):
        build_kfac(encoder(), include=["decoder.*"])
