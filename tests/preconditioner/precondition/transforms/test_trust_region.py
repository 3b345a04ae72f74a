"""The length of a step: grafted to a first-order method's, kept inside of a trust region that is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC
from kfac_dist.curvature import device_ops
from tests.curvature.waits import Waits
from tests.harness import run_ranks
from tests.preconditioner.test_invariance import TOLERANCE, configuration
from tests.preconditioner.workloads import Run, relative

LAYERS = ("0", "2", "4")


class Scaled(nn.Sequential):
    """Three layers and a gain that no block covers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        self.gain = nn.Parameter(torch.tensor([1.0, 0.9, 1.1]))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = super().forward(inputs)
        return outputs * self.gain


def _step(update: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """Gradients of one batch, what K-FAC makes of them, and its metrics."""
    torch.manual_seed(0)
    model = Scaled()
    kfac = KFAC(model, {"update": {"kl_clip": None, **update}}, optimizer=torch.optim.SGD(model.parameters(), lr=0.5))
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(20, 6, generator=generator), torch.randint(3, (20,), generator=generator)
    F.cross_entropy(model(inputs), labels).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    kfac.step()
    after = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    metrics = kfac.metrics()
    kfac.remove()
    return before, after, metrics


def _layer(values: dict[str, Tensor], layer: str) -> Tensor:
    return torch.cat([values[f"{layer}.weight"].flatten(), values[f"{layer}.bias"]])


def _length(gradient: Tensor, graft: str) -> float:
    return float((gradient if graft == "gradient" else gradient.sign()).norm())


@pytest.mark.parametrize("graft", ["gradient", "sign"])
def test_each_layer_keeps_its_direction_and_takes_the_other_length(graft: str) -> None:
    gradients, plain, _ = _step({})
    _, grafted, _ = _step({"graft": graft})
    for layer in LAYERS:
        direction, found = _layer(plain, layer), _layer(grafted, layer)
        assert float(F.cosine_similarity(direction, found, dim=0)) == pytest.approx(1, abs=1e-5)
        assert float(found.norm()) == pytest.approx(_length(_layer(gradients, layer), graft), rel=1e-4)
    uncovered = gradients["gain"]
    assert torch.equal(grafted["gain"], uncovered if graft == "gradient" else uncovered.sign())


def test_the_trust_region_holds_for_what_was_grafted() -> None:
    gradients, grafted, metrics = _step({"graft": "sign", "kl_clip": 1e-3})
    product = sum(float((_layer(gradients, layer) * _layer(grafted, layer)).sum()) for layer in LAYERS)
    assert metrics["kl_scale"] < 1
    # One ν is a factor of what was delivered, the other of the step's own divergence.
    assert 0.5**2 * product * metrics["kl_scale"] == pytest.approx(1e-3, rel=1e-4)
    assert metrics["predicted_kl"] == pytest.approx(0.5e-3, rel=1e-4)


@pytest.mark.parametrize("rates", [(0.2, 0.5), (torch.tensor(0.5), 0.2), (torch.tensor(0.2), torch.tensor(0.5))])
def test_the_trust_region_takes_the_largest_rate_and_waits_for_none(
    rates: tuple[float | Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(model, rates, strict=True)]
    kfac = KFAC(model, {"update": {"kl_clip": 1e-3, "kl_clip_lr": "current"}}, optimizer=torch.optim.SGD(groups))
    F.cross_entropy(model(torch.randn(8, 6)), torch.randint(3, (8,))).backward()
    kfac.solver_access.update_curvature()
    monkeypatch.setattr(device_ops, "free_to_read", lambda device: False)
    with Waits() as waits:
        found = kfac._parts.trust_region._lr()
    assert waits.found == []
    assert float(found) == 0.5
    kfac.remove()


def test_a_layer_without_a_gradient_stays() -> None:
    model = Scaled()
    kfac = KFAC(model, {"update": {"kl_clip": None, "graft": "sign"}})
    with torch.no_grad():
        model[4].weight.zero_()
    F.cross_entropy(model(torch.randn(8, 6)), torch.randint(3, (8,))).backward()
    kfac.step()
    assert model[0].weight.grad is not None
    assert not model[0].weight.grad.any()
    kfac.remove()


@pytest.mark.parametrize("kappa", [1e-4, 1e-3])
def test_the_predicted_divergence_is_the_real_one(kappa: float) -> None:
    """One sample and the exact Fisher of one layer: F̂ is F, and the step's KL divergence is what the clip allows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    config = {
        "curvature": {"fisher": "type2", "likelihood": "categorical"},
        "inversion": {"solver": "eigen", "damping": 1e-5},
        "update": {"kl_clip": kappa},
    }
    kfac = KFAC(model, config, optimizer=optimizer)
    sample, label = torch.randn(1, 6), torch.tensor([2])
    outputs = model(sample)
    kfac.fisher_backward(outputs)
    F.cross_entropy(outputs, label).backward()
    kfac.step()
    optimizer.step()
    before, after = (F.log_softmax(o.detach(), dim=-1) for o in (outputs, model(sample)))
    divergence = float((before.exp() * (before - after)).sum())
    metrics = kfac.metrics()
    assert metrics["kl_scale"] < 1
    assert metrics["predicted_kl"] == pytest.approx(kappa / 2, rel=1e-4)
    assert divergence == pytest.approx(kappa / 2, rel=0.05)
    kfac.remove()


def _with(update: dict[str, Any], **distribution: Any) -> tuple[str, dict[str, Any]]:
    return "mlp", {**configuration(**distribution), "update": update}


GRAFTED = [
    _with({"graft": "gradient"}),
    _with({"graft": "sign", "kl_clip": None}, placement="owner", reduction="reduce_scatter"),
    _with({"graft": "sign"}, placement="owner"),
]


def _train(cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Tensor]]:
    """With a small lr: steps as long as sign descent's at K-FAC's own would amplify roundings."""
    results = []
    for name, config in cases:
        run = Run(name, config, lr=0.01)
        results.append(run.train(20))
        run.close()
    return results


def test_three_ranks_graft_as_one_does() -> None:
    alone = run_ranks(1, _train, GRAFTED, process_group=False)[0]
    for results in run_ranks(3, _train, GRAFTED):
        assert max(relative(a, b) for a, b in zip(results, alone, strict=True)) <= TOLERANCE
