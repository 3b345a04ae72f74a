"""What the planner says a rank sends, inverts and keeps is what the real step counts: on torch's fake process group."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from kfac_dist import KFAC
from kfac_dist.config.schema import EngineConfig
from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.curvature.blocks import find_blocks
from kfac_dist.curvature.factors import Unit
from kfac_dist.planning.job import Model, PlannedRun, StepKind
from kfac_dist.planning.strategies import AXES, crossed, distributions
from kfac_dist.planning.traffic import record_traffic
from kfac_dist.preconditioner.invert.refresh_schedule import RefreshSchedule
from tests.engines.fsdp2_runs import mesh_of, sharded
from tests.engines.live_bytes import bookkeeping, live_bytes
from tests.fake_ranks import fake_ranks
from tests.harness import run_ranks
from tests.planning.solved_units import solved_units

VOCABULARY = 11
CONFIG: dict[str, Any] = {
    "curvature": {"factor_every": 2},
    "inversion": {"inverse_every": 4, "damping": 0.1, "early_refresh": 0},
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"inversion": {"stagger": 2, "max_factor_dim": 4}},
    {"curvature": {"stagger": 2, "uncovered": "diagonal"}, "inversion": {"stagger": 4}},
    {"distribution": {"pack_triangles": True, "communication_dtype": "bfloat16", "buckets": 3}},
    {"inversion": {"solver": "eigen"}, "update": {"kl_clip": None}},
    {"inversion": {"solver": "ekfac"}},
    {"inversion": {"adapt": {"every": 2}}, "curvature": {"uncovered": "diagonal"}},
    {"update": {"graft": "gradient"}},
]


class Tiny(nn.Module):
    """One layer of each kind that is stored in another way, and a parameter that no block covers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.convolution = nn.Conv1d(6, 5, 3, padding=1)
        self.norm = nn.LayerNorm(5)
        self.linear = nn.Linear(5, 9)
        self.scale = nn.Parameter(torch.ones(9))
        self.head = nn.Linear(9, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.convolution(self.embedding(tokens).mT).mT
        hidden = torch.tanh(self.linear(self.norm(hidden))) * self.scale
        logits: torch.Tensor = self.head(hidden.mean(1))
        return logits


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in parts:
        for section, values in part.items():
            found[section] = {**found.get(section, {}), **values}
    return found


def counted(
    config: dict[str, Any], rank: int, size: int, steps: int
) -> tuple[list[dict[str, tuple[int, int]]], list[list[Unit]], KFAC]:
    """What the real `KFAC.step` counts and solves on one rank, step by step."""
    torch.manual_seed(0)
    network = Tiny()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    kfac = KFAC(network, copy.deepcopy(config), optimizer=optimizer)
    sent, solved = [], []
    for _ in range(steps):
        kfac.communicator.traffic.reset()
        network(torch.randint(0, VOCABULARY, (3, 7))).square().mean().backward()
        with solved_units() as units:
            kfac.step()
        network.zero_grad()
        sent.append(kfac.communicator.traffic.snapshot())
        solved.append(units)
    return sent, solved, kfac


def planned(config: dict[str, Any], size: int, node_size: int) -> PlannedRun:
    with torch.device("meta"):
        network = Tiny()
    parsed = parse_kfac(config)
    coverage = find_blocks(network, parsed.curvature)
    return PlannedRun.of(Model(coverage.blocks, {"scale": 9}, {}), parsed, EngineConfig(), size, node_size)


@pytest.mark.parametrize(("size", "node_size"), [(8, 2), (64, 4)])
def test_every_strategy_sends_inverts_and_keeps_what_was_planned(
    size: int, node_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node_size))
    base = parse_kfac(CONFIG)
    with torch.device("meta"):
        blocks = find_blocks(Tiny(), base.curvature).blocks
    grid = distributions(base, world_size=size, node_size=node_size, sharded=False)
    placements = {strategy.config.distribution.placement for strategy in grid}
    assert placements == {"auto", "owner", "node", "hybrid"}
    grid += [strategy for axis in AXES for strategy in crossed(base, [grid[0], grid[-1]], axis, blocks)]
    configs = [strategy.config.model_dump(mode="json") for strategy in grid]
    configs += [merged(CONFIG, {"distribution": {"placement": "owner"}}, variant) for variant in VARIANTS if size == 8]
    configs += [merged(CONFIG, {"distribution": {"reduction": "reduce_scatter"}}, v) for v in VARIANTS if size == 8]
    for index, config in enumerate(configs):
        job = planned(config, size, node_size)
        agrees(config, job, job.busiest if index % 2 else (5 * index + 1) % size)


def agrees(config: dict[str, Any], job: PlannedRun, rank: int) -> None:
    size = job.world_size
    schedule = RefreshSchedule.of(job.config)
    window = schedule.inverse_every
    with fake_ranks(rank, size):
        sent, solved, kfac = counted(config, rank, size, 2 * window)
        assert kfac.monitor.plan.rows() == job.plan.rows()
        for step in range(window, 2 * window):
            kind = StepKind.at(schedule, step)
            assert record_traffic(job, kind, rank).traffic.snapshot() == sent[step], (config, rank, step)
            due = [unit for unit in job.owned.get(rank, ()) if job.plan.blocks[unit.block].slot in kind.slots]
            assert Counter(solved[step]) == Counter(due), (config, rank, step)
        load = sum(unit.cost for step in solved[window:] for unit in step)
        assert load == pytest.approx(job.plan.assignment.load()[rank]), (config, rank)
        assert live_bytes(kfac) - live_bytes(bookkeeping(kfac)) == job.memory[rank].total, (config, rank)
        kfac.remove()


def sharded_steps(size: int, ranks: list[int]) -> list[tuple[Any, Any]]:
    """What FSDP2's ranks count and what was planned for them, each the steps of a window and the bytes kept."""
    found: list[tuple[Any, Any]] = []
    for distribution in ({}, {"reduction": "reduce_scatter", "reduce_every": "step", "buckets": 2}):
        config = merged(CONFIG, {"distribution": distribution})
        parsed = parse_kfac(config)
        schedule = RefreshSchedule.of(parsed)
        window = range(schedule.inverse_every, 2 * schedule.inverse_every)
        with torch.device("meta"):
            blocks = find_blocks(plain(), parsed.curvature).blocks
        engine = EngineConfig.model_validate({"name": "fsdp2"})
        job = PlannedRun.of(Model(blocks, {}, {}), parsed, engine, size, size)
        for rank in ranks:
            with fake_ranks(rank, size):
                network = sharded(plain(), mesh_of((size,)))
                kfac = KFAC(network, config, optimizer=torch.optim.SGD(network.parameters(), lr=0.1))
                steps = []
                for _ in range(window.stop):
                    kfac.communicator.traffic.reset()
                    network(torch.randn(4, 7)).square().mean().backward()
                    kfac.step()
                    network.zero_grad()
                    steps.append(kfac.communicator.traffic.snapshot())
                kfac.remove()
            told = [record_traffic(job, StepKind.at(schedule, step), rank).traffic.snapshot() for step in window]
            found.append((steps[window.start :], told))
    return found


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def test_sharded_gradients_travel_as_planned() -> None:
    # In a process of its own: meshes of worlds that were never there stay in DTensor's caches.
    [found] = run_ranks(1, sharded_steps, 4, [0, 1, 3], process_group=False)
    assert len(found) == 6
    for real, told in found:
        assert real == told
    assert any("gradients" in step for step in found[0][0])
