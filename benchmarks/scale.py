"""The real `KFAC.step` as one rank of many: what it sends, holds and inverts, and how long planning takes.

A rank alone counts whose collectives go nowhere (torch's fake process group): what the others would send it doesn't
matter for what it sends, holds and computes. Models have the shapes of ResNet-50, BERT-large and GPT-1.3B; of the two
transformers some layers stand for all, where memory forbids more, and the file says how many. The rank is the one with
the most to invert. Every case runs in a process of its own.

    python -m benchmarks.scale [--models resnet50 bert_large gpt_1.3b] [--ranks 8 64 512 4096] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.models import ResNet50
from benchmarks.reporting import RESULTS, write
from kfac_dist import KFAC
from kfac_dist.config.options import parse_kfac
from kfac_dist.curvature.blocks import find_blocks
from kfac_dist.preconditioner.memory import rank_bytes
from kfac_dist.preconditioner.plan import build_plan
from kfac_dist.tasks.bert import bert
from kfac_dist.tasks.byte_gpt import byte_gpt
from tests.engines.live_bytes import live_bytes

MOST_PLANNING = 300
"""Layers of the plan whose making is timed."""


@dataclass(frozen=True)
class Shape:
    """A model of which some layers are run, and one batch of its data."""

    build: Callable[[int], nn.Module]
    layers: int
    run: int
    batch: Callable[[], Tensor]
    config: dict[str, Any]


def next_tokens(width: int, vocabulary: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, vocabulary, (1, width))


SHAPES = {
    "resnet50": Shape(lambda layers: ResNet50(), 50, 50, lambda: torch.randn(2, 3, 64, 64), {}),
    "bert_large": Shape(
        lambda layers: bert(layers=layers, width=1024, heads=16, context=512, vocabulary=30522),
        24,
        2,
        next_tokens(32, 30522),
        {"curvature": {"exclude": ["head"]}},
    ),
    "gpt_1.3b": Shape(
        lambda layers: byte_gpt(layers=layers, width=2048, heads=16, context=2048, vocabulary=50304),
        24,
        1,
        next_tokens(32, 50304),
        {"curvature": {"exclude": ["head"]}},
    ),
}

STRATEGIES: dict[str, dict[str, Any]] = {
    "replicated": {"distribution": {"placement": "replicated"}},
    "replicated, balanced, blocks of 2048": {
        "inversion": {"max_factor_dim": 2048},
        "distribution": {"placement": "replicated", "assignment": "balanced", "pack_triangles": True},
    },
    "owner, balanced, blocks of 2048": {
        "inversion": {"max_factor_dim": 2048},
        "distribution": {"placement": "owner", "assignment": "balanced"},
    },
    "owner, reduce-scatter, every step": {
        "inversion": {"max_factor_dim": 2048},
        "distribution": {
            "placement": "owner",
            "assignment": "balanced",
            "reduction": "reduce_scatter",
            "reduce_every": "step",
        },
    },
}


def config_of(shape: Shape, strategy: str) -> dict[str, Any]:
    chosen = STRATEGIES[strategy]
    curvature = {"factor_every": 2} | shape.config.get("curvature", {})
    inversion = {"inverse_every": 2, "early_refresh": 0} | chosen.get("inversion", {})
    return {"curvature": curvature, "inversion": inversion, "distribution": chosen["distribution"]}


def one(model: str, strategy: str, size: int) -> dict[str, Any]:
    """Take one step that measures and refreshes, and one that does neither."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = SHAPES[model]
    config = config_of(shape, strategy)
    network = shape.build(shape.run)
    coverage = find_blocks(network, parse_kfac(config).curvature)
    load = build_plan(coverage.blocks, parse_kfac(config), world_size=size).assignment.load()
    rank = load.index(max(load))
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    started = time.perf_counter()
    kfac = KFAC(network, config, optimizer=optimizer)
    constructing = time.perf_counter() - started
    kfac.communicator.traffic.reset()
    steps = []
    for _ in range(2):
        network(shape.batch()).square().mean().backward()
        kfac.step()
        network.zero_grad()
        steps.append(kfac.communicator.traffic.snapshot())
        kfac.communicator.traffic.reset()
    planned = rank_bytes(kfac.plan, kfac.config, sharded=False)
    return {
        "model": model,
        "layers_run": shape.run,
        "layers": shape.layers,
        "strategy": strategy,
        "ranks": size,
        "rank": rank,
        "blocks": len(kfac.plan.blocks),
        "units": len(kfac.plan.units),
        "owned_units": len(kfac.plan.owned(rank)),
        "load_max_over_mean": kfac.plan.assignment.imbalance(),
        "refresh_step": {label: {"collectives": c, "bytes_sent": b} for label, (c, b) in steps[0].items()},
        "ordinary_step": {label: {"collectives": c, "bytes_sent": b} for label, (c, b) in steps[1].items()},
        "state_bytes": live_bytes(kfac),
        "planned_bytes": planned[rank].total,
        "construct_seconds": constructing,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def planning(size: int) -> dict[str, Any]:
    """Plan a model of many layers for many ranks; nothing is built but shapes."""
    with torch.device("meta"):
        # Four linear layers and two norms a block, and what is around them.
        network = byte_gpt(layers=MOST_PLANNING // 6, width=2048, heads=16, context=2048, vocabulary=50304)
    found = {}
    for strategy in STRATEGIES:
        config = parse_kfac(config_of(SHAPES["gpt_1.3b"], strategy))
        started = time.perf_counter()
        coverage = find_blocks(network, config.curvature)
        plan = build_plan(coverage.blocks, config, world_size=size)
        plan.rows()
        found[strategy] = {"seconds": time.perf_counter() - started, "blocks": len(plan.blocks)}
    return {"ranks": size, "strategies": found}


def apart(*words: str) -> dict[str, Any]:
    """Return what a process of its own finds out."""
    command = [sys.executable, "-m", "benchmarks.scale", "--case", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{ended.stderr}")
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def line(row: dict[str, Any]) -> str:
    """Return a case's row as a person reads it."""
    steps = ("refresh_step", "ordinary_step")
    parts = {step: list(row[step].values()) for step in steps}
    totals = {s: (sum(p["collectives"] for p in parts[s]), sum(p["bytes_sent"] for p in parts[s])) for s in steps}
    (refresh_calls, refresh_bytes), (ordinary_calls, ordinary_bytes) = totals.values()
    return (
        f"{row['model']:10} {row['ranks']:5} {row['strategy']:38} collectives {refresh_calls:3} {ordinary_calls:3}"
        f"  MB sent {refresh_bytes / 1e6:8.1f} {ordinary_bytes / 1e6:7.1f}"
        f"  MB kept {row['state_bytes'] / 1e6:8.1f} (plan {row['planned_bytes'] / 1e6:8.1f})"
        f"  owns {row['owned_units']:3}  load {row['load_max_over_mean']:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 512, 4096])
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    parser.add_argument("--case", nargs="+", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    match arguments.case:
        case ["planning", size]:
            print(json.dumps(planning(int(size))))
            return
        case [model, strategy, size]:
            print(json.dumps(one(model, strategy, int(size))))
            return
    results: dict[str, Any] = {"planning": [apart("planning", str(size)) for size in arguments.ranks], "steps": []}
    for row in results["planning"]:
        slowest = max(row["strategies"].items(), key=lambda found: found[1]["seconds"])
        print(f"planning for {row['ranks']} ranks: {slowest[1]['seconds']:.2f} s at most ({slowest[0]})", flush=True)
    for model in arguments.models:
        for strategy in STRATEGIES:
            for size in arguments.ranks:
                row = apart(model, strategy, str(size))
                results["steps"].append(row)
                print(line(row), flush=True)
    settings = {"models": {name: {"layers": s.layers, "run": s.run} for name, s in SHAPES.items()}}
    print(write("scale", arguments.out, settings, results))


if __name__ == "__main__":
    main()
