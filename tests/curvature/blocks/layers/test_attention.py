"""`nn.MultiheadAttention` measures what four linear layers would, however its forward pass finds its way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.curvature.measured import assert_close, build_kfac, factors

SAMPLES, QUERIES, KEYS, WIDTH, HEADS = 3, 4, 5, 6, 2


class FourLayers(nn.Module):
    """Attention written with linear layers, batch first."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        bias = attention.in_proj_bias is not None
        separate = attention.in_proj_weight is None
        weights = (
            [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
            if separate
            else attention.in_proj_weight.chunk(3)
        )
        for index, (key, weight) in enumerate(zip("qkv", weights, strict=True)):
            layer = nn.Linear(weight.shape[1], WIDTH, bias=bias)
            values = {"weight": weight.detach()}
            layer.load_state_dict(values | ({"bias": attention.in_proj_bias.chunk(3)[index].detach()} if bias else {}))
            setattr(self, key, layer)
        self.out = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.out.load_state_dict(attention.out_proj.state_dict())

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Attends(nn.Module):
    """Attention between batch-first tensors, in the layout that the module asks for."""

    def __init__(self, *, need_weights: bool, checkpointed: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        nn.init.normal_(self.attention.out_proj.bias) if options.get("bias", True) else None
        self.need_weights, self.checkpointed = need_weights, checkpointed

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return (
            checkpoint(self.attend, query, key, value, mask, use_reentrant=False)
            if self.checkpointed
            else (self.attend(query, key, value, mask))
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        same = query is key, key is value
        if not self.attention.batch_first:
            query = query.transpose(0, 1)
            key = query if same[0] else key.transpose(0, 1)
            value = key if same[1] else value.transpose(0, 1)
        masked = None if mask is None else ~mask
        out, _ = self.attention(query, key, value, need_weights=self.need_weights, attn_mask=masked)
        return out if self.attention.batch_first else out.transpose(0, 1)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands(kind: str, options: dict[str, Any]) -> list[Tensor]:
    query = noise(SAMPLES, QUERIES, WIDTH)
    key = noise(SAMPLES, KEYS, options.get("kdim", WIDTH), seed=2)
    match kind:
        case "self":
            return [query, query, query]
        case "square":  # as many positions as samples
            square = noise(SAMPLES, SAMPLES, WIDTH)
            return [square, square, square]
        case "memory":
            return [query, key, key]
    return [query, key, noise(SAMPLES, KEYS, options.get("vdim", WIDTH), seed=3)]


def loss(outputs: Tensor) -> Tensor:
    return (outputs.tanh() * torch.linspace(0.5, 2.0, outputs.numel()).view(outputs.shape)).sum() / len(outputs)


def measured(model: nn.Module, inputs: list[Tensor], *rest: Any, **curvature: Any) -> dict[str, Tensor]:
    kfac = build_kfac(model, inversion={"damping": 0.05}, **curvature)
    outputs = model(*inputs, *rest)
    kfac.fisher_backward(outputs)
    loss(outputs).backward()
    kfac.step()
    kfac.remove()
    return factors(kfac)


def gradients(model: nn.Module) -> list[Tensor]:
    """Preconditioned gradients of q, k, v, out."""
    if isinstance(model, FourLayers):
        layers = (model.q, model.k, model.v, model.out)
        return [layer.weight.grad for layer in layers] + [layer.bias.grad for layer in layers if layer.bias is not None]
    module = model.attention
    fused = module.in_proj_weight is not None
    weights = (
        module.in_proj_weight.grad.chunk(3) if fused else [getattr(module, f"{k}_proj_weight").grad for k in "qkv"]
    )
    biases = [] if module.in_proj_bias is None else [*module.in_proj_bias.grad.chunk(3), module.out_proj.bias.grad]
    return [*weights, module.out_proj.weight.grad, *biases]


OPTIONS: dict[str, dict[str, Any]] = {
    "time first": {},
    "batch first": {"batch_first": True},
    "separate": {"kdim": 4, "vdim": 5, "batch_first": True},
    "no bias": {"bias": False},
}
NAMES = {"q": "in_proj.q", "k": "in_proj.k", "v": "in_proj.v", "out": "out_proj"}


@pytest.mark.parametrize("kind", ["self", "square", "memory", "three"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_it_is_four_linear_layers(kind: str, options: str, need_weights: bool, sharing: str) -> None:
    given = OPTIONS[options]
    if "kdim" in given and kind != "three":
        kind = "three"
    model = Attends(need_weights=need_weights, **given)
    plain, inputs = FourLayers(model.attention), operands(kind, given)
    wanted = measured(plain, inputs, sharing=sharing)
    found = measured(model, inputs, sharing=sharing)
    assert len(found) == len(wanted) == 8
    for own, name in NAMES.items():
        for side in "AG":
            expected = wanted[f"{own}/{side}"]
            if sharing == "reduce" and (own, side) == ("k", "G"):  # attention doesn't see a shift of all keys
                assert max(float(expected.norm()), float(found[f"attention.{name}/{side}"].norm())) < 1e-10
            else:
                assert_close(found[f"attention.{name}/{side}"], expected, 1e-4)
    for grad, expected in zip(gradients(model), gradients(plain), strict=True):
        if float(expected.norm()) > 1e-5:  # k's bias has no gradient but rounding
            assert_close(grad, expected, 2e-3)


@pytest.mark.parametrize("fisher", ["mc", "type2"])
def test_passes_of_its_own(fisher: str) -> None:
    model = Attends(need_weights=False)
    plain, inputs = FourLayers(model.attention), operands("self", {})
    wanted = measured(plain, inputs, fisher=fisher, likelihood="gaussian")
    found = measured(model, inputs, fisher=fisher, likelihood="gaussian")
    for own, name in NAMES.items():
        for side in "AG":
            assert_close(found[f"attention.{name}/{side}"], wanted[f"{own}/{side}"], 1e-4)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_masks_and_checkpointing(checkpointed: bool) -> None:
    model = Attends(need_weights=True, checkpointed=checkpointed)
    plain, inputs = FourLayers(model.attention), operands("self", {})
    mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril()
    wanted = measured(plain, inputs, mask)
    found = measured(model, inputs, mask)
    for own, name in NAMES.items():
        for side in "AG":
            assert_close(found[f"attention.{name}/{side}"], wanted[f"{own}/{side}"], 1e-4)


def test_autocast_and_unbatched_inputs() -> None:
    model = nn.MultiheadAttention(WIDTH, HEADS)
    query = noise(QUERIES, WIDTH)
    found = []
    for enabled in (False, True):
        kfac = build_kfac(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            kfac.micro_batch(divisor=1.0)
            model(query, query, query)[0].float().tanh().sum().backward()
        kfac.step()
        found.append(factors(kfac))
        kfac.remove()
    for name, value in found[0].items():
        assert_close(found[1][name], value, 0.05)


def test_an_encoder_layer_is_covered_whole() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=0.0, batch_first=True), 2)
    kfac = build_kfac(model)
    assert not kfac.coverage.uncovered
    loss(model(noise(SAMPLES, QUERIES, WIDTH))).backward()
    kfac.step()
    assert all(float(kfac._parts.averages.scalars[0, index]) > 0 for index in range(len(kfac.monitor.plan.units)))
    model.eval()
    with torch.no_grad():  # the fused path of inference
        model(noise(SAMPLES, QUERIES, WIDTH))
    kfac.remove()


def test_a_failing_forward_pass_leaves_no_mode_behind() -> None:
    model = Attends(need_weights=False)
    kfac = build_kfac(model)
    with pytest.raises(AssertionError):
        model(*operands("self", {})[:2], noise(SAMPLES, QUERIES, WIDTH + 1))
    assert torch._C._len_torch_function_stack() == 0
    loss(model(*operands("self", {}))).backward()
    kfac.step()
    assert torch._C._len_torch_function_stack() == 0
    kfac.remove()
    assert not model.attention._forward_pre_hooks
    assert not model.attention._forward_hooks


def test_steps_that_do_not_measure_enter_no_mode() -> None:
    model, depth = Attends(need_weights=False), []
    kfac = build_kfac(model, inversion={"inverse_every": 2, "early_refresh": 0}, factor_every=2)
    model.attention.register_forward_pre_hook(lambda module, args: depth.append(torch._C._len_torch_function_stack()))
    for _ in range(3):
        loss(model(*operands("self", {}))).backward()
        kfac.step()
    # The first pass that is measured also looks for what all samples share.
    assert depth == [2, 0, 1]
    kfac.remove()
