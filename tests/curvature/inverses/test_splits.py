"""Named splits against the diagonal blocks of the whole factors; which heads models say they have; refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist.config.schema import CurvatureConfig, KFACConfig
from kfac_dist.curvature.blocks import find_blocks
from kfac_dist.curvature.factors import Heads, Side
from kfac_dist.errors import ConfigError
from kfac_dist.preconditioner.plan import Plan, build_plan
from tests.curvature.blocks.test_layers import (
    LAYERS,
    expected_factors,
    expected_update,
    gradient_matrix,
    input_rows,
    mean_loss,
    output_rows,
)
from tests.curvature.measured import assert_close, build_kfac, factors
from tests.preconditioner.transformer_models import bert, gpt2


def plan_of(model: nn.Module, splits: Mapping[str, Any], **inversion: Any) -> Plan:
    config = KFACConfig.model_validate({"inversion": {"splits": splits, **inversion}})
    return build_plan(find_blocks(model, CurvatureConfig()).blocks, config, world_size=2)


def sizes(plan: Plan, block: str) -> dict[str, list[int]]:
    units = plan.blocks[block].units
    return {side: [unit.dim for unit in units if unit.side == side] for side in dict.fromkeys(u.side for u in units)}


def heads(model: nn.Module) -> dict[str, Heads]:
    return {block.name: block.heads for block in find_blocks(model, CurvatureConfig()).blocks if block.heads}


@pytest.mark.parametrize("solver", ["cholesky", "eigen"])
def test_factors_and_updates_are_those_of_the_diagonal_blocks(solver: str) -> None:
    torch.manual_seed(0)
    model, loss, inputs = nn.Sequential(nn.Linear(6, 4)), mean_loss(9), torch.randn(9, 6)
    a, g = expected_factors(input_rows(model[0], inputs), output_rows(model[0], inputs, loss), "expand", 9)
    splits = {"0": {"inputs": [2, 4], "outputs": 2}}
    kfac = build_kfac(model, inversion={"splits": splits, "damping": 0.05, "solver": solver})
    loss(model(inputs)).backward()
    gradient = gradient_matrix(model[0])
    kfac.step()
    # The bias's coordinate, the seventh, belongs to the last block of A.
    blocks = {"0/A": torch.block_diag(torch.ones(2, 2), torch.ones(5, 5)), "0/G": torch.ones(2, 2)}
    kept = {"0/A": a * blocks["0/A"], "0/G": g * torch.kron(torch.eye(2), blocks["0/G"])}
    for name, found in factors(kfac).items():
        assert_close(found, kept[name])
    expected = expected_update(gradient, kept["0/A"], kept["0/G"], 0.05, exact=solver == "eigen")
    assert_close(gradient_matrix(model[0]), expected, 1e-3)
    kfac.remove()


@pytest.mark.parametrize("solver", ["cholesky", "eigen", "ekfac"])
def test_groups_apart_are_the_same_mathematics(solver: str) -> None:
    updates = []
    for splits in ({}, {"0": "per_group"}):
        torch.manual_seed(0)
        make, inputs = LAYERS["conv2d, groups"]
        model, loss = nn.Sequential(make()), mean_loss(3)
        kfac = build_kfac(model, inversion={"splits": splits, "damping": 0.05, "solver": solver, "early_refresh": 0})
        for _ in range(2):
            model.zero_grad()
            loss(model(inputs)).backward()
            kfac.step()
        updates.append(gradient_matrix(model[0]))
        groups = model[0].groups
        units = kfac.monitor.plan.blocks["0"].units
        assert [unit.batch for unit in units] == ([1] * 2 * groups if splits else [groups] * 2)
        assert len({unit.name for unit in units}) == len(units)
        kfac.remove()
    assert_close(updates[1], updates[0], 1e-4)


def test_heads_of_multihead_attention() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 3), "other": nn.Linear(6, 6)})
    plan = plan_of(model, {"attention": "per_head"})
    for key in ("q", "k", "v"):
        assert sizes(plan, f"attention.in_proj.{key}") == {"A": [7], "G": [2, 2, 2]}
    assert sizes(plan, "attention.out_proj") == {"A": [2, 2, 3], "G": [6]}
    assert sizes(plan, "other") == {"A": [7], "G": [6]}
    assert len(plan.assignment.owners) == 3 * 4 + 4 + 2


def test_the_first_match_wins_and_the_cap_comes_after() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 5))
    plan = plan_of(model, {"0": {"outputs": [2, 6]}, "2": 1, "*": 2}, max_factor_dim=4)
    assert sizes(plan, "0") == {"A": [3, 3, 3, 4], "G": [2, 3, 3]}
    assert sizes(plan, "1") == {"A": [4, 2, 3], "G": [4, 4]}
    assert sizes(plan, "2") == {"A": [3, 3, 3], "G": [2, 3]}


def test_heads_of_hugging_face_models() -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    found = heads(gpt2())
    assert found["model.transformer.h.0.attn.c_attn"] == Heads(Side.G, fused=True, dim=4)
    assert found["model.transformer.h.1.attn.c_proj"] == Heads(Side.A, fused=False, dim=4)
    assert not any("mlp" in name for name in found)
    assert sizes(plan_of(gpt2(), {"*.attn.*": "per_head"}), "model.transformer.h.0.attn.c_attn") == {
        "A": [9],
        "G": [4] * 6,
    }
    found = heads(bert())
    assert found["model.bert.encoder.layer.0.attention.self.query"] == Heads(Side.G, fused=False, dim=4)
    assert found["model.bert.encoder.layer.0.attention.output.dense"] == Heads(Side.A, fused=False, dim=4)
    assert not any(".intermediate." in name or ".layer.0.output." in name for name in found)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    plan = plan_of(llama, {"*.self_attn.*": "per_head"})
    assert sizes(plan, "model.layers.0.self_attn.q_proj")["G"] == [2] * 4
    assert sizes(plan, "model.layers.0.self_attn.k_proj")["G"] == [2] * 2
    assert sizes(plan, "model.layers.0.self_attn.o_proj")["A"] == [2] * 4
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    found = heads(t5)
    assert found["encoder.block.0.layer.0.SelfAttention.q"] == Heads(Side.G, fused=False, dim=4)
    assert found["decoder.block.0.layer.1.EncDecAttention.o"] == Heads(Side.A, fused=False, dim=4)


class Attention(nn.Module):
    """One's own, which says nothing of its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 6, bias=False)


def test_heads_that_the_model_does_not_tell_can_be_given() -> None:
    model = nn.Sequential(Attention())
    with pytest.raises(ConfigError, match=r"the model doesn't say how many heads it has; write \{by: per_head, heads"):
        plan_of(model, {"0.qkv": "per_head"})
    with pytest.raises(ConfigError, match="nothing shows that it makes attention's heads"):
        plan_of(model, {"0.*": {"by": "per_head", "heads": 3}})
    model = nn.ModuleDict({"attention": Attention()})
    plan = plan_of(model, {"attention.*": {"by": "per_head", "heads": 3}})
    assert sizes(plan, "attention.qkv") == {"A": [7], "G": [2] * 9}
    assert sizes(plan, "attention.proj") == {"A": [2] * 3, "G": [6]}


LAYERS_TO_CUT = {
    "linear": lambda: nn.Linear(6, 4),
    "table": lambda: nn.Embedding(6, 4),
    "norm": lambda: nn.LayerNorm(4),
    "qkv": lambda: nn.Linear(6, 9),
}
REFUSALS = {
    "no such layer": (
        {"linaer": 2},
        "'linaer' cuts nothing: no layer with a K-FAC block is named so; did you mean 'linear'?",
    ),
    "shadowed": ({"l*": 2, "linear": 3}, "'linear' cuts nothing: an earlier pattern has matched all its layers"),
    "no heads": ({"linear": "per_head"}, "asks for per_head of layer 'linear': nothing shows"),
    "no groups": ({"linear": "per_group"}, "it has no groups"),
    "norm in groups": ({"norm": "per_group"}, "it has no groups"),
    "diagonal": ({"table": 2}, "asks for inputs of layer 'table': its A is a diagonal"),
    "norm": ({"norm": 2}, "asks for inputs of layer 'norm': its Fisher is unit-wise"),
    "sum": (
        {"linear": {"outputs": [2, 3]}},
        r"asks for outputs: \[2, 3\] of layer 'linear': they add up to 5, and it has 4",
    ),
    "too many": ({"linear": 5}, "asks for outputs: 5 of layer 'linear': the factor has 4 rows"),
    "uneven heads": ({"qkv": {"by": "per_head", "heads": 2}}, "2 heads of q, k and v each don't divide its 9 outputs"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_layer(case: str) -> None:
    splits, message = REFUSALS[case]
    model = nn.ModuleDict({name: make() for name, make in LAYERS_TO_CUT.items()})
    with pytest.raises(ConfigError, match=message):
        plan_of(model, splits)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_ekfac_measures_in_the_heads_bases() -> None:
    """Block-diagonal eigenvectors are a basis like any other: all of S is measured in it."""
    torch.manual_seed(1)
    model, inputs = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, batch_first=True)}), torch.randn(5, 3, 4)
    kfac = build_kfac(
        model,
        inversion={"splits": {"attention": "per_head"}, "solver": "ekfac", "early_refresh": 0, "inverse_every": 50},
    )
    for _ in range(2):
        model.zero_grad()
        model["attention"](inputs, inputs, inputs, need_weights=False)[0].square().sum(-1).mean(-1).mean().backward()
        kfac.step()
    assert kfac._parts.moments is not None
    for name, block in kfac.monitor.plan.blocks.items():
        assert block.moments is not None
        moments = kfac._parts.moments.averages.sums(block.moments)
        assert moments.numel() == torch.Size(block.matrix_shape).numel()
        assert bool((moments > 0).any()), name
    assert all(bool(torch.isfinite(grad).all()) for grad in gradients_of(model).values())
