"""The arbiter: what hooks captured must make the gradient, or the layer keeps its plain one and is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from kfac_dist import KFAC
from kfac_dist.errors import ModelError, PlanMismatchError
from tests.curvature.measured import assert_close, build_kfac
from tests.harness import run_ranks

SAMPLES, FEATURES, CLASSES = 8, 4, 3


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SAMPLES, FEATURES, generator=generator), torch.randint(
        0, CLASSES, (SAMPLES,), generator=generator
    )


class ByHand(nn.Module):
    """A head that is the weight of the first layer, used by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.middle = nn.Linear(FEATURES, CLASSES, bias=False), nn.Linear(CLASSES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.middle(self.first(x).tanh()), self.first.weight)


class OnlyByHand(ByHand):
    """The layer is never called."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.middle(F.linear(x, self.first.weight).tanh()), self.first.weight)


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
CONFIG: dict[str, Any] = {
    "curvature": {"factor_every": 1},
    "inversion": {"inverse_every": 1, "damping": 0.1},
    "update": {"kl_clip": 1e-3},
}
Wrap = Callable[[nn.Module], nn.Module]


def train(
    model: nn.Module, config: dict[str, Any], steps: int = 3, rank: int = 0, size: int = 1, wrap: Wrap = lambda m: m
) -> tuple[dict[str, Tensor], KFAC, list[str]]:
    """Parameters after a few steps on this rank's part of the batch, and what was said."""
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    x, labels = batch()
    part = slice(rank * SAMPLES // size, (rank + 1) * SAMPLES // size)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kfac = KFAC(wrapped, config, optimizer=optimizer)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x[part]), labels[part]).backward()
            kfac.step()
            optimizer.step()
    found = {}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        found[name] = whole.detach().clone()
    return found, kfac, [str(warning.message) for warning in said]


def excluded(config: dict[str, Any], *layers: str) -> dict[str, Any]:
    return {**config, "curvature": {**config["curvature"], "exclude": layers}}


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


# ---- layers that are never called


class Unread(ByHand):
    def __init__(self, calls: bool = False) -> None:
        super().__init__()
        self.spare, self.calls = nn.Linear(FEATURES, CLASSES), calls

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.middle(self.first(x).tanh())[:, :CLASSES]
        return out + self.spare(x) if self.calls else out


def test_a_layer_that_is_only_used_by_hand_keeps_its_plain_gradient_and_is_named() -> None:
    found, kfac, [message] = train(OnlyByHand(), CONFIG)
    expected, _, _ = train(OnlyByHand(), excluded(CONFIG, "first"))
    for key, value in found.items():
        assert_close(value, expected[key])
    assert kfac.coverage.idle == ("first",)
    assert "first" in message
    assert "F.linear(x, layer.weight)" in message
    kfac.remove()


def test_a_layer_that_is_never_called_is_named_at_the_first_refresh() -> None:
    model = Unread()
    _, kfac, said = train(model, CONFIG)
    [message] = said
    assert "no backward pass has come through spare so far" in message
    assert kfac.coverage.idle == ("spare",)
    model.calls = True  # not for ever
    x, labels = batch()
    F.cross_entropy(model(x), labels).backward()
    plain = model.spare.weight.grad.clone()  # type: ignore[union-attr]
    kfac.step()
    assert kfac.coverage.idle == ()
    assert model.spare.weight.grad is not None
    assert not torch.allclose(model.spare.weight.grad, plain)
    kfac.remove()


def test_a_layer_that_was_idle_and_is_found_wrong_is_only_wrong() -> None:
    model = Unread()
    model.spare.register_forward_hook(lambda module, args, output: output * 0.1)
    _, kfac, _ = train(model, CONFIG)
    assert kfac.coverage.idle == ("spare",)
    model.calls = True
    x, labels = batch()
    F.cross_entropy(model(x), labels).backward()
    plain = model.spare.weight.grad.clone()  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is named
        kfac.step()
    assert kfac.coverage.idle == ()
    assert set(kfac.coverage.mismatched) == {"spare"}
    assert torch.equal(model.spare.weight.grad, plain)  # type: ignore[arg-type]
    kfac.remove()


# ---- models that change


def follow(change: Callable[[nn.Module], None]) -> tuple[KFAC, nn.Module, list[str], dict[str, Tensor]]:
    model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    model[2].requires_grad_(False)
    kfac = KFAC(model, {**CONFIG, "update": {"kl_clip": None}})
    x, labels = batch()
    before: dict[str, Tensor] = {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(3):
            if step == 1:
                before = {name: entry["scalars"].clone() for name, entry in kfac.state_dict()["units"].items()}
                change(model)
            model.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            kfac.step()
    return kfac, model, [str(warning.message) for warning in said], before


def unfreeze(model: nn.Module) -> None:
    model[2].requires_grad_(True)  # type: ignore[index]


def replace(model: nn.Module) -> None:
    model[4] = nn.Linear(5, CLASSES)  # type: ignore[operator]


def add(model: nn.Module) -> None:
    model.append(nn.Linear(CLASSES, CLASSES))  # type: ignore[operator]


def cut(model: nn.Module) -> None:
    prune.random_unstructured(model[4], "weight", amount=0.5)  # type: ignore[index]


def parametrize(model: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(model[4])  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "said_of", "blocks"),
    [
        (unfreeze, "unfrozen: 2.weight, 2.bias", ["0", "2", "4"]),
        (replace, "replaced: 4.weight, 4.bias", ["0", "4"]),
        (add, "new: 5.weight, 5.bias", ["0", "4", "5"]),
        (cut, "new: 4.weight_orig", ["0"]),
        (parametrize, "gone: 4.weight", ["0"]),
    ],
)
def test_a_changed_model_is_covered_anew(change: Callable[[nn.Module], None], said_of: str, blocks: list[str]) -> None:
    kfac, model, said, before = follow(change)
    assert [block.name for block in kfac.coverage.blocks] == blocks
    assert len([text for text in said if said_of in text]) == 1
    assert not [text for text in said if "no backward pass" in text], "none has been measured since"
    after = kfac.state_dict()["units"]
    # The layer that stays goes on with what it knew: a running average of three measurements, not of two.
    decay = kfac.solver_access.config.curvature.decay
    assert float(before["0/A/0"][0]) == pytest.approx(SAMPLES * (1 - decay))
    assert float(after["0/A/0"]["scalars"][0]) == pytest.approx(SAMPLES * (1 - decay**3), rel=1e-5)
    # Every layer's gradient is preconditioned, also that of parameters which were not there at first.
    model.zero_grad()
    x, labels = batch()
    F.cross_entropy(model(x), labels).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    kfac.step()
    now = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, value in plain.items():
        assert torch.allclose(value, now[name], rtol=1e-3) != (name.rpartition(".")[0] in blocks)
    kfac.remove()


def changed_on_ranks() -> tuple[list[str], int]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    model[0].requires_grad_(False)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    kfac = KFAC(wrapped, {**CONFIG, "update": {"kl_clip": None}, "inversion": {"inverse_every": 2, "damping": 0.1}})
    x, labels = batch()
    told = 0
    for step in range(5):
        if step == 1:
            model[0].requires_grad_(True)
        model.zero_grad()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            F.cross_entropy(wrapped(x), labels).backward()
            kfac.step()
        told += sum("unfrozen" in str(warning.message) for warning in said)
    kfac.remove()
    return [block.name for block in kfac.coverage.blocks], told


def looked_at_under_fsdp() -> tuple[list[str], float]:
    """Evaluate between backward and step, which leaves FSDP2's outermost module whole; then train another layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    model[0].requires_grad_(False)
    for layer in (model[0], model[2]):
        fully_shard(layer, reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=False)
    kfac = KFAC(model, {**CONFIG, "update": {"kl_clip": None}})
    x, labels = batch()
    said: list[str] = []
    moved = 0.0
    for step in range(4):
        if step == 2:
            model[0].requires_grad_(True)
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        plain = None if model[0].weight.grad is None else model[0].weight.grad.full_tensor()  # type: ignore[union-attr,operator]
        with torch.no_grad():
            model(x)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            kfac.step()
        said += [f"{step}: {warning.message}" for warning in warned]
        if plain is not None:
            model.reshard()  # type: ignore[operator]
            moved = float((model[0].weight.grad.full_tensor() - plain).norm() / plain.norm())  # type: ignore[union-attr,operator]
    kfac.remove()
    return said, moved


def test_parameters_that_fsdp_shows_whole_are_no_change() -> None:
    for said, moved in run_ranks(2, looked_at_under_fsdp):
        [message] = [text for text in said if "changed" in text]
        assert message.startswith("2: ")
        assert "(unfrozen: 0.weight, 0.bias): its layers are covered anew" in message
        assert moved > 0.1


def test_ranks_cover_a_changed_model_together() -> None:
    for blocks, told in run_ranks(2, changed_on_ranks):
        assert blocks == ["0", "2"]
        assert told >= 1


def changed_on_one_rank(changes: list[Callable[[nn.Module], None]]) -> list[tuple[int, str]]:
    """The step at which each change, made on rank 1 before step 1, stops this rank, and what it says."""
    return [stopped_by(change) for change in changes]


def stopped_by(change: Callable[[nn.Module], None]) -> tuple[int, str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    model[2].requires_grad_(False)
    kfac = KFAC(model, {**CONFIG, "update": {"kl_clip": None}, "inversion": {"inverse_every": 2, "early_refresh": 0}})
    x, labels = batch()
    for step in range(6):
        if step == 1 and dist.get_rank() == 1:
            change(model)
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                kfac.step()
            except PlanMismatchError as error:
                return step, str(error)
    kfac.remove()
    return -1, ""


def test_a_model_that_changes_on_one_rank_stops_every_rank() -> None:
    first, second = run_ranks(2, changed_on_one_rank, [unfreeze, add, cut], group_timeout=10.0)
    assert first == second
    for (step, said), block in zip(first, ["2", "5", "4"], strict=True):
        assert step == 2, "the next refresh, at which ranks agree"
        assert "the ranks plan different work" in said
        assert f": {block}: LinearBlock" in said
