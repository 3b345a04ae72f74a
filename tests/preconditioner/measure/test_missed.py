"""Layers that some samples, micro-batches or ranks don't use: n counts all of them, and one batch gives one average."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_dist import KFAC
from tests.curvature.measured import assert_close, factors
from tests.harness import run_ranks
from tests.preconditioner.workloads import part, place

BATCH, WIDTH, CLASSES, EXPERTS, STEPS, DECAY = 12, 5, 3, 4, 7, 0.8
Factors = dict[str, Tensor]


class Experts(nn.Module):
    """Every sample goes to one of four experts, of two layers each: a linear one and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inp = nn.Linear(4, WIDTH)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)) for _ in range(EXPERTS)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        hidden = torch.tanh(self.inp(x))
        out = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            rows = (route == index).nonzero().squeeze(1)
            if len(rows):
                out = out.index_add(0, rows, expert(hidden[rows]))
        return self.head(hidden + out.tanh())


def batch_of(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Routes differ by step: an expert is used on all ranks, on some, or on none; the last expert never."""
    generator = torch.Generator().manual_seed(step)
    route = torch.randint(0, EXPERTS - 1, (BATCH,), generator=generator)
    route[: BATCH // 2] = step % (EXPERTS - 1)
    if step % 3 == 2:
        route = route.clamp(max=0)
    inputs = torch.randn(BATCH, 4, generator=generator)
    return inputs, route, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def configuration(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "curvature": {"factor_every": 1, "decay": DECAY},
        "inversion": {"inverse_every": 3, "early_refresh": 0, "damping": 0.1},
        "update": {"kl_clip": None},
    }
    return {key: {**config.get(key, {}), **changes.get(key, {})} for key in {*config, *changes}}


def run(config: dict[str, Any], *, micro_batches: int = 1, saved_at: int | None = None) -> tuple[Factors, Factors]:
    """Train a few steps; returns factors by unit and parameters.

    Args:
        config: Options.
        micro_batches: Parts of each rank's samples, with a backward pass each.
        saved_at: Step before which the statistics of each rank go into a new `KFAC`.
    """
    rank, size = place()
    model = Experts()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    kfac = KFAC(wrapped, config, optimizer=optimizer)
    for step in range(STEPS):
        if step == saved_at:
            own = {name: value.clone() for name, value in kfac.solver_access.local_statistics().items()}
            state = kfac.state_dict()
            kfac.remove()
            kfac = KFAC(wrapped, config, optimizer=optimizer)
            kfac.load_state_dict(state)
            kfac.solver_access.load_local_statistics(own)
        optimizer.zero_grad()
        inputs, route, labels = batch_of(step)
        own_rows = range(*part(rank, size).indices(BATCH))
        pieces = torch.tensor(own_rows).chunk(micro_batches)
        for index, rows in enumerate(pieces):
            last = index == len(pieces) - 1
            kfac.micro_batch(first_sample=int(rows[0]), divisor=BATCH / size, terms=len(rows), last=last)
            outputs = wrapped(inputs[rows], route[rows])
            kfac.fisher_backward(outputs)
            (F.cross_entropy(outputs, labels[rows], reduction="sum") * size / BATCH).backward()
        kfac.step()
        optimizer.step()
    units = kfac.state_dict()["units"]
    found = {
        name: entry["sum"].double().triu() / entry["scalars"][0] if entry["sum"].ndim > 2 else entry["sum"]
        for name, entry in units.items()
        if entry["scalars"][0] > 0
    }
    kfac.remove()
    return found, {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(found: Factors, wanted: Factors) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert float((value - wanted[name]).norm()) <= 2e-5 * float(wanted[name].norm()), name


MODES: dict[str, dict[str, Any]] = {
    "all_reduce": {},
    "scatter": {"distribution": {"reduction": "reduce_scatter"}},
    "every step": {"distribution": {"reduce_every": "step"}},
    "every step, scatter": {"distribution": {"reduce_every": "step", "reduction": "reduce_scatter"}},
    "turns": {
        "curvature": {"factor_every": 2, "stagger": 2},
        "inversion": {"inverse_every": 4, "stagger": 4},
    },
    "second moments": {"inversion": {"solver": "ekfac"}},
    "scattered second moments": {"inversion": {"solver": "ekfac"}, "distribution": {"reduction": "reduce_scatter"}},
    "drawn labels": {"curvature": {"fisher": "mc", "likelihood": "categorical"}},
    "columns": {"curvature": {"fisher": "type2", "likelihood": "categorical"}},
}


def run_all(
    names: list[str], saved_at: int | None = None, micro_batches: int = 1
) -> dict[str, tuple[Factors, Factors]]:
    return {name: run(configuration(**MODES[name]), saved_at=saved_at, micro_batches=micro_batches) for name in names}


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Factors, Factors]]:
    [found] = run_ranks(1, run_all, list(MODES), process_group=False, timeout=240)
    return found


SAVED = ["all_reduce", "scatter", "turns"]


@pytest.mark.parametrize(
    ("size", "names", "saved_at", "micro_batches"),
    [(2, list(MODES), None, 1), (2, list(MODES), None, 3), (1, list(MODES)[:3], None, 3), (2, SAVED, 5, 1)],
)
def test_ranks_and_micro_batches_that_skip_an_expert_leave_its_average(
    size: int, names: list[str], saved_at: int | None, micro_batches: int, alone: Any
) -> None:
    """Also when the run is saved and resumed between two reductions."""
    by_rank = run_ranks(size, run_all, names, saved_at, micro_batches, process_group=size > 1, timeout=240)
    for found in by_rank:
        for name, (averages, parameters) in found.items():
            assert_same(averages, alone[name][0])
            assert_same(parameters, alone[name][1])


def test_one_process_gives_the_mean_over_all_terms() -> None:
    """G of an expert by hand: the running average over the steps that used it, each divided by the whole batch."""
    model = Experts()
    kfac = KFAC(model, configuration(inversion={"inverse_every": 100}))
    total, weight = torch.zeros(WIDTH, WIDTH, dtype=torch.float64), 0.0
    for step in range(STEPS):
        inputs, route, labels = batch_of(step)
        seen: list[Tensor] = []
        handle = model.experts[1][0].register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        loss = F.cross_entropy(model(inputs, route), labels)
        handle.remove()
        grads = BATCH * torch.autograd.grad(loss, seen, retain_graph=True)[0].double() if seen else None
        total, weight = DECAY * total, DECAY * weight
        if grads is not None:
            total, weight = total + (1 - DECAY) * grads.mT @ grads, weight + (1 - DECAY) * BATCH
        model.zero_grad()
        loss.backward()
        kfac.step()
    entry = kfac.state_dict()["units"]["experts.1.0/G/0"]
    found = entry["sum"][0].double().triu() / float(entry["scalars"][0])
    assert float((found - (total / weight).triu()).norm() / (total / weight).triu().norm()) < 1e-5
    unused = kfac.state_dict()["units"][f"experts.{EXPERTS - 1}.0/G/0"]
    assert float(unused["scalars"][0]) == 0
    kfac.remove()


def collectives(route_for: str) -> dict[str, tuple[int, int]]:
    """What a refreshing step sends when every rank uses every expert, and when one doesn't."""
    rank, size = place()
    model = Experts()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    kfac = KFAC(wrapped, configuration(inversion={"inverse_every": 1}))
    route = torch.arange(BATCH) % EXPERTS
    if route_for == "some" and rank == 1:
        route = route.clamp(max=0)
    for _ in range(2):
        kfac.communicator.traffic.reset()
        F.cross_entropy(wrapped(torch.randn(BATCH, 4), route), torch.randint(0, CLASSES, (BATCH,))).backward()
        kfac.step()
    sent = kfac.communicator.traffic.snapshot()
    kfac.remove()
    assert size == dist.get_world_size()
    return sent


def both_collectives() -> tuple[int, int]:
    return collectives("all")["factors"][0], collectives("some")["factors"][0]


def test_only_a_layer_that_a_rank_left_unused_costs_a_message() -> None:
    for regular, irregular in run_ranks(2, both_collectives, timeout=240):
        assert irregular == regular + 1


class Attends(nn.Module):
    """Attention and an expert, to which only some samples of a rank go."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.expert, self.first, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, rows: int) -> Tensor:
        hidden = self.first(x).tanh()
        part = hidden[:rows]
        if rows:  # torch's own attention refuses a batch of none
            part = self.attention(part, part, part, need_weights=False)[0]
        return self.out(hidden.index_add(0, torch.arange(rows), self.expert(part)).mean(1))


def after_all(sharing: str, runs: dict[str, list[tuple[int, int]]]) -> dict[str, tuple[dict[str, Tensor], bool, float]]:
    """What each run of steps leaves: factors, whether gradients are finite, and how often statistics were dropped.

    Args:
        sharing: `curvature.sharing`.
        runs: By name, for every step the samples of each of two ranks that go to the layers; one rank takes the first.
    """
    return {name: after_steps(sharing, rows) for name, rows in runs.items()}


def after_steps(sharing: str, steps: list[tuple[int, int]]) -> tuple[dict[str, Tensor], bool, float]:
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model = Attends()
    config = {
        "curvature": {"factor_every": 1, "decay": 0.5, "sharing": sharing},
        "inversion": {"inverse_every": 1, "damping": 0.1},
        "update": {"kl_clip": None},
    }
    kfac = KFAC(model, config)
    x = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(2)).chunk(ranks)[rank]
    finite = True
    for rows in steps:
        model.zero_grad()
        (model(x, rows[rank]) - 0.3).square().sum(-1).mean().backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if ranks > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers that are idle at first
            kfac.step()
        finite &= all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    found, dropped = factors(kfac), kfac.metrics()["dropped_statistics"]
    kfac.remove()
    return found, finite, dropped


@pytest.mark.parametrize("sharing", ["reduce", "expand"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_attention_and_an_expert_without_rows_keep_their_averages(ranks: int, sharing: str) -> None:
    runs = {
        "used": [(3, 2)],
        "then unused": [(3, 2), (0, 0)],
        "first unused": [(0, 0), (3, 2)],
        "one": [(3, 0)],
        "one, then none": [(3, 0), (0, 0)],
    }
    for results in run_ranks(ranks, after_all, sharing, runs, process_group=ranks > 1):
        for found, finite, dropped in results.values():
            assert finite
            assert dropped == 0
            assert all(bool(factor.isfinite().all()) for factor in found.values())
        for name, wanted in (("then unused", "used"), ("first unused", "used"), ("one, then none", "one")):
            for unit, factor in results[wanted][0].items():
                if unit.startswith(("attention", "expert")) or unit == "first/A":
                    assert_close(results[name][0][unit], factor)


PIECES, CONDITIONAL = 6, {"classes": CLASSES}
BY_CLASS: dict[str, dict[str, Any]] = {
    "empirical": {},
    "mc": {"fisher": "mc", "likelihood": "categorical"},
    "type2": {"fisher": "type2", "likelihood": "categorical"},
}


def pieces_of(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Six pieces of two samples each, of which each goes to one expert: to the second in the first four at most."""
    generator = torch.Generator().manual_seed(step)
    routes = (torch.tensor([0, 1, 1, 0, 0, 0]) * (step != 2)).repeat_interleave(BATCH // PIECES)
    inputs = torch.randn(BATCH, 4, generator=generator)
    return inputs, routes, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def weights_by_class(fisher: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Weights of G by class, weights, and those of the second expert's G by hand: every term of steps that used it."""
    rank, size = place()
    model = Experts()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if size > 1 else model
    kfac = KFAC(wrapped, configuration(curvature={**BY_CLASS[fisher], "class_conditional": CONDITIONAL}))
    expected = torch.zeros(CLASSES)
    for step in range(4):
        inputs, route, labels = pieces_of(step)
        with torch.no_grad(), kfac.unobserved():
            shares = model(inputs, route).softmax(-1)
        if fisher == "empirical":
            shares = F.one_hot(labels, CLASSES).float()
        expected = DECAY * expected + (1 - DECAY) * shares.sum(0) * (step != 2)
        model.zero_grad()
        rows = torch.arange(BATCH)[part(rank, size)].chunk(PIECES // size)
        for index, own in enumerate(rows):
            labelled = {"classes": labels[own]} if fisher == "empirical" else {}
            last = index == len(rows) - 1
            kfac.micro_batch(first_sample=int(own[0]), divisor=BATCH / size, terms=len(own), last=last, **labelled)
            outputs = wrapped(inputs[own], route[own])
            kfac.fisher_backward(outputs)
            (F.cross_entropy(outputs, labels[own], reduction="sum") * size / BATCH).backward()
        kfac.step()
    state = kfac.state_dict()
    kfac.remove()
    scalars = {name: entry["scalars"] * state["shares"] for name, entry in state["units"].items()}
    return {name: own[2:] for name, own in scalars.items()}, {name: own[0] for name, own in scalars.items()}, expected


def all_by_class() -> dict[str, Any]:
    return {fisher: weights_by_class(fisher) for fisher in BY_CLASS}


def test_terms_that_an_expert_misses_count_by_class() -> None:
    """Also where K-FAC draws the labels, or sends a column back for each class."""
    alone = all_by_class()
    for fisher, (by_class, weights, expected) in alone.items():
        found = by_class["experts.1.0/G/0"]
        if fisher != "mc":
            assert_close(found, expected)
        assert_close(found.sum(), expected.sum())
        assert_close(weights["experts.1.0/G/0"], expected.sum())
        assert_close(by_class["head/G/0"].sum(), weights["head/G/0"])
    for found_on in run_ranks(2, all_by_class, timeout=240):
        for fisher, (by_class, weights, _) in found_on.items():
            for name, values in alone[fisher][0].items():
                assert_close(by_class[name], values)
                assert_close(weights[name], alone[fisher][1][name])
