"""Accuracy of the planner: calibration, prediction, and measured steps, on 1, 2 and 4 ranks.

On each number of ranks the machine is calibrated by these very ranks, which share its cores. Then each strategy takes
steps beside bare SGD steps, in turn: ordinary ones, those that measure, and those that measure and refresh. What a
kind adds is the difference of lower quartiles, as in the calibration: what else the machine does only adds. A mean step
at intervals 10/100 follows from the three. The planner is asked for the same; the error is predicted / measured − 1.

    python -m benchmarks.prediction [--ranks 1 2 4] [--rounds 5] [--out FILE]     replaces the rows of these ranks
    python -m benchmarks.prediction --again         after a change of the cost model: what was measured stays
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.reporting import RESULTS, write
from benchmarks.timing import seconds_of
from benchmarks.workloads import WORKLOADS, Workload, next_token
from kfac_dist import KFAC
from kfac_dist.config.schema import EngineConfig
from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.curvature.blocks import Block, find_blocks
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.distributed.startup.bootstrap import bootstrap
from kfac_dist.planning.job import Model, PlannedRun, StepKind
from kfac_dist.planning.machines.calibration import calibrate, quartile
from kfac_dist.planning.machines.hardware import Hardware
from kfac_dist.planning.prediction import Prediction, predict
from kfac_dist.planning.strategies import Strategy
from kfac_dist.preconditioner.phases import Phase
from kfac_dist.tasks.models.byte_gpt import byte_gpt

FACTOR_EVERY, INVERSE_EVERY = 10, 100
# Kinds of four consecutive steps, with statistics every 2 and inverses every 4 steps.
KINDS = ("refreshing", "ordinary", "measuring", "ordinary")
STEPS = {
    "refreshing": StepKind(measured=(0,), diagonal=True, moments=False, slots=(0,)),
    "measuring": StepKind(measured=(0,), diagonal=True, moments=False, slots=()),
    "ordinary": StepKind(measured=(), diagonal=False, moments=False, slots=()),
}
SMALL_GPT = Workload(
    lambda: byte_gpt(layers=4, width=128, heads=4, context=128),
    lambda: torch.randint(0, 256, (8, 128)),
    next_token,
    "token",
)
MODELS = {"autoencoder-b256": WORKLOADS["autoencoder-b256"], "gpt-4x128-8x128": SMALL_GPT}
STRATEGIES: dict[str, dict[str, Any]] = {
    "replicated": {},
    "replicated, blocks of 512": {"inversion": {"max_factor_dim": 512}},
    "replicated, balanced, reduce-scatter": {
        "distribution": {"assignment": "balanced", "reduction": "reduce_scatter"},
    },
    "owner, balanced": {"distribution": {"placement": "owner", "assignment": "balanced"}},
    "owner, balanced, reduce-scatter, every step": {
        "distribution": {
            "placement": "owner",
            "assignment": "balanced",
            "reduction": "reduce_scatter",
            "reduce_every": "step",
        },
    },
}
# Strategies on one rank, and on several.
ALONE = ("replicated", "replicated, blocks of 512")
TOGETHER = tuple(name for name in STRATEGIES if name != ALONE[1])


def config_of(workload: Workload, strategy: str) -> dict[str, Any]:
    chosen = STRATEGIES[strategy]
    return {
        "curvature": {"factor_every": 2, "loss_terms": workload.loss_terms},
        "inversion": {"inverse_every": 4, "early_refresh": 0, "damping": 0.1, **chosen.get("inversion", {})},
        "distribution": chosen.get("distribution", {}),
    }


def mean_step(kinds: dict[str, float]) -> float:
    """Return the cost that an average step adds at intervals 10/100."""
    measuring = kinds["measuring"] - kinds["ordinary"]
    refreshing = kinds["refreshing"] - kinds["measuring"]
    return kinds["ordinary"] + measuring / FACTOR_EVERY + refreshing / INVERSE_EVERY


@dataclass(frozen=True)
class Found:
    """Milliseconds: of a bare step, of what each kind of step adds, and of this rank's phases in it."""

    bare: float
    kinds: dict[str, float]
    phases: dict[str, dict[str, float]]


def measured(workload: Workload, strategy: str, rounds: int) -> Found:
    bare, _ = _stepper(workload, None)
    own, kfac = _stepper(workload, config_of(workload, strategy))
    assert kfac is not None
    kfac.monitor.phases.enabled = True
    seconds: dict[str, list[float]] = defaultdict(list)
    phases: dict[str, dict[Phase, list[float]]] = {kind: defaultdict(list) for kind in KINDS}
    for turn, kind in itertools.product(range(rounds + 1), KINDS):
        before = kfac.monitor.phases.seconds()
        pair = seconds_of(bare), seconds_of(own)
        if turn:  # the first steps allocate
            seconds["bare"].append(pair[0])
            seconds[kind].append(pair[1])
            for phase, after in kfac.monitor.phases.seconds().items():
                phases[kind][phase].append(after - before[phase])
    typical = {kind: 1000 * quartile(values) for kind, values in seconds.items()}
    return Found(
        bare=typical["bare"],
        kinds={kind: typical[kind] - typical["bare"] for kind in STEPS},
        phases={kind: {phase: 1000 * quartile(values) for phase, values in phases[kind].items()} for kind in STEPS},
    )


def _stepper(workload: Workload, config: dict[str, Any] | None) -> tuple[Callable[[], None], KFAC | None]:
    torch.manual_seed(0)
    model: nn.Module = workload.build()
    model = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
    inputs = workload.inputs()
    kfac = None if config is None else KFAC(model, config, optimizer=optimizer)

    def step() -> None:
        workload.loss(model(inputs), inputs).backward()
        if kfac is not None:
            kfac.step()
        optimizer.step()
        optimizer.zero_grad()

    return step, kfac


def foretold(workload: Workload, strategy: str, size: int, hardware: Hardware) -> Prediction:
    with torch.device("meta"):
        network = workload.build()
    config = parse_kfac(config_of(workload, strategy))
    coverage = find_blocks(network, config.curvature)
    inputs = workload.inputs()
    model = Model(coverage.blocks, {}, _rows(network, coverage.blocks, inputs))
    job = PlannedRun.of(model, config, EngineConfig(), size, size)
    return predict(Strategy(config, {}), job, hardware, len(inputs) * size)


def _rows(network: nn.Module, blocks: list[Block], inputs: torch.Tensor) -> dict[str, float]:
    from kfac_dist.planning.rows import rows_of

    return rows_of(network, blocks, inputs.to("meta"))


def compared(name: str, strategy: str, size: int, rounds: int, hardware: Hardware) -> dict[str, Any]:
    return row_of(name, strategy, size, hardware, measured(MODELS[name], strategy, rounds))


def row_of(name: str, strategy: str, size: int, hardware: Hardware, found: Found) -> dict[str, Any]:
    """Predict, and compare with the measurements."""
    prediction = foretold(MODELS[name], strategy, size, hardware)
    costs = {kind: prediction.costs[step] for kind, step in STEPS.items()}
    told = {kind: 1000 * cost.total for kind, cost in costs.items()}
    return {
        "model": name,
        "strategy": strategy,
        "ranks": size,
        "bare_ms": found.bare,
        "predicted_ms": mean_step(told),
        "measured_ms": mean_step(found.kinds),
        "error": mean_step(told) / mean_step(found.kinds) - 1,
        "kinds": {kind: {"predicted_ms": told[kind], "measured_ms": found.kinds[kind]} for kind in STEPS},
        "predicted_phases_ms": {
            kind: {phase: 1000 * seconds for phase, seconds in cost.seconds.items()} for kind, cost in costs.items()
        },
        "measured_phases_ms": found.phases,
    }


def again(out: Path) -> None:
    """Predict once more from the calibrations of a file, beside its measurements."""
    known = json.loads(out.read_text())
    machines = known["results"]["calibrations"]
    rows = []
    for case in known["results"]["cases"]:
        kinds = {kind: values["measured_ms"] for kind, values in case["kinds"].items()}
        found = Found(case["bare_ms"], kinds, case["measured_phases_ms"])
        hardware = Hardware.model_validate(machines[str(case["ranks"])])
        rows.append(row_of(case["model"], case["strategy"], case["ranks"], hardware, found))
        print(line(rows[-1]))
    save(rows, machines, known["settings"]["rounds"], out)


def run_rank(rank: int, size: int, rendezvous: str, rounds: int, names: list[str], out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    with bootstrap("cpu", 300.0) as world:
        communicator = build_communicator(300.0)
        hardware = calibrate(world, communicator, name=f"this machine, {size} ranks")
        rows = []
        for name, strategy in itertools.product(names, TOGETHER if size > 1 else ALONE):
            row = compared(name, strategy, size, rounds, hardware)
            rows.append(row)
            if rank == 0:
                print(line(row), flush=True)
    if rank == 0:
        out.write_text(json.dumps({"rows": rows, "hardware": json.loads(hardware.model_dump_json())}))
    if size > 1:
        dist.destroy_process_group()


def line(row: dict[str, Any]) -> str:
    kinds = "  ".join(
        f"{kind} {values['predicted_ms']:.1f}/{values['measured_ms']:.1f}" for kind, values in row["kinds"].items()
    )
    return (
        f"{row['ranks']} ranks {row['model']:17} {row['strategy']:45} predicted {row['predicted_ms']:6.2f} ms, "
        f"measured {row['measured_ms']:6.2f} ms, error {100 * row['error']:+.0f} %   ({kinds})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "prediction.json")
    parser.add_argument("--again", action="store_true", help="predict once more from the file's calibrations")
    arguments = parser.parse_args()
    if arguments.again:
        again(arguments.out)
        return
    rows, machines = others(arguments.out, arguments.ranks)
    for size in arguments.ranks:
        with tempfile.TemporaryDirectory() as directory:
            found = Path(directory) / "found.json"
            work = (str(Path(directory) / "rendezvous"), arguments.rounds, arguments.models, found)
            mp.spawn(run_rank, args=(size, *work), nprocs=size, join=True)
            one = json.loads(found.read_text())
        rows += one["rows"]
        machines[str(size)] = one["hardware"]
        save(rows, machines, arguments.rounds, arguments.out)
    print(arguments.out)


def others(out: Path, ranks: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a file's results for other numbers of ranks: a call replaces its own."""
    known = json.loads(out.read_text())["results"] if out.exists() else {"cases": [], "calibrations": {}}
    machines = {size: found for size, found in known["calibrations"].items() if int(size) not in ranks}
    return [row for row in known["cases"] if row["ranks"] not in ranks], machines


def save(rows: list[dict[str, Any]], machines: dict[str, Any], rounds: int, out: Path) -> None:
    """Write the results so far."""
    rows = sorted(rows, key=lambda row: row["ranks"])
    errors = sorted(abs(row["error"]) for row in rows)
    summary = {
        "cases": len(rows),
        "median_absolute_error": statistics.median(errors),
        "largest_absolute_error": errors[-1],
        "within_20_percent": sum(error <= 0.2 for error in errors),
    }
    print(summary, flush=True)
    settings = {"threads_a_rank": 1, "factor_every": FACTOR_EVERY, "inverse_every": INVERSE_EVERY}
    settings |= {"rounds": rounds, "bare": "SGD with momentum", "load_average": os.getloadavg()[1]}
    write("prediction", out, settings, {"summary": summary, "cases": rows, "calibrations": machines})


if __name__ == "__main__":
    main()
