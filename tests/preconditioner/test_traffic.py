"""What crosses the network: collectives don't grow with layers, bytes equal the formulas, overlap is real."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfac_dist import KFAC
from kfac_dist.distributed.communicators.traffic import all_reduce_bytes
from kfac_dist.distributed.movement import owner_buffer as segments
from kfac_dist.distributed.movement.owner_buffer import MOST_BROADCASTS
from kfac_dist.distributed.movement.packing import triangle_numel
from tests.fake_ranks import fake_ranks
from tests.harness import run_ranks
from tests.preconditioner.test_invariance import configuration
from tests.preconditioner.workloads import CLASSES, Run, deep

FLOAT = 4
PLACEMENTS = [
    {"placement": "replicated"},
    {"placement": "owner"},
    {"placement": "hybrid", "grad_worker_fraction": 0.5},
]


def start(model: nn.Module, **distribution: Any) -> tuple[nn.Module, KFAC]:
    config = {
        "curvature": {"factor_every": 2},
        "inversion": {"inverse_every": 4, "damping": 0.1, "early_refresh": 0},
        "distribution": distribution,
    }
    wrapped = DistributedDataParallel(model)
    return wrapped, KFAC(wrapped, config, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def step(model: nn.Module, kfac: KFAC) -> dict[str, tuple[int, int]]:
    """Take a step and return what it sent: label to (collectives, bytes)."""
    kfac.communicator.traffic.reset()
    model.zero_grad()
    inputs = torch.randn(4, 6)
    kfac.micro_batch(divisor=4.0)
    F.cross_entropy(model(inputs), torch.randint(0, CLASSES, (4,))).backward()
    kfac.step()
    return kfac.communicator.traffic.snapshot()


def counted(layers: int, distribution: dict[str, Any]) -> list[dict[str, tuple[int, int]]]:
    """What the steps 0 (measures and refreshes), 1 (ordinary) and 2 (measures) send."""
    model, kfac = start(deep(layers), **distribution)
    sent = [step(model, kfac) for _ in range(3)]
    kfac.remove()
    return sent


def counted_all(cases: list[tuple[int, dict[str, Any]]]) -> list[list[dict[str, tuple[int, int]]]]:
    return [counted(layers, distribution) for layers, distribution in cases]


@pytest.mark.parametrize("every", ["refresh", "step"])
@pytest.mark.parametrize("reduction", ["all_reduce", "reduce_scatter"])
def test_collectives_do_not_grow_with_layers(every: str, reduction: str) -> None:
    options = [{**placement, "reduction": reduction, "reduce_every": every} for placement in PLACEMENTS]
    cases = [(layers, option) for option in options for layers in (8, 40)]
    [few_and_many, *_] = run_ranks(4, counted_all, cases)
    for index, option in enumerate(options):
        few, many = few_and_many[2 * index], few_and_many[2 * index + 1]
        calls = [[{label: n for label, (n, _) in sent.items()} for sent in run] for run in (few, many)]
        assert calls[0] == calls[1], option
        assert sum(calls[0][1].values()) <= 1 + 4, option  # an ordinary step: the clip, and a broadcast a column


EVERY_KIND: dict[str, dict[str, Any]] = {
    "replicated": {"distribution": {"placement": "replicated"}},
    "owner": {"distribution": {"placement": "owner"}},
    "hybrid": {"distribution": {"placement": "hybrid", "grad_worker_fraction": 0.125}},
    "scattered, every step": {"distribution": {"reduction": "reduce_scatter", "reduce_every": "step"}},
    "staggered and late": {"inversion": {"stagger": 2, "inverse_lag": 1}},
    "second moments": {"inversion": {"solver": "ekfac"}, "distribution": {"placement": "owner"}},
    "scattered second moments": {"inversion": {"solver": "ekfac"}, "distribution": {"reduction": "reduce_scatter"}},
    "chain": {"inversion": {"solver": "eigen", "structure": "block_tridiagonal"}},
    "classes": {"curvature": {"class_conditional": {"classes": CLASSES}}},
    "grafted": {"update": {"graft": "gradient"}},
    "adapted": {"inversion": {"adapt": {}}},
}


def counted_on_fakes(config: dict[str, Any]) -> list[dict[str, int]]:
    """Collectives of eight steps, as one of many ranks whose messages go nowhere."""
    torch.manual_seed(0)
    model = deep(20)
    every = {"curvature": {"factor_every": 2}, "inversion": {"inverse_every": 4, "damping": 0.1, "early_refresh": 0}}
    merged = {key: {**every.get(key, {}), **config.get(key, {})} for key in (*every, "distribution", "update")}
    kfac = KFAC(model, merged, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    calls = []
    for _ in range(8):
        kfac.communicator.traffic.reset()
        labels = torch.randint(0, CLASSES, (4,))
        kfac.micro_batch(classes=labels)
        F.cross_entropy(model(torch.randn(4, 6)), labels).backward()
        kfac.step()
        model.zero_grad()
        calls.append({label: n for label, (n, _) in kfac.communicator.traffic.snapshot().items()})
    kfac.remove()
    return calls


def counted_at_sizes() -> dict[str, list[list[dict[str, int]]]]:
    found: dict[str, list[list[dict[str, int]]]] = {}
    for name, config in EVERY_KIND.items():
        for size in (64, 512, 2048):
            with fake_ranks(0, size):
                found.setdefault(name, []).append(counted_on_fakes(config))
    return found


def test_collectives_do_not_grow_with_ranks() -> None:
    [found] = run_ranks(1, counted_at_sizes, process_group=False)
    for name, (few, many, most) in found.items():
        assert few == many == most, name
        assert max(sum(calls.values()) for calls in most) <= 25, name
        assert min(sum(calls.values()) for calls in most) <= 3, name


WAYS = [
    configuration(inversion={"inverse_lag": 3}),  # in flight for some steps, and helped on
    configuration(inversion={"stagger": 2, "inverse_lag": 1}),
    configuration(placement="owner"),
    configuration("ekfac", reduction="reduce_scatter"),
]


def trained_both_ways() -> list[tuple[bool, bool, bool]]:
    """Whether broadcasts and scatter with all-gather give the same bits: parameters, and a checkpoint's."""
    found = []
    for config in WAYS:
        trained = []
        for most in (MOST_BROADCASTS, 0):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(segments, "MOST_BROADCASTS", most)
                run = Run("mlp", config)
                parameters = run.train(9)
                trained.append((parameters, run.kfac.state_dict()["units"], run.kfac.communicator.traffic.snapshot()))
                run.close()
        (few, few_units, few_sent), (many, many_units, many_sent) = trained
        same = all(torch.equal(few[name], many[name]) for name in few)
        states = all(
            torch.equal(few_units[name][key], many_units[name][key]) for name in few_units for key in few_units[name]
        )
        found.append((same, states, few_sent != many_sent))
    return found


def test_the_way_of_sharing_leaves_the_bits_alone() -> None:
    assert run_ranks(3, trained_both_ways) == [[(True, True, True)] * len(WAYS)] * 3


def test_factor_bytes_equal_the_formula() -> None:
    layers, size = 5, 3
    dims = [(7, 6)] * (layers - 1) + [(7, CLASSES)]
    triangles = sum(triangle_numel(a) + triangle_numel(g) for a, g in dims)
    squares = sum(a * a + g * g for a, g in dims)
    # Weights and traces of every unit, one vote, and whether a layer was left unused.
    scalars = all_reduce_bytes(FLOAT * (2 * 2 * layers + 2), size)
    cases: list[tuple[int, dict[str, Any]]] = [
        (layers, {"buckets": 1, "pack_triangles": pack, "reduction": reduction})
        for pack in (True, False)
        for reduction in ("all_reduce", "reduce_scatter")
    ]
    by_rank = run_ranks(size, counted_all, cases)
    sent = [[rank[case][0]["factors"][1] - scalars for rank in by_rank] for case in range(len(cases))]
    assert sent[0] == [all_reduce_bytes(FLOAT * triangles, size)] * size
    assert sum(sent[1]) == FLOAT * triangles * (size - 1)  # each rank sends what it doesn't own: half of all_reduce
    assert sent[2] == [all_reduce_bytes(FLOAT * squares, size)] * size
    assert sum(sent[3]) == FLOAT * squares * (size - 1)


def test_inverse_and_gradient_bytes_equal_the_formula() -> None:
    layers, size = 5, 4
    dims = [(7, 6)] * (layers - 1) + [(7, CLASSES)]
    squares = FLOAT * sum(a * a + g * g for a, g in dims)
    gradients = FLOAT * sum(a * g for a, g in dims)
    by_rank = run_ranks(size, counted_all, [(layers, placement) for placement in PLACEMENTS])

    def total(case: int, step: int, label: str) -> int:
        return sum(rank[case][step].get(label, (0, 0))[1] for rank in by_rank)

    # replicated: every inverse reaches the other three ranks, no gradient moves.
    assert (total(0, 0, "inverses"), total(0, 1, "gradients")) == (3 * squares, 0)
    # owner: no inverse moves, every gradient reaches the other three.
    assert (total(1, 0, "inverses"), total(1, 1, "gradients")) == (0, 3 * gradients)
    # two gradient workers: each inverse reaches the other one; each of them serves one other rank.
    assert (total(2, 0, "inverses"), total(2, 1, "gradients")) == (squares, 2 * gradients)


def overlapped() -> tuple[list[str], list[str]]:
    """Order of events in a refreshing step, with overlap and without."""
    orders = []
    for overlap in (True, False):
        events: list[str] = []
        model, kfac = start(deep(8), overlap=overlap, buckets=4)
        send = kfac.communicator.all_reduce

        def recorded(tensor: torch.Tensor, *, label: str, send: Any = send, events: list[str] = events) -> Any:
            events.append(label)
            return send(tensor, label=label)

        kfac.communicator.all_reduce = recorded  # type: ignore[method-assign]
        first = next(model.parameters())
        first.register_post_accumulate_grad_hook(lambda p, events=events: events.append("first layer's gradient"))
        step(model, kfac)
        kfac.remove()
        orders.append(events)
    return orders[0], orders[1]


def test_reduction_starts_during_backward() -> None:
    for on, off in run_ranks(2, overlapped):
        assert on.index("factors") < on.index("first layer's gradient") < len(on) - 1 - on[::-1].index("factors")
        assert off.index("first layer's gradient") < off.index("factors")


class Branches(nn.Module):
    """Two branches, of which every sample takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 5)
        self.right = nn.Linear(6, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, inputs: torch.Tensor, goes_left: torch.Tensor) -> torch.Tensor:
        hidden = inputs.new_zeros(len(inputs), 5)
        if goes_left.any():
            hidden[goes_left] = self.left(inputs[goes_left])
        if (~goes_left).any():
            hidden[~goes_left] = self.right(inputs[~goes_left])
        return self.head(torch.tanh(hidden))


def branches(overlap: bool) -> dict[str, torch.Tensor]:
    """Train where each rank runs one branch only; one rank alone runs both on the same global batch."""
    torch.manual_seed(2)
    model = Branches()
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {
        "curvature": {"factor_every": 1, "decay": 0.5},
        "inversion": {"inverse_every": 2, "damping": 0.1},
        "distribution": {"overlap": overlap},
    }
    kfac = KFAC(wrapped, config, optimizer=optimizer)
    generator = torch.Generator().manual_seed(5)
    for _ in range(6):
        inputs, labels = torch.randn(8, 6, generator=generator), torch.randint(0, CLASSES, (8,), generator=generator)
        goes_left = torch.arange(8) < 4
        own = slice(rank * 8 // size, (rank + 1) * 8 // size)
        optimizer.zero_grad()
        kfac.micro_batch(first_sample=own.start, divisor=8 / size)
        F.cross_entropy(wrapped(inputs[own], goes_left[own]), labels[own]).backward()
        kfac.step()
        optimizer.step()
    kfac.remove()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("overlap", [True, False])
def test_layers_that_not_every_rank_runs(overlap: bool) -> None:
    [alone] = run_ranks(1, branches, overlap, process_group=False)
    for parameters in run_ranks(2, branches, overlap):
        for name, value in parameters.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6, msg=name)
