"""Layers that are idle are named, and a model that changes is covered anew, on every rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from kfac_dist import KFAC
from kfac_dist.errors import PlanMismatchError
from tests.curvature.measured import assert_close
from tests.harness import run_ranks
from tests.preconditioner.hand_models import (
    CLASSES,
    CONFIG,
    FEATURES,
    SAMPLES,
    ByHand,
    OnlyByHand,
    batch,
    excluded,
    train,
)


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
