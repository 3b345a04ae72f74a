"""The real `KFAC.step` as one rank of many: its messages, memory and inversions, and the time of planning.

A rank alone counts whose collectives go nowhere (torch's fake process group): what the others would send it doesn't
matter for what it sends, holds and computes. The rank is the one with the most to invert. Models have the shapes of
ResNet-50, BERT-large and GPT-1.3B. Of the two transformers some layers are run where memory forbids more; the same
layers and all of them are planned as well, as `kfac-dist plan` does it, from shapes alone:

    run       sent, inverted and kept by `KFAC.step`, on some layers         planned, the same layers: has to be equal
    whole     planned, all layers: sent and kept by the model

Every case runs in a process of its own, some gigabytes and a minute each; with --plan-only nothing is run. Each call
replaces its own rows of the output and leaves the others.

    python -m benchmarks.scale [--models resnet50 bert_large gpt_1.3b] [--ranks 8 64 512 4096] [--plan-only]
                               [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import ResNet50
from benchmarks.reporting import RESULTS, write
from kfac_dist import KFAC
from kfac_dist.config.schema import EngineConfig
from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.curvature.blocks import find_blocks
from kfac_dist.distributed.communicators.traffic import Traffic
from kfac_dist.planning.job import Model, PlannedRun, StepKind
from kfac_dist.planning.traffic import record_traffic
from kfac_dist.tasks.models.bert import bert
from kfac_dist.tasks.models.byte_gpt import byte_gpt
from tests.engines.live_bytes import bookkeeping, live_bytes
from tests.fake_ranks import fake_ranks
from tests.planning.solved_units import solved_units

MOST_PLANNING = 300
"""Layers of the plan whose making is timed."""
NODE = 8
"""Ranks of a node, for the placement that knows nodes."""
AT_THE_START = "agreement"
"""Label of what ranks agree on once, in the first step."""
REFRESH = StepKind(measured=(0,), diagonal=True, moments=False, slots=(0,))
ORDINARY = StepKind(measured=(), diagonal=False, moments=False, slots=())


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
    "node, balanced, blocks of 2048": {
        "inversion": {"max_factor_dim": 2048},
        "distribution": {"placement": "node", "assignment": "balanced"},
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


def job_of(network: nn.Module, config: dict[str, Any], size: int) -> PlannedRun:
    """Plan a network's work from its shapes."""
    parsed = parse_kfac(config)
    coverage = find_blocks(network, parsed.curvature)
    uncovered = {name: network.get_parameter(name).numel() for name in coverage.uncovered}
    return PlannedRun.of(Model(coverage.blocks, uncovered, {}), parsed, EngineConfig(), size, NODE)


def sent(traffic: Traffic) -> dict[str, dict[str, int]]:
    """Return a rank's counters, by label, without those of once in a run."""
    counted = {label: found for label, found in traffic.snapshot().items() if label != AT_THE_START}
    return {label: {"collectives": calls, "bytes_sent": nbytes} for label, (calls, nbytes) in counted.items()}


def planned(job: PlannedRun) -> dict[str, Any]:
    """Return the plan of the busiest rank."""
    rank = job.busiest
    return {
        "blocks": len(job.plan.blocks),
        "units": len(job.plan.units),
        "owned_units": len(job.plan.owned(rank)),
        "load_max_over_mean": job.plan.assignment.imbalance(),
        "refresh_step": sent(record_traffic(job, REFRESH, rank).traffic),
        "ordinary_step": sent(record_traffic(job, ORDINARY, rank).traffic),
        "state_bytes": job.memory[rank].total,
        "state_bytes_of_the_fullest_rank": max(found.total for found in job.memory),
    }


def counted(network: nn.Module, batch: Callable[[], Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """Take one step that measures and refreshes, and one that does neither."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    started = time.perf_counter()
    kfac = KFAC(network, config, optimizer=optimizer)
    constructing = time.perf_counter() - started
    steps = []
    with solved_units() as solved:
        for _ in range(2):
            kfac.communicator.traffic.reset()
            network(batch()).square().mean().backward()
            kfac.step()
            network.zero_grad()
            steps.append(sent(kfac.communicator.traffic))
    small = live_bytes(bookkeeping(kfac))
    return {
        "refresh_step": steps[0],
        "ordinary_step": steps[1],
        "inverted_units": len(solved),
        "state_bytes": live_bytes(kfac) - small,
        "bookkeeping_bytes": small,
        "construct_seconds": constructing,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def one(model: str, strategy: str, size: int) -> dict[str, Any]:
    """Plan the whole model; plan and run some of its layers."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = SHAPES[model]
    config = config_of(shape, strategy)
    whole = whole_model(shape, config, size)
    network = shape.build(shape.run)
    job = job_of(network, config, size)
    with fake_ranks(job.busiest, size):
        run = counted(network, shape.batch, config)
    expected = planned(job)
    return {
        "model": model,
        "strategy": strategy,
        "ranks": size,
        "rank": job.busiest,
        "run": run,
        "run_equals_plan": {
            **{key: run[key] == expected[key] for key in ("refresh_step", "ordinary_step", "state_bytes")},
            "inverted_units": run["inverted_units"] == expected["owned_units"],
        },
        "whole": whole,
    }


def whole_model(shape: Shape, config: dict[str, Any], size: int) -> dict[str, Any]:
    """Plan all layers of a model."""
    with torch.device("meta"):
        return planned(job_of(shape.build(shape.layers), config, size))


def planning(size: int) -> dict[str, Any]:
    """Plan a model of many layers for many ranks, and lay out a rank's buffers; nothing is built but shapes.

    CPU seconds: it is one thread, and other programs may run.
    """
    with torch.device("meta"):
        # Four linear layers and two norms a block, and what is around them.
        network = byte_gpt(layers=MOST_PLANNING // 6, width=2048, heads=16, context=2048, vocabulary=50304)
    found = {}
    for strategy in STRATEGIES:
        config = config_of(SHAPES["gpt_1.3b"], strategy)
        started = time.process_time()
        job = job_of(network, config, size)
        job.plan.rows()
        planned_at = time.process_time()
        for kind in (REFRESH, ORDINARY):
            record_traffic(job, kind, size - 1)
        laid_out_at = time.process_time()
        found[strategy] = {
            "blocks": len(job.plan.blocks),
            "cpu_seconds": planned_at - started,
            "layout_cpu_seconds": laid_out_at - planned_at,
        }
    return {"ranks": size, "strategies": found}


def apart(*words: str) -> dict[str, Any]:
    """Return the result of a separate process."""
    command = [sys.executable, "-m", "benchmarks.scale", "--case", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{ended.stderr}")
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def total(step: dict[str, dict[str, int]]) -> tuple[int, int]:
    """Return the collectives of a step, and the bytes that it sends."""
    return sum(part["collectives"] for part in step.values()), sum(part["bytes_sent"] for part in step.values())


def line(row: dict[str, Any]) -> str:
    """Return a case's row as a person reads it."""
    whole = row["whole"]
    (refresh_calls, refresh_bytes), (ordinary_calls, ordinary_bytes) = (
        total(whole[step]) for step in ("refresh_step", "ordinary_step")
    )
    run = row["run"]
    unequal = [name for name, same in row["run_equals_plan"].items() if not same]
    said = "not run" if run is None else "not as planned: " + ", ".join(unequal) if unequal else "the run as planned"
    started = "" if run is None else f"  start {run['construct_seconds']:.1f} s"
    return (
        f"{row['model']:10} {row['ranks']:5} {row['strategy']:38} collectives {refresh_calls:3} {ordinary_calls:3}"
        f"  MB sent {refresh_bytes / 1e6:8.1f} {ordinary_bytes / 1e6:7.1f}  MB kept {whole['state_bytes'] / 1e6:8.1f}"
        f"  owns {whole['owned_units']:3}  load {whole['load_max_over_mean']:6.2f}"
        f"  {said}{started}"
    )


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw a rank's costs of the whole models against the number of ranks: collectives, bytes sent and kept, load."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, Callable[[dict[str, Any]], float]] = {
        "collectives of a refreshing step": lambda row: total(row["whole"]["refresh_step"])[0],
        "MB sent by a refreshing step": lambda row: total(row["whole"]["refresh_step"])[1] / 1e6,
        "MB sent by an ordinary step": lambda row: total(row["whole"]["ordinary_step"])[1] / 1e6,
        "GB of state, fullest rank": lambda row: row["whole"]["state_bytes_of_the_fullest_rank"] / 1e9,
        "largest load / mean": lambda row: row["whole"]["load_max_over_mean"],
    }
    figure, axes = plt.subplots(len(SHAPES), len(panels), figsize=(19, 10), sharex=True, layout="constrained")
    for line_of_axes, model in zip(axes, SHAPES, strict=True):
        for axis, (title, value) in zip(line_of_axes, panels.items(), strict=True):
            for index, strategy in enumerate(STRATEGIES):
                rows = [row for row in results["steps"] if (row["model"], row["strategy"]) == (model, strategy)]
                axis.plot(
                    [row["ranks"] for row in rows],
                    [value(row) for row in rows],
                    marker="osD^v"[index],
                    linestyle=("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))[index],
                    markersize=10 - index,
                    fillstyle="none",
                    label=strategy,
                )
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted({row["ranks"] for row in results["steps"]}))
            axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
            axis.set_title(f"{model}: {title}", fontsize="small")
            axis.set_ylim(bottom=0)
            if title.startswith("largest"):
                axis.set_yscale("log")
                axis.set_ylim(bottom=0.9)
    for axis in axes[-1]:
        axis.set_xlabel("ranks")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 512, 4096])
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    parser.add_argument("--plan-only", action="store_true", help="run no step")
    parser.add_argument("--case", nargs="+", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["LOCAL_WORLD_SIZE"] = str(NODE)
    match arguments.case:
        case ["planning", size]:
            print(json.dumps(planning(int(size))))
            return
        case [model, strategy, size]:
            print(json.dumps(one(model, strategy, int(size))))
            return
    results = json.loads(arguments.out.read_text())["results"] if arguments.out.exists() else {}
    for size in arguments.ranks:
        row = apart("planning", str(size))
        seconds = {
            name: found["cpu_seconds"] + found["layout_cpu_seconds"] for name, found in row["strategies"].items()
        }
        slowest = max(seconds, key=lambda name: seconds[name])
        print(f"planning for {size} ranks: {seconds[slowest]:.2f} CPU seconds at most ({slowest})", flush=True)
        save(results, "planning", row, arguments.out)
    for model, strategy, size in itertools.product(arguments.models, STRATEGIES, arguments.ranks):
        if arguments.plan_only:
            whole = whole_model(SHAPES[model], config_of(SHAPES[model], strategy), size)
            case = {"model": model, "strategy": strategy, "ranks": size}
            row = {**case, "run": None, "run_equals_plan": {}, "whole": whole}
        else:
            row = apart(model, strategy, str(size))
        print(line(row), flush=True)
        save(results, "steps", row, arguments.out)
    draw(results, arguments.out.with_suffix(".png"))
    print(arguments.out)


def save(results: dict[str, list[dict[str, Any]]], kind: str, row: dict[str, Any], out: Path) -> None:
    """Put a row into the output, in the place of one of the same case."""
    key = {name: row[name] for name in ("model", "strategy", "ranks") if name in row}
    others = [other for other in results.get(kind, []) if any(other[name] != key[name] for name in key)]
    order = {name: place for place, name in enumerate((*SHAPES, *STRATEGIES))}
    results[kind] = sorted(
        [*others, row], key=lambda r: (order.get(r.get("model"), 0), order.get(r.get("strategy"), 0), r["ranks"])
    )
    settings = {
        "models": {name: {"layers": shape.layers, "run": shape.run} for name, shape in SHAPES.items()},
        "layers_of_planning": MOST_PLANNING,
        "ranks_of_a_node": NODE,
    }
    write("scale", out, settings, results)


if __name__ == "__main__":
    main()
