"""Which layers get a block, under which setting, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrizations import weight_norm

from kfac_dist.config.schema import CurvatureConfig, Sharing
from kfac_dist.curvature.blocks import BLOCK_TYPES, Block, Coverage, find_blocks
from kfac_dist.curvature.blocks.layers.embedding import EmbeddingBlock
from kfac_dist.curvature.blocks.layers.linear import LinearBlock
from kfac_dist.curvature.blocks.layers.tied import TiedBlock
from kfac_dist.errors import ModelError
from tests.curvature.measured import build_kfac


def find(model: nn.Module, **config: Any) -> Coverage:
    return find_blocks(model, CurvatureConfig(**config))


def names(coverage: Coverage) -> list[str]:
    return [block.name for block in coverage.blocks]


def assert_partition(model: nn.Module, coverage: Coverage) -> None:
    """Every entry of every parameter is covered by exactly one block, or its parameter has a reason."""
    counts = {
        name: torch.zeros(() if isinstance(parameter, UninitializedParameter) else parameter.shape)
        for name, parameter in model.named_parameters()
    }
    for block in coverage.blocks:
        matrix = torch.zeros(block.matrix_shape)
        for tensor, _ in block.matrix_views([counts[name] for name in block.parameters], matrix):
            tensor += 1
    for name, count in counts.items():
        assert bool((count == (name not in coverage.uncovered)).all()), name
    assert set(coverage.uncovered) <= set(counts)


def encoder() -> nn.Module:
    return nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "head": nn.Linear(4, 2)})


def test_every_table_row_makes_a_block() -> None:
    arguments: dict[type[nn.Module], tuple[Any, ...]] = {
        nn.Linear: (2, 3), nn.Conv1d: (2, 3, 1), nn.Conv2d: (2, 3, 1), nn.Conv3d: (2, 3, 1), nn.Embedding: (2, 3),
        nn.ConvTranspose1d: (2, 3, 1), nn.ConvTranspose2d: (2, 3, 1), nn.ConvTranspose3d: (2, 3, 1),
        nn.LayerNorm: (2,), nn.RMSNorm: (2,), nn.GroupNorm: (1, 2), nn.BatchNorm1d: (2,), nn.BatchNorm2d: (2,),
        nn.BatchNorm3d: (2,), nn.SyncBatchNorm: (2,),
    }  # fmt: skip
    arguments[nn.MultiheadAttention] = (4, 2)
    assert {kind for kind in BLOCK_TYPES if not isinstance(kind, str)} == set(arguments)
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


class LowRank(nn.Linear):
    """A frozen layer with bare parameters beside its weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Parameter(torch.ones(1, inputs)), nn.Parameter(torch.zeros(outputs, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + inputs @ self.lora_a.T @ self.lora_b.T


def test_parameters_beside_a_frozen_weight_are_not_called_frozen() -> None:
    coverage = find(nn.Sequential(LowRank(2, 2), nn.Linear(2, 2)))
    beside = "LowRank computes with it beside its frozen weight, and no block covers that"
    assert coverage.uncovered == {
        "0.weight": "frozen", "0.bias": "its weight is frozen", "0.lora_a": beside, "0.lora_b": beside,
    }  # fmt: skip


def tie(*layers: nn.Module, key: str = "weight") -> nn.Module:
    for layer in layers[1:]:
        setattr(layer, key, getattr(layers[0], key))
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("model", "kind", "uncovered"),
    [
        (tie(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)), TiedBlock, {}),
        (tie(nn.Embedding(5, 3), nn.Linear(3, 5)), TiedBlock, {"1.bias": "not covered by TiedBlock"}),
        (tie(nn.Linear(3, 5), nn.Embedding(5, 3)), TiedBlock, {"0.bias": "not covered by TiedBlock"}),
        (tie(nn.Embedding(5, 3), nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)), TiedBlock, {}),
        (tie(nn.Embedding(5, 3), nn.Embedding(5, 3)), EmbeddingBlock, {}),
        (tie(tie(nn.Linear(3, 3), nn.Linear(3, 3))[0], nn.Linear(3, 3)), LinearBlock, None),
        (tie(*tie(nn.Linear(3, 3), nn.Linear(3, 3)), key="bias"), LinearBlock, {}),
    ],
)
def test_modules_that_share_a_weight_are_one_block(
    model: nn.Module, kind: type[Block], uncovered: dict[str, str] | None
) -> None:
    coverage = find(model)
    assert [type(block) for block in coverage.blocks] == [kind]
    assert coverage.uncovered == uncovered or uncovered is None
    assert_partition(model, coverage)


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [
        (tie(nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1)), {}, "its weight is tied to that of 1"),
        (tie(nn.Linear(2, 2), nn.Linear(2, 2), key="bias"), {}, "its weight is tied to that of 1"),
        (
            tie(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)),
            {"exclude": ["1"]},
            "its weight is tied to that of 1: m",
        ),
        (tie(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)), {"fisher": "input_only"}, "input_only measures no out"),
        (tie(nn.LayerNorm(2), nn.Linear(2, 2), key="bias"), {}, "its weight is tied to that of 1"),
    ],
)
def test_weights_that_no_block_can_share(model: nn.Module, config: dict[str, Any], reason: str) -> None:
    coverage = find(nn.ModuleList([*model, nn.Linear(2, 2)]), **config)
    assert names(coverage) == ["2"]
    assert all(
        found.startswith("its weight is tied") or found.startswith(reason) for found in coverage.uncovered.values()
    )
    assert any(found.startswith(reason) for found in coverage.uncovered.values())


class Head(nn.Module):
    """Keeps its layer's bias, too: BERT's heads, of which some come before the embedding that they are tied to."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(3, 5)
        self.bias = self.decoder.bias


@pytest.mark.parametrize("first", ["head", "embedding"])
def test_a_bias_that_is_kept_elsewhere_leaves_its_layer_tied(first: str) -> None:
    model = nn.ModuleDict({"head": Head(), "embedding": nn.Embedding(5, 3)})
    model["head"].decoder.weight = model["embedding"].weight
    model = nn.ModuleDict(sorted(model.items(), key=lambda item: item[0] != first))
    coverage = find(model)
    assert [type(block) for block in coverage.blocks] == [TiedBlock]
    assert set(coverage.uncovered) == {"head.bias"}
    assert_partition(model, coverage)


def test_a_bias_that_is_kept_elsewhere_is_its_layers() -> None:
    """Under the name that the model lists; a module of a known kind that holds it is a layer that uses it."""
    model = nn.ModuleDict({"head": Head()})
    coverage = find(model)
    assert {block.name: list(block.parameters) for block in coverage.blocks} == {
        "head.decoder": ["head.decoder.weight", "head.bias"]
    }
    assert coverage.blocks[0].matrix_shape == (1, 5, 4)
    assert not coverage.uncovered
    assert_partition(model, coverage)


@pytest.mark.parametrize("kwargs", [{}, {"kdim": 3, "vdim": 5}, {"bias": False}, {"add_bias_kv": True}])
@pytest.mark.parametrize("config", [{}, {"exclude": ["*.out_proj"]}, {"exclude": ["*.q"]}, {"exclude": ["*"]}])
def test_attention_is_four_blocks(kwargs: dict[str, Any], config: dict[str, Any]) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, **kwargs)})
    coverage = find(model, **config)
    expected = [f"attention.{name}" for name in ("in_proj.q", "in_proj.k", "in_proj.v", "out_proj")]
    wanted = {"*.out_proj": expected[:3], "*.q": expected[3:], "*": []}
    assert names(coverage) == wanted.get(next(iter(config.get("exclude", [""]))), expected)
    assert_partition(model, coverage)
    assert ("attention.bias_k" in coverage.uncovered) == ("add_bias_kv" in kwargs)


def test_attention_with_frozen_parts() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    model["attention"].in_proj_weight.requires_grad_(False)
    model["attention"].out_proj.bias.requires_grad_(False)
    coverage = find(model)
    assert names(coverage) == ["attention.out_proj"]
    assert coverage.uncovered["attention.in_proj_weight"] == "frozen"
    assert coverage.uncovered["attention.in_proj_bias"] == "not covered by AttentionBlock"


def test_a_module_at_two_places_is_one_block() -> None:
    shared = nn.Linear(3, 3)
    assert names(find(nn.Sequential(shared, nn.Tanh(), shared))) == ["0"]


class Scaled(nn.Linear):
    """A linear layer with a parameter that no block knows."""

    def __init__(self) -> None:
        super().__init__(3, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale


def test_parameters_that_a_subclass_adds_are_uncovered() -> None:
    """A `scale` must not be taken for the bias that isn't there."""
    model = nn.Sequential(Scaled())
    coverage = find(model)
    assert list(coverage.blocks[0].parameters) == ["0.weight"]
    assert coverage.blocks[0].matrix_shape == (1, 3, 3)
    assert coverage.uncovered == {"0.scale": "not covered by LinearBlock"}
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
        nn.LazyLinear(3), nn.Embedding(3, 3, sparse=True), nn.Linear(2, 2, dtype=torch.complex64), nn.Linear(2, 2),
        nn.Linear(2, 0),
    )  # fmt: skip
    coverage = find(model)
    assert names(coverage) == ["3"]
    assert coverage.uncovered["4.bias"] == "its weight has no values"
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


def test_an_embedding_that_divides_by_frequency_is_named() -> None:
    coverage = find(nn.Sequential(nn.Embedding(5, 3, scale_grad_by_freq=True), nn.Linear(3, 3)))
    assert names(coverage) == ["1"]
    assert coverage.uncovered["0.weight"] == "its gradients are divided by how often a token occurs"
