"""Hooks: what is measured, once, whatever the model does around its layers, and nothing when nothing is asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from kfac_dist.config.schema import CurvatureConfig, Sharing
from kfac_dist.curvature.blocks import Block, LayerCall, find_blocks
from kfac_dist.curvature.blocks.layers.linear import LinearBlock
from kfac_dist.curvature.capture.capture import Capture
from kfac_dist.errors import ModelError
from tests.curvature.measured import assert_close, build_kfac, factors

Seen = dict[str, list[list[LayerCall]]]


def watch(
    model: nn.Module, *, own_backward: bool = False, active: bool = True, blocks: tuple[Block, ...] | None = None
) -> tuple[Capture, Seen]:
    blocks = find_blocks(model, CurvatureConfig()).blocks if blocks is None else blocks
    seen: Seen = {block.name: [] for block in blocks}

    def completed(block: Block, calls: list[LayerCall]) -> None:
        seen[block.name].append(calls)

    capture = Capture(model, blocks, completed, own_backward=own_backward)
    capture.active = active
    return capture, seen


def times(seen: Seen) -> list[int]:
    return [len(found) for found in seen.values()]


def chain(activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 2))


def inputs() -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def output_gradient(model: nn.Sequential, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient at the first layer's output, by autograd on a pre-activation that nothing overwrites."""
    hidden = model[0](x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(model[2](model[1](hidden.clone()))), hidden)
    return grad


@pytest.mark.parametrize(
    "activation", [nn.Tanh, lambda: nn.ReLU(inplace=True), lambda: nn.LeakyReLU(0.2, inplace=True)]
)
@pytest.mark.parametrize("own_backward", [False, True])
def test_gradient_is_that_of_the_output_itself_also_under_in_place_activations(
    activation: Callable[[], nn.Module], own_backward: bool
) -> None:
    model, x = chain(activation), inputs()
    expected = output_gradient(model, x, lambda out: out.square().sum())
    capture, seen = watch(model, own_backward=own_backward)
    outputs = model(x)
    if own_backward:
        capture.backpropagate(outputs, [2 * outputs.detach()], lambda block, calls, _: seen[block.name].append(calls))
    else:
        outputs.square().sum().backward()
    assert times(seen) == [1, 1]
    (call,) = seen["0"][0]
    assert call.grad is not None
    assert_close(call.grad, expected)
    assert torch.equal(call.inputs, x)
    assert not call.inputs.requires_grad
    assert not call.grad.requires_grad
    capture.remove()


@pytest.mark.parametrize("own_backward", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 2, 3), (5, 2, 2, 3)])
def test_in_place_activations_on_outputs_that_are_views(own_backward: bool, bias: bool, shape: tuple[int, ...]) -> None:
    """A linear layer on tokens returns a view; overwriting it takes the view's own node out of the graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = output_gradient(model, x, lambda out: out.square().sum())
    capture, seen = watch(model, own_backward=own_backward)
    outputs = model(x)
    if own_backward:
        capture.backpropagate(outputs, [2 * outputs.detach()], lambda block, calls, _: seen[block.name].append(calls))
    else:
        outputs.square().sum().backward()
    assert times(seen) == [1, 1]
    grad = seen["0"][0][0].grad
    assert grad is not None
    assert_close(grad, expected)
    capture.remove()


def test_in_place_on_a_rearranged_output() -> None:
    class ChannelsFirst(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mT

    torch.manual_seed(0)
    plain, given = nn.Linear(3, 4), ChannelsFirst(3, 4)
    given.load_state_dict(plain.state_dict())
    x, seen = torch.randn(5, 2, 3), []
    for layer, activate in ((plain, torch.relu), (given, torch.relu_)):
        model = nn.Sequential(layer)
        capture, found = watch(model, blocks=(LinearBlock("0", layer, Sharing.EXPAND),))
        activate(layer(x)).square().sum().backward()
        seen.append(found["0"][0][0].grad)
        capture.remove()
    assert_close(seen[1], seen[0].mT)


def test_inplace_residual_after_the_layer() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            hidden += x
            hidden.mul_(2.0)
            return self.second(hidden)

    torch.manual_seed(0)
    model, x = Residual(), inputs()
    capture, seen = watch(model)
    model(x).sum().backward()
    grad = seen["first"][0][0].grad
    assert grad is not None
    assert_close(grad, 2 * model.second.weight.sum(0).expand(5, -1))
    assert_close(seen["second"][0][0].inputs, 2 * (model.first(x) + x))
    capture.remove()


def test_backward_passes_through_one_graph_add_up() -> None:
    model, x = chain(), inputs()
    expected = output_gradient(model, x, lambda out: out.sum() + out.square().sum())
    capture, seen = watch(model)
    outputs = model(x)
    outputs.sum().backward(retain_graph=True)
    assert times(seen) == [0, 0]  # another one may follow
    outputs.square().sum().backward()
    assert times(seen) == [1, 1]
    grad = seen["0"][0][0].grad
    assert grad is not None
    assert_close(grad, expected)
    capture.remove()


def test_a_graph_that_is_kept_and_never_used_again_is_measured_at_the_end() -> None:
    model, x = chain(), inputs()
    capture, seen = watch(model)
    model(x).sum().backward(retain_graph=True)
    assert times(seen) == [0, 0]
    capture.flush()
    assert times(seen) == [1, 1]
    capture.remove()


def test_gradients_that_reach_no_weight_are_not_measured() -> None:
    """Saliency, a derivative by the input, an attack: they go back through the layers, and are not the loss's."""
    model, x = chain(), inputs().requires_grad_()
    expected = output_gradient(model, x.detach(), lambda out: out.square().sum())
    capture, seen = watch(model)
    outputs = model(x)
    torch.autograd.grad(outputs.sum(), x, retain_graph=True)
    torch.autograd.grad(outputs.sum(), x, create_graph=True)
    outputs.sum().backward(retain_graph=True, inputs=[x])
    capture.flush()
    assert times(seen) == [0, 0]
    outputs.square().sum().backward()
    assert times(seen) == [1, 1]
    grad = seen["0"][0][0].grad
    assert grad is not None
    assert_close(grad, expected)
    capture.remove()


def test_gradients_that_a_loop_asks_for_and_sets_by_hand_are_the_losss() -> None:
    model, x = chain(), inputs()
    expected = output_gradient(model, x, lambda out: out.square().sum())
    capture, seen = watch(model)
    torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    capture.flush()
    assert times(seen) == [1, 1]
    grad = seen["0"][0][0].grad
    assert grad is not None
    assert_close(grad, expected)
    capture.remove()


def test_two_losses_on_one_forward_add_their_gradients_where_they_meet() -> None:
    """Gradients of one backward call are summed by autograd before the hook sees them."""
    model, x = chain(), inputs()
    capture, seen = watch(model)
    outputs = model(x)
    (outputs.sum() + outputs.square().sum()).backward()
    grad = seen["2"][0][0].grad
    assert grad is not None
    assert_close(grad, 1 + 2 * outputs)
    capture.remove()


def test_forward_passes_without_gradients_are_not_measured() -> None:
    model, x = chain(), inputs()
    capture, seen = watch(model)
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    assert capture.passes == 0
    assert capture.batch_size is None
    model.eval()
    with torch.no_grad():
        model(torch.cat([x, x]))
    model.train()
    model(x).sum().backward()
    assert times(seen) == [1, 1]
    assert capture.batch_size == 5
    capture.remove()


def test_an_evaluation_between_forward_and_backward_changes_nothing() -> None:
    model, x = chain(), inputs()
    capture, seen = watch(model)
    outputs = model(x)
    with torch.no_grad():
        model(torch.zeros(9, 3))
    outputs.sum().backward()
    assert times(seen) == [1, 1]
    assert capture.batch_size == 5
    assert len(seen["0"][0]) == 1
    capture.remove()


def test_steps_that_do_not_measure_hook_no_tensor() -> None:
    model = chain()
    capture, seen = watch(model, active=False)
    hooked: list[int] = []
    model[0].register_forward_hook(lambda module, args, output: hooked.append(len(output._backward_hooks or {})))
    model(inputs()).sum().backward()
    assert hooked == [0]
    assert times(seen) == [0, 0]
    capture.active = True
    model(inputs()).sum().backward()
    assert hooked == [0, 1]
    assert times(seen) == [1, 1]
    capture.remove()


def test_remove_leaves_the_model_clean() -> None:
    model = chain()
    capture, seen = watch(model)
    capture.remove()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
        assert not module._backward_pre_hooks
        assert not module._forward_hooks_with_kwargs
        assert not module._forward_pre_hooks_with_kwargs
    model(inputs()).sum().backward()
    assert times(seen) == [0, 0]


def test_uses_whose_gradients_never_come_are_forgotten_at_reset() -> None:
    model = chain()
    capture, seen = watch(model)
    model(inputs())
    capture.reset()
    model(inputs()).sum().backward()
    assert [len(calls) for found in seen.values() for calls in found] == [1, 1]
    capture.remove()


def test_a_graph_that_is_dropped_takes_its_activations_along() -> None:
    """A validation loss without no_grad, on a step that measures: nothing of it is left, and nothing of it measured."""
    model = chain()
    capture, seen = watch(model)
    kept: list[StorageWeakRef] = []
    model[1].register_forward_hook(lambda module, args, output: kept.append(StorageWeakRef(output.untyped_storage())))
    validation = model(inputs()).square().sum()
    assert not kept[0].expired()
    del validation
    assert kept[0].expired()
    model(inputs()).sum().backward()
    assert times(seen) == [1, 1]  # in backward, without waiting for what will not come
    assert [len(calls) for found in seen.values() for calls in found] == [1, 1]
    assert capture.passes_back == {2}
    capture.remove()


def test_a_use_that_has_its_gradient_outlives_its_graph() -> None:
    """Two calls of one layer in one pass, whose graphs go at different times."""
    model = nn.Linear(3, 2)
    capture, seen = watch(nn.Sequential(model))
    first, second = model(inputs()), model(2 * inputs())
    first.sum().backward()
    del first
    second.sum().backward()
    assert [len(calls) for calls in seen["0"]] == [2]
    capture.remove()


def test_flush_measures_the_uses_that_did_get_a_gradient() -> None:
    """A head whose second output no loss reads."""

    class TwoUses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.shared(x), self.shared(2 * x)

    capture, seen = watch(model := TwoUses())
    first, _ = model(inputs())
    first.sum().backward()
    assert times(seen) == [0]
    capture.flush()
    assert times(seen) == [1]
    (call,) = seen["shared"][0]
    assert torch.equal(call.inputs, inputs())
    capture.flush()
    assert times(seen) == [1]
    capture.remove()


def test_a_use_that_no_loss_reads_does_not_mix_micro_batches() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.shared, self.head = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(self.shared(x)), self.shared(x + 1)

    x, labels = inputs(), torch.tensor([0, 1, 1, 0, 1])

    def at(*sizes: int) -> dict[str, Tensor]:
        kfac, first = build_kfac(model := Unread()), 0
        for part, label in zip(x.split(sizes), labels.split(sizes), strict=True):
            kfac.micro_batch(first_sample=first, divisor=5, last=first + len(part) == 5)
            (F.cross_entropy(model(part)[0], label, reduction="sum") / 5).backward()
            first += len(part)
        kfac.step()
        kfac.remove()
        return factors(kfac)

    whole = at(5)
    for name, value in at(2, 2, 1).items():
        assert_close(value, whole[name])


def test_keyword_inputs() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, *, flag: bool, scale: Tensor, x: Tensor) -> Tensor:
            return scale * self.layer(input=x) if flag else x

    capture, seen = watch(model := Keywords())
    model(flag=True, scale=torch.tensor(2.0), x=inputs()).sum().backward()
    assert times(seen) == [1]
    assert capture.batch_size == 5
    capture.remove()


def test_a_layer_that_returns_no_tensor_is_named() -> None:
    class WithExtra(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return super().forward(x), None

    model = nn.Sequential(WithExtra(3, 2))
    found = find_blocks(model, CurvatureConfig())
    assert not found.blocks
    assert found.uncovered["0.weight"] == "WithExtra.forward computes something else than nn.Linear"
    blocks = (LinearBlock("0", model[0], Sharing.EXPAND),)
    capture = Capture(model, blocks, lambda block, calls: None, own_backward=False)
    capture.active = True
    with pytest.raises(ModelError, match=r"layer 0: WithExtra returns tuple, not a tensor; .*exclude"):
        model(inputs())
    capture.remove()


def test_frozen_part_that_needs_no_gradient_is_left_alone() -> None:
    model = chain()
    capture, seen = watch(model)
    model[0].requires_grad_(False)
    model(inputs()).sum().backward()
    assert times(seen) == [0, 1]
    capture.remove()


# ---- activation checkpointing: layers run twice, and count once


@pytest.mark.parametrize("fisher", ["empirical", "type2"])
def test_gradients_of_the_user_are_untouched_by_measuring(fisher: str) -> None:
    model, x, labels = chain(), inputs(), torch.tensor([0, 1, 1, 0, 1])
    F.cross_entropy(model(x), labels).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    kfac = build_kfac(model, fisher=fisher, likelihood="categorical")
    outputs = model(x)
    kfac.fisher_backward(outputs)
    assert all(p.grad is None for p in model.parameters())
    F.cross_entropy(outputs, labels).backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, grad)
    kfac.step()
    assert factors(kfac)
    kfac.remove()


def test_measured_layers_let_go_of_their_activations_during_backward() -> None:
    model, alive = chain(), []
    kfac = build_kfac(model)
    model[2].register_forward_pre_hook(lambda module, args: alive.append(StorageWeakRef(args[0].untyped_storage())))
    model(inputs()).square().sum().backward()
    assert [held.expired() for held in alive] == [True]
    kfac.remove()


class Overwrites(nn.Module):
    """Writes into a layer's input when the layer has run."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer = nn.Linear(3, 3), nn.Linear(3, 2)
        self.enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        hidden = 2.0 * self.first(x).float()
        out = self.layer(hidden).float()
        return out + (hidden.mul_(3.0) if self.enabled else hidden * 3.0).sum(-1, keepdim=True)


def test_inputs_overwritten_under_autocast_are_what_autograd_kept() -> None:
    def run(enabled: bool) -> dict[str, Tensor]:
        kfac = build_kfac(model := Overwrites(enabled))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(inputs()).square().mean()
        loss.backward()
        kfac.step()
        kfac.remove()
        return factors(kfac)

    clean = run(False)
    for name, value in run(True).items():
        assert_close(value, clean[name])


class OnACopy(nn.Linear):
    """Autograd keeps the copy, and doesn't notice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clone())


@pytest.mark.parametrize("layer_type", [nn.Linear, OnACopy, nn.LayerNorm])
def test_overwritten_inputs_are_refused_never_measured(layer_type: type[nn.Module]) -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer_type(3) if layer_type is nn.LayerNorm else layer_type(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = 1.0 * x
            out = self.layer(x)
            x += out.detach()
            return out

    kfac = build_kfac(model := Overwrites())
    with pytest.raises(ModelError, match=r"the input of layer layer was modified in place"):
        model(inputs()).sum().backward()
    kfac.remove()
