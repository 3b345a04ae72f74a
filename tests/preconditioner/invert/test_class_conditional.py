"""Class-conditional factors: nearer to the exact block, the same on any number of ranks, memory told beforehand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC
from kfac_dist.curvature.blocks import Block
from kfac_dist.curvature.factors import Side
from kfac_dist.errors import CheckpointError, ConfigError, ModelError
from kfac_dist.preconditioner.invert.class_conditional import combine
from tests.curvature.measured import assert_close, build_kfac, measure
from tests.curvature.test_exactness import ggn_block
from tests.harness import run_ranks
from tests.preconditioner.test_invariance import configuration
from tests.preconditioner.workloads import CLASSES, Run, relative

TOLERANCE = 1e-5
FOUR = {"class_conditional": {"classes": CLASSES}}
EMPTY = {"class_conditional": {"classes": CLASSES + 1}}  # a class of which nothing ever comes

CASES: list[tuple[str, dict[str, Any]]] = [
    ("mlp", configuration(curvature=FOUR)),
    ("mlp", configuration("eigen", curvature=EMPTY, inversion={"max_factor_dim": 5})),
    ("mlp", configuration(curvature=FOUR, reduction="reduce_scatter", placement="owner", reduce_every="step")),
    ("mlp", configuration(curvature=FOUR, reduction="reduce_scatter", pack_triangles=True)),
    ("mlp", configuration(curvature=FOUR, inversion={"stagger": 2, "inverse_lag": 1}, placement="owner")),
    ("mlp", configuration("newton_schulz", fisher="mc", curvature=FOUR, reduce_every="step")),
    ("mlp", configuration(fisher="type2", curvature=FOUR, reduction="reduce_scatter")),
    ("mlp", configuration(curvature={**FOUR, "sample_fraction": 0.5})),
    ("conv", configuration(curvature=FOUR, assignment="balanced")),
    ("token", configuration(curvature={**FOUR, "loss_terms": "token"}, reduction="reduce_scatter")),
    ("token", configuration(fisher="mc", curvature={**FOUR, "loss_terms": "token"})),
]


def train_all(cases: list[tuple[str, dict[str, Any]]]) -> list[tuple[dict[str, Tensor], dict[str, Any], int]]:
    found = []
    for name, config in cases:
        run = Run(name, config)
        parameters, state = run.train(8), run.kfac.state_dict()
        calls = run.kfac.communicator.traffic.calls["classes"]
        run.close()
        found.append((parameters, state, calls))
    return found


@pytest.fixture(scope="module")
def alone() -> list[tuple[dict[str, Tensor], dict[str, Any], int]]:
    return train_all(CASES)


def test_one_and_three_ranks_give_the_same_parameters(alone: Any) -> None:
    ranks = run_ranks(3, train_all, CASES, timeout=120)
    for index, (case, expected) in enumerate(zip(CASES, alone, strict=True)):
        for found in ranks:
            assert relative(found[index][0], expected[0]) < TOLERANCE, case
        assert expected[2] == 0
    refreshes = ranks[0][0][2]
    assert 0 < refreshes < 8  # one for each refresh, and two layers or twenty make no difference
    assert ranks[0][8][2] == refreshes


def test_it_isnt_plain_kfac(alone: Any) -> None:
    [(plain, _, _)] = train_all([("mlp", configuration())])
    assert relative(alone[0][0], plain) > 1e-3


def one_class(fisher: str, solver: str, curvature: dict[str, Any]) -> dict[str, Tensor]:
    """Train on data of which every sample is of class 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    config = {
        "curvature": {"fisher": fisher, "factor_every": 1, **curvature},
        "inversion": {"inverse_every": 2, "solver": solver},
    }
    kfac = KFAC(model, config, optimizer=optimizer)
    for _ in range(6):
        inputs = torch.randn(10, 5)
        kfac.micro_batch(classes=torch.zeros(10, dtype=torch.long))
        optimizer.zero_grad()
        (model(inputs).squeeze(1) - inputs.sum(1)).square().mean().div(2).backward()
        kfac.step()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("solver", ["cholesky", "eigen"])
def test_one_class_is_plain_kfac(solver: str) -> None:
    plain = one_class("empirical", solver, {})
    found = one_class("empirical", solver, {"class_conditional": {"classes": 1}})
    assert relative(found, plain) < (1e-4 if solver == "eigen" else TOLERANCE)  # small eigenvalues, small damping


def correlated(samples: int, width: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Samples whose features tell their class: each class has a direction and a scale of its own; uneven classes."""
    generator = torch.Generator().manual_seed(7)
    labels = (torch.rand(samples, generator=generator) ** 2 * classes).long()
    directions = torch.randn(classes, width, generator=generator)
    scales = torch.tensor([0.2, 1.0, 3.0])[:classes]
    noise = torch.randn(samples, width, generator=generator)
    return 2 * directions[labels] + noise * scales[labels, None], labels


def combined_blocks(kfac: KFAC) -> dict[str, Tensor]:
    """G ⊗ A of every block as a refresh would solve it."""
    units, averages = kfac.monitor.plan.units, kfac._parts.averages
    found = combine(units, units, averages, kfac._parts.reduction.totals, kfac.communicator)
    blocks = {}
    for name, block in kfac.monitor.plan.blocks.items():
        factors = {}
        for unit in block.units:
            sums = averages.sums(unit).double()
            whole = sums.triu() + sums.triu(1).mT
            coefficients = found[unit.name].coefficients
            factors[unit.side] = (whole.unflatten(0, coefficients.shape) * coefficients[..., None, None]).sum((0, 1))
        blocks[name] = torch.kron(factors[Side.G], factors[Side.A])
    return blocks


@pytest.mark.parametrize("fisher", ["empirical", "type2"])
def test_where_classes_correlate_with_features_it_is_nearer_to_the_enumerated_block(fisher: str) -> None:
    torch.manual_seed(0)
    inputs, labels = correlated(60)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(10):  # the model's own labels have nothing to do with its inputs before it has learned
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    exactly = copy.deepcopy(model)
    options: dict[str, Any] = {"fisher": fisher, "likelihood": "categorical"}
    plain = measure(model, inputs, lambda outputs: F.cross_entropy(outputs, labels), **options)
    kfac = build_kfac(model, **options, class_conditional={"classes": 3})
    kfac.micro_batch(classes=labels)
    measure(model, inputs, lambda outputs: F.cross_entropy(outputs, labels), kfac=kfac)
    blocks = combined_blocks(kfac)
    for block in kfac.coverage.blocks:
        exact = enumerated(exactly, inputs, labels, block, fisher)
        by_class = float((blocks[block.name] - exact).norm() / exact.norm())
        product = torch.kron(plain[f"{block.name}/G"][0], plain[f"{block.name}/A"][0])
        without = float((product - exact).norm() / exact.norm())
        assert by_class < 0.95 * without, (block.name, by_class, without)
    kfac.remove()


def enumerated(model: nn.Module, inputs: Tensor, labels: Tensor, block: Block, fisher: str) -> Tensor:
    """The exact block: a mean over samples, of gradients at the labels or of the expectation over them."""
    if fisher == "type2":
        return ggn_block(model.double(), inputs.double(), block, "categorical")
    rows = []
    for sample, label in zip(inputs, labels, strict=True):
        parameters = [model.get_parameter(name) for name in block.parameters]
        weight, bias = torch.autograd.grad(F.cross_entropy(model(sample[None]), label[None]), parameters)
        rows.append(torch.cat([weight, bias[:, None]], dim=1).flatten().double())
    j = torch.stack(rows)
    return j.mT @ j / len(j)


def test_sums_by_class_add_up_to_the_plain_ones_and_weights_are_counts() -> None:
    torch.manual_seed(0)
    inputs, labels = correlated(30)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    plain = measure(model, inputs, lambda outputs: F.cross_entropy(outputs, labels))
    kfac = build_kfac(model, class_conditional={"classes": 3})
    kfac.micro_batch(classes=labels)
    measure(model, inputs, lambda outputs: F.cross_entropy(outputs, labels), kfac=kfac)
    averages = kfac._parts.averages
    for unit in kfac.monitor.plan.units:
        index = averages.layout.index(unit)
        assert_close(averages.scalars[2:, index], labels.bincount(minlength=3))
        sums = averages.sums(unit).double().sum(0) / len(labels)
        assert_close(sums.triu(), plain[f"{unit.block}/{unit.side}"][0].triu())
    kfac.remove()


def resumed(state: dict[str, Any], config: dict[str, Any]) -> dict[str, Tensor]:
    run = Run("mlp", config)
    run.train(4)
    run.kfac.load_state_dict(state)
    found = run.train(6, first=4)
    run.close()
    return found


def saved(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    run = Run("mlp", config)
    run.train(4)
    state = run.kfac.state_dict()
    found = run.train(6, first=4)
    run.close()
    return state, found


def test_a_state_resumes_on_another_number_of_ranks() -> None:
    config = configuration(curvature=FOUR, reduction="reduce_scatter", placement="owner")
    state, expected = run_ranks(3, saved, config)[0]
    assert relative(resumed(state, config), expected) < TOLERANCE
    with pytest.raises(CheckpointError, match="is of 4 classes, this configuration's of 5"):
        resumed(state, configuration(curvature=EMPTY))
    with pytest.raises(CheckpointError, match="is of 4 classes, this configuration's of 0"):
        resumed(state, configuration())


def test_too_much_memory_is_refused_with_a_number_before_any_is_allocated() -> None:
    model = nn.Sequential(nn.Linear(8000, 8, device="meta"), nn.Linear(8, 500, device="meta"))
    # 500 classes of 8001² in two copies of fp32, of which nothing must ever be there.
    with pytest.raises(ConfigError) as refusal:
        KFAC(model, {"curvature": {"class_conditional": {"classes": 500}}, "update": {"kl_clip": None}})
    said = str(refusal.value)
    assert "statistics of 500 classes take 239 GiB on a rank, 0.479 GiB without classes; limit_gib is 4" in said
    assert "The largest layers are 0 (238 GiB), 1 (0.932 GiB)" in said
    assert "limit_gib to 240" in said
    assert "max_factor_dim: 2000" in said


def test_what_cant_be_kept_apart_is_refused_with_what_to_write_instead() -> None:
    model = nn.Linear(4, 3)
    update = {"kl_clip": None}
    for curvature, said in (
        ({"class_conditional": True}, "class_conditional.classes: missing"),
        ({"class_conditional": True, "fisher": "input_only"}, "has no G for A to go with"),
        (
            {"class_conditional": {"classes": 3}, "fisher": "mc", "likelihood": "gaussian"},
            "are classes only if kfac.curvature.likelihood is categorical, and it is gaussian",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            KFAC(model, {"curvature": curvature, "update": update})
    unlabelled = build_kfac(model, class_conditional={"classes": 3})
    with pytest.raises(ModelError, match=r"call kfac.micro_batch\(classes=labels\)"):
        measure(model, torch.randn(5, 4), lambda outputs: outputs.square().mean(), kfac=unlabelled)
    unlabelled.remove()
    other = build_kfac(model, class_conditional={"classes": 5}, fisher="mc", likelihood="categorical")
    with pytest.raises(ModelError, match="classes is 5, but the model has 3 outputs"):
        measure(model, torch.randn(5, 4), lambda outputs: outputs.square().mean(), kfac=other)
    other.remove()
