"""The arbiter: what hooks captured must make the gradient, or the layer keeps its plain one and is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kfac_dist import KFAC
from kfac_dist.errors import ModelError
from tests.curvature.measured import assert_close, build_kfac
from tests.harness import run_ranks
from tests.preconditioner.hand_models import (
    CLASSES,
    CONFIG,
    FEATURES,
    ByHand,
    batch,
    excluded,
    train,
)


class TiedByHand(nn.Module):
    """Logits by hand from the table of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.middle = nn.Embedding(CLASSES, FEATURES), nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[:, 0] > 0).long()
        return F.linear(self.middle(self.first(tokens)), self.first.weight)


class HookedBefore(ByHand):
    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_hook(lambda module, args, output: output * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(self.first(x).tanh())[:, :CLASSES]


class HookedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.middle = nn.Conv1d(1, 2, 2), nn.Linear(2 * (FEATURES - 1), CLASSES)
        self.first.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        self.first.register_forward_hook(lambda module, args, output: 3 * output)

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(self.first(x[:, None]).flatten(1))


class GradientHook(ByHand):
    def __init__(self) -> None:
        super().__init__()
        self.first.weight.register_hook(lambda grad: grad + 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(self.first(x).tanh())[:, :CLASSES]


class Frozen(HookedBefore):
    """No fault: a right model, with one layer that isn't trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first._forward_hooks.clear()
        self.first.requires_grad_(False)


WRONG: dict[str, tuple[type[nn.Module], str]] = {
    "used by hand": (ByHand, "by hand"),
    "tied by hand": (TiedByHand, "by hand"),
    "hooked before": (HookedBefore, "forward hook on it"),
    "hooked convolution": (HookedConvolution, "forward hook on it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_layer_that_is_not_what_it_looks_like_is_as_if_it_were_excluded(name: str) -> None:
    kind, cause = WRONG[name]
    found, kfac, said = train(kind(), CONFIG)
    expected, _, _ = train(kind(), excluded(CONFIG, "first"))
    for key, value in found.items():
        assert_close(value, expected[key])
    assert [block.name for block in kfac.coverage.blocks] == ["middle"]
    assert cause in kfac.coverage.uncovered["first.weight"]
    [message] = [text for text in said if "first" in text]
    assert cause in message
    kfac.remove()


def by_ranks(name: str, sharded: bool) -> tuple[dict[str, Tensor], list[str], list[str]]:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def wrap(model: nn.Module) -> nn.Module:
        return fully_shard(model) if sharded else DistributedDataParallel(model)

    found, kfac, said = train(WRONG[name][0](), CONFIG, rank=rank, size=size, wrap=wrap)
    kfac.remove()
    return found, [block.name for block in kfac.coverage.blocks], said


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_agree_on_it(sharded: bool) -> None:
    for name in ("used by hand", "tied by hand", "hooked before"):
        expected, _, _ = train(WRONG[name][0](), excluded(CONFIG, "first"))
        for found, blocks, said in run_ranks(2, by_ranks, name, sharded):
            assert blocks == ["middle"]
            assert len([text for text in said if "plain gradient" in text]) == 1
            for key, value in found.items():
                assert_close(value, expected[key], 1e-4)


def test_a_state_saved_without_a_layer_loads_and_leaves_it_out() -> None:
    _, kfac, _ = train(ByHand(), CONFIG, steps=4)
    model = ByHand()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    kfac.load_state_dict(kfac.state_dict())  # the same one takes it, too
    again = KFAC(model, CONFIG, optimizer=optimizer)
    again.load_state_dict(kfac.state_dict())
    assert again.steps == 4
    assert [block.name for block in again.coverage.blocks] == ["middle"]
    assert again.coverage.mismatched == kfac.coverage.mismatched
    assert again.coverage.uncovered == kfac.coverage.uncovered
    before, after = kfac.state_dict(), again.state_dict()
    assert before["units"].keys() == after["units"].keys()
    assert all(torch.equal(entry["sum"], after["units"][name]["sum"]) for name, entry in before["units"].items())
    assert before["mismatched"].keys() == after["mismatched"].keys() == {"first"}
    kfac.remove()
    again.remove()


class OneRankOnly(ByHand):
    """Rank 1 alone uses a weight by hand."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.middle(self.first(x).tanh())[:, :CLASSES]
        if torch.distributed.get_rank() == 1:
            out = out + F.linear(x, self.first.weight)
        return out


def on_one_rank() -> tuple[list[str], list[str]]:
    model = DistributedDataParallel(OneRankOnly())
    _, kfac, said = train(model.module, CONFIG, rank=torch.distributed.get_rank(), size=2, wrap=lambda _: model)
    kfac.remove()
    return [block.name for block in kfac.coverage.blocks], said


def test_one_rank_that_finds_a_block_wrong_is_enough() -> None:
    for blocks, said in run_ranks(2, on_one_rank):
        assert blocks == ["middle"]
        assert len([text for text in said if "by hand" in text]) == 1


def test_an_error_stops_training_if_that_is_asked_for() -> None:
    config = {**CONFIG, "curvature": {"factor_every": 1, "on_mismatch": "error"}}
    with pytest.raises(ModelError, match=r"first: what its hooks captured misses its gradient by .*by hand"):
        train(ByHand(), config)


def test_a_model_without_any_right_layer_trains_on_plainly() -> None:
    """The loss of a derivative: every layer's gradient comes by two ways."""
    x = batch()[0].requires_grad_()

    def derivative(model: nn.Module) -> Tensor:
        u = model(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (du.sum(1) - 1).square().mean() + u.square().mean()

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    kfac = build_kfac(model, on_mismatch="plain")
    derivative(model).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.warns(UserWarning, match=r"(?s)0: .*derivatives of the model's outputs.*2: .*4: "):
        kfac.step()
    for parameter, plain in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, plain)
    assert not kfac.coverage.blocks
    model.zero_grad()
    derivative(model).backward()
    kfac.step()
    assert kfac.steps == 2
    kfac.remove()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fisher", ["empirical", "mc", "type2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_models_pass(fisher: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(1, 4, 2, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(20), nn.Linear(20, 3)
    )
    kfac = build_kfac(model, fisher=fisher, likelihood="categorical")
    x, labels = batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        outputs = model(x[:, None])
        kfac.fisher_backward(outputs)
        F.cross_entropy(outputs, labels).backward()
    kfac.step()
    assert len(kfac.coverage.blocks) == 4
    assert kfac._parts.measurement.judged == {"0", "1", "4", "5"}
    kfac.remove()


@pytest.mark.filterwarnings("error")
def test_gradients_that_a_loop_changes_before_the_step_are_no_mismatch() -> None:
    """The arbiter looks at what arrives at the weight, before anything clips or averages it."""
    model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    kfac = build_kfac(model)
    x, labels = batch()
    F.cross_entropy(model(x), labels).backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-2)
    kfac.step()
    assert len(kfac.coverage.blocks) == 2
    kfac.remove()


@pytest.mark.parametrize("later", [False, True])
def test_a_hook_that_changes_the_weights_gradient_is_the_loops_own(later: bool) -> None:
    """A hook that the loop put on a weight, such as one that clips, changes the gradient, not what makes it."""
    model = GradientHook()
    kfac = build_kfac(model)
    if later:
        model.first.weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    x, labels = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(model(x), labels).backward()
        assert model.first.weight.grad is not None
        assert float(model.first.weight.grad.max()) == (pytest.approx(0.01) if later else pytest.approx(1.0, abs=0.9))
        kfac.step()
    assert [block.name for block in kfac.coverage.blocks] == ["first", "middle"]
    kfac.remove()
    assert len(model.first.weight._backward_hooks or ()) == 1 + later  # K-FAC's own are gone


def look_at_a_bias(model: nn.Module, loss: Callable[[], Tensor], kfac: KFAC) -> None:
    torch.autograd.grad(loss(), [model[2].bias])  # type: ignore[index]
    loss().backward()


def ask_first(model: nn.Module, loss: Callable[[], Tensor], kfac: KFAC) -> None:
    value = loss()
    torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    value.backward()


def weights_only(model: nn.Module, loss: Callable[[], Tensor], kfac: KFAC) -> None:
    loss().backward(inputs=[model[0].weight, model[2].weight])  # type: ignore[index]


def penalise_aside(model: nn.Module, loss: Callable[[], Tensor], kfac: KFAC) -> None:
    loss().backward()
    with kfac.unobserved():
        sum((p.square().sum() for p in model.parameters()), torch.zeros(())).backward()


@pytest.mark.parametrize("send_back", [look_at_a_bias, ask_first, weights_only, penalise_aside])
def test_gradients_that_are_asked_for_beside_the_loss_are_no_mismatch(
    send_back: Callable[[nn.Module, Callable[[], Tensor], KFAC], None],
) -> None:
    """Nor do they enter the statistics."""
    statistics = []
    x, labels = batch()
    for go in (send_back, lambda model, loss, kfac: loss().backward()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))
        kfac = build_kfac(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            go(model, lambda model=model: F.cross_entropy(model(x), labels), kfac)  # type: ignore[misc]
            kfac.step()
        assert len(kfac.coverage.blocks) == 2
        statistics.append({name: entry["sum"] for name, entry in kfac.state_dict()["units"].items()})
        kfac.remove()
    for name, value in statistics[1].items():
        assert_close(statistics[0][name], value)


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "squares": lambda p: 0.3 * p.square().sum(),
    "absolutes": lambda p: 0.1 * p.abs().sum(),
    "both": lambda p: 0.1 * p.abs().sum() + 0.7 * p.square().sum(),
    "norm": lambda p: 2.0 * p.norm(),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_on_weights_that_is_part_of_the_loss_is_no_mismatch(name: str) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    kfac = build_kfac(model)
    x, labels = batch()
    (F.cross_entropy(model(x), labels) + sum(PENALTIES[name](p) for p in model.parameters())).backward()
    kfac.step()
    assert kfac._parts.measurement.judged == {"0", "2"}
    kfac.remove()


def test_another_penalty_is_named_as_a_cause() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    kfac = build_kfac(model)
    x, labels = batch()
    (F.cross_entropy(model(x), labels) + sum(p.pow(4).sum() for p in model.parameters())).backward()
    with pytest.warns(UserWarning, match=r"a penalty on it that is neither .*kfac.unobserved"):
        kfac.step()
    kfac.remove()


def test_tensors_in_place_of_the_parameters_are_named_as_a_cause() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    kfac = build_kfac(model)
    halves = {name: parameter * 0.5 for name, parameter in model.named_parameters()}
    torch.func.functional_call(model, halves, (torch.randn(8, 4),)).square().mean().backward()
    with pytest.warns(UserWarning, match="functional_call"):
        kfac.step()
    assert set(kfac.coverage.mismatched) == {"0", "2"}


def test_a_gradient_asked_for_inside_of_unobserved_is_named_as_a_cause() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    kfac = build_kfac(model)
    inputs = torch.randn(8, 4, requires_grad=True)
    outputs = model(inputs)
    with kfac.unobserved():
        (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    (outputs.square().mean() + slope.square().mean()).backward()
    with pytest.warns(UserWarning, match="create_graph=True"):
        kfac.step()
    assert kfac.coverage.mismatched


@pytest.mark.parametrize("whole", [True, False])
def test_a_penalty_built_inside_of_unobserved_is_named_as_a_cause(whole: bool) -> None:
    """Its gradient comes with the loss's, or to a layer that the loss itself doesn't call."""
    x, y = batch()
    model = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    kfac = build_kfac(model)
    with kfac.unobserved():
        penalty = model(x + 0.1).square().mean() if whole else model[2](torch.ones(2, 6)).square().mean()
    (F.cross_entropy(model(x), y) + penalty).backward()
    with pytest.warns(UserWarning, match=r"also called inside of kfac.unobserved\(\), and the gradient of that call"):
        kfac.step()
    assert set(kfac.coverage.mismatched) == ({"0", "2"} if whole else {"2"})
    kfac.remove()
    kfac = build_kfac(model)
    with kfac.unobserved():
        model(x + 0.1).square().mean().backward()
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(model(x), y).backward()
        kfac.step()
    kfac.remove()


@pytest.mark.parametrize("functional", [True, False])
def test_a_transform_of_the_model_in_the_loss_is_named_as_a_cause(functional: bool) -> None:
    x, y = batch()
    model = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    kfac = build_kfac(model)
    parameters = dict(model.named_parameters())
    slope = torch.func.grad(
        lambda value: (torch.func.functional_call(model, parameters, (value,)) if functional else model(value)).sum()
    )(x)
    (F.cross_entropy(model(x), y) + slope.square().sum(-1).mean()).backward()
    with pytest.warns(UserWarning, match=r"a transform of torch.func \(grad, jvp, vmap\) was part of the loss"):
        kfac.step()
    assert kfac.coverage.mismatched
    kfac.remove()


def test_counters_go_on_without_a_layer() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    kfac = build_kfac(model)
    x, labels = batch()
    F.cross_entropy(model(x), labels).backward()
    kfac.step()
    parts = kfac._parts
    parts.refresh.failures, parts.refresh.raised = 2, 3
    parts.averages.dropped += 4
    parts.averages.not_finite += 5
    refreshes, inspector = parts.refresh.refreshes, parts.refresh.inspector
    kfac.solver_access.leave_out({"0": "a test"})
    now = kfac._parts
    assert now is not parts
    assert (now.refresh.refreshes, now.refresh.failures, now.refresh.raised) == (refreshes, 2, 3)
    assert refreshes == 1
    assert now.refresh.inspector is inspector
    assert int(now.averages.dropped) == 4
    assert now.averages.not_finite.tolist() == [5, 5]
    kfac.remove()


def test_a_frozen_layer_is_no_mismatch() -> None:
    _, kfac, said = train(Frozen(), CONFIG)
    assert [block.name for block in kfac.coverage.blocks] == ["middle"]
    assert kfac.coverage.uncovered["first.weight"] == "frozen"
    assert not said
    kfac.remove()
