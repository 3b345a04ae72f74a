"""Time that K-FAC adds to a step, in multiples of the bare optimizer's step, by phase, with each phase's lower bound.

Every round takes, one after the other in one process: a bare SGD step, and K-FAC's three kinds of step (ordinary;
measuring; measuring and refreshing). From their medians follow the phases

    precondition = ordinary − bare,    statistics = measuring − ordinary,    inversion = refreshing − measuring

and the mean cost at any intervals: statistics/inverses every 1/10 and 10/100 steps. The floor of a phase is its flops
(DESIGN: factors (a²+g²)·M, inversion n³, preconditioning 2ag(a+g)) over the rate of a large fp32 matrix product,
measured in the same process; beside it stands what LAPACK's Cholesky inverse of each factor takes by itself, which no
matrix product can be. The same is done with gpauloski's kfac-pytorch when the package `kfac` can be imported.

Each call replaces its own rows of the output and leaves the others, so that a long measurement can be cut into pieces.

    python -m benchmarks.step_overhead [--ranks 1 2] [--workloads …] [--methods …] [--rounds 7] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.reporting import RESULTS, spread, write
from benchmarks.timing import seconds_of
from benchmarks.workloads import WORKLOADS, Workload
from kfac_dist import KFAC
from kfac_dist.config.schema import Solver
from kfac_dist.curvature.factors import FactorKind, Side, Unit
from kfac_dist.curvature.inverses.solvers import Task, solve

INTERVALS = {"1/10": (1, 10), "10/100": (10, 100)}
# Kinds of four consecutive steps, with statistics every 2 and inverses every 4 steps.
KINDS = ("refreshing", "ordinary", "measuring", "ordinary")
DAMPING, LR = 0.1, 1e-5


def sections(workload: Workload, **changes: Any) -> dict[str, Any]:
    return {
        "curvature": {"factor_every": 2, "loss_terms": workload.loss_terms, **changes.get("curvature", {})},
        "inversion": {"inverse_every": 4, "early_refresh": 0, "damping": DAMPING, **changes.get("inversion", {})},
        "distribution": changes.get("distribution", {}),
    }


METHODS: dict[str, dict[str, Any]] = {
    "kfac_dist": {},
    "kfac_dist owner": {"distribution": {"placement": "owner"}},
    "kfac_dist eigen": {"inversion": {"solver": "eigen"}},
    "kfac_dist, bf16 inverses": {"inversion": {"inverse_dtype": "bfloat16"}},
    "kfac_dist, 1 row in 4": {"curvature": {"sample_fraction": 0.25}},
    "kfac_dist owner, bf16 inverses": {
        "distribution": {"placement": "owner"},
        "inversion": {"inverse_dtype": "bfloat16"},
    },
}
PEER_METHODS = {"kfac-pytorch inverse": "inverse", "kfac-pytorch eigen": "eigen"}


class Stepper:
    """A model that takes steps with one method."""

    def __init__(self, workload: Workload, method: str | None) -> None:
        torch.manual_seed(0)
        self.workload = workload
        self.bare = workload.build()
        self.model: nn.Module = DistributedDataParallel(self.bare) if dist.is_initialized() else self.bare
        self.optimizer = torch.optim.SGD(self.bare.parameters(), lr=LR, momentum=0.9)
        self.inputs = workload.inputs()
        self.precondition: Callable[[], None] | None = None
        self.kfac: KFAC | None = None
        if method in METHODS:
            self.kfac = KFAC(self.model, sections(workload, **METHODS[method]), optimizer=self.optimizer)
            self.precondition = self.kfac.step
        elif method is not None:
            self.precondition = _peer(self.model, PEER_METHODS[method])

    def step(self) -> float:
        """Take a step and return its seconds, the slowest rank's."""
        return seconds_of(self._step)

    def _step(self) -> None:
        self.workload.loss(self.model(self.inputs), self.inputs).backward()
        if self.precondition is not None:
            self.precondition()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _peer(model: nn.Module, method: str) -> Callable[[], None]:
    """Return the step of gpauloski's kfac-pytorch at the same intervals."""
    from kfac.enums import ComputeMethod
    from kfac.preconditioner import KFACPreconditioner

    compute = ComputeMethod.EIGEN if method == "eigen" else ComputeMethod.INVERSE
    preconditioner = KFACPreconditioner(
        model, factor_update_steps=2, inv_update_steps=4, damping=DAMPING, lr=LR, compute_method=compute
    )
    step: Callable[[], None] = preconditioner.step
    return step


def measure(workload: Workload, method: str, rounds: int) -> dict[str, Any]:
    """Time bare steps and a method's steps in turn."""
    bare, stepper = Stepper(workload, None), Stepper(workload, method)
    for _ in range(len(KINDS)):  # the first steps allocate
        bare.step()
        stepper.step()
    seconds: dict[str, list[float]] = {"bare": [], **{kind: [] for kind in KINDS}}
    for _, kind in itertools.product(range(rounds), KINDS):
        seconds["bare"].append(bare.step())
        seconds[kind].append(stepper.step())
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    result = {
        "seconds": {kind: spread(values) for kind, values in seconds.items()},
        "phases_in_bare_steps": _phases(medians),
        "added_in_bare_steps": {name: _added(medians, *interval) for name, interval in INTERVALS.items()},
    }
    if stepper.kfac is not None:
        result["floors_in_bare_steps"] = floors(stepper, medians["bare"])
        stepper.kfac.remove()
    return result


def _phases(medians: dict[str, float]) -> dict[str, float]:
    order = ("bare", "ordinary", "measuring", "refreshing")
    steps = zip(("precondition", "statistics", "inversion"), itertools.pairwise(order), strict=True)
    return {phase: (medians[more] - medians[less]) / medians["bare"] for phase, (less, more) in steps}


def _added(medians: dict[str, float], factor_every: int, inverse_every: int) -> float:
    phases = _phases(medians)
    return phases["precondition"] + phases["statistics"] / factor_every + phases["inversion"] / inverse_every


def floors(stepper: Stepper, bare_seconds: float) -> dict[str, float]:
    """Return each phase's flops over the rate of a matrix product, in bare steps, for one rank of all."""
    assert stepper.kfac is not None
    rate = matmul_rate()
    plan, rows = stepper.kfac.monitor.plan, _rows(stepper)
    rank, size = stepper.kfac.communicator.rank, stepper.kfac.communicator.size
    flops = dict.fromkeys(("precondition", "statistics", "inversion"), 0.0)
    owned: list[Unit] = []
    for name, block in plan.blocks.items():
        sides = {unit.side for unit in block.units}
        for unit in block.units:
            elements = unit.batch * unit.dim**2 if len(unit.shape) == 3 else 0
            flops["statistics"] += elements * rows.get((name, unit.side), 0)
            if plan.assignment.owners[unit.name] == rank or size == 1:
                flops["inversion"] += unit.cost
                owned += [unit] if unit.kind is FactorKind.DENSE else []
        batch, d_out, d_in = block.matrix_shape
        if block.column == plan.grid.column_of(rank) and Side.G in sides:
            flops["precondition"] += 2 * batch * d_out * d_in * (d_out + d_in)
    return {
        **{phase: count / rate / bare_seconds for phase, count in flops.items()},
        "inversion by LAPACK": sum(map(inverse_seconds, owned)) / bare_seconds,
    }


def _rows(stepper: Stepper) -> dict[tuple[str, Side], float]:
    """Return M, the rows of each factor in one step: counted in a forward pass."""
    assert stepper.kfac is not None
    found: dict[tuple[str, Side], float] = {}
    handles = []
    for block in stepper.kfac.coverage.blocks:
        if any(factor.side is Side.F for factor in block.factors):
            continue

        def count(module: nn.Module, args: Any, output: torch.Tensor, name: str = block.name) -> None:
            channels = 1 if isinstance(module, nn.Conv2d) else -1
            positions = output.numel() / output.shape[channels]
            found[name, Side.A] = found[name, Side.G] = positions

        handles.append(block.module.register_forward_hook(count))
    with torch.no_grad():
        stepper.bare(stepper.inputs)
    for handle in handles:
        handle.remove()
    return found


def inverse_seconds(unit: Unit) -> float:
    """Return the seconds of the Cholesky inverses of a unit by themselves, the best of three."""
    key = (unit.batch, unit.dim)
    if key not in _INVERSE_SECONDS:
        rows = torch.randn(unit.batch, 2 * unit.dim, unit.dim)
        task = Task(unit, rows.mT @ rows, 1.0, None)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            solve([task], Solver.CHOLESKY)
            times.append(time.perf_counter() - started)
        _INVERSE_SECONDS[key] = min(times)
    return _INVERSE_SECONDS[key]


_INVERSE_SECONDS: dict[tuple[int, int], float] = {}


def matmul_rate() -> float:
    """Return flops a second of an fp32 product of 1024×1024 matrices, the best of ten."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return float(2 * 1024**3 / best)


def run_rank(
    rank: int, size: int, rendezvous: str, names: list[str], methods: list[str], rounds: int, out: Path
) -> None:
    torch.set_num_threads(1)
    if size > 1:
        os.environ["LOCAL_WORLD_SIZE"] = str(size)
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    for name, method in itertools.product(names, methods):
        if "owner" not in method or size > 1:
            result = measure(WORKLOADS[name], method, rounds)
            if rank == 0:
                save({"workload": name, "ranks": size, "method": method, "rounds": rounds, **result}, out)
                added = " · ".join(f"{value:.2f}" for value in result["added_in_bare_steps"].values())
                print(f"{name}, {size} rank{'s' * (size > 1)}, {method}: {added}", flush=True)
    if size > 1:
        dist.destroy_process_group()


def save(row: dict[str, Any], out: Path) -> None:
    """Put a row into the output, in the place of one that measured the same."""
    rows = json.loads(out.read_text())["results"] if out.exists() else []
    merged = {_key(other): other for other in [*rows, row]}
    settings = {"threads_a_rank": 1, "intervals": INTERVALS, "bare": "SGD with momentum"}
    write("step_overhead", out, settings, [merged[key] for key in sorted(merged, key=_order)])


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw each method's addition to a step at intervals 1/10, by phase, with its lower bound."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in WORKLOADS if any(row["workload"] == name for row in rows)]
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 5), squeeze=False, layout="constrained")
    shares = {"precondition": 1.0, "statistics": 1 / INTERVALS["1/10"][0], "inversion": 1 / INTERVALS["1/10"][1]}
    for axis, name in zip(axes[0], names, strict=True):
        own = [row for row in rows if row["workload"] == name]
        for values, offset, height, alpha in (
            ("phases_in_bare_steps", -0.15, 0.5, 1.0),
            ("floors_in_bare_steps", 0.25, 0.25, 0.45),
        ):
            left = [0.0] * len(own)
            for phase, color in zip(shares, ("tab:blue", "tab:orange", "tab:green"), strict=True):
                widths = [max(0.0, row.get(values, {}).get(phase, 0.0) * shares[phase]) for row in own]
                label = phase if values.startswith("phases") else f"{phase}, floor"
                places = [index + offset for index in range(len(own))]
                axis.barh(places, widths, height, left, color=color, alpha=alpha, label=label)
                left = [a + b for a, b in zip(left, widths, strict=True)]
        ranks = ["" if row["ranks"] == 1 else f", {row['ranks']} ranks" for row in own]
        axis.set_yticks(range(len(own)), [row["method"] + text for row, text in zip(own, ranks, strict=True)])
        axis.invert_yaxis()
        axis.set(title=name, xlabel="SGD steps added (1/10)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(path, dpi=100)


def main() -> None:
    known = [*METHODS, *(PEER_METHODS if importlib.util.find_spec("kfac") else ())]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "step_overhead.json")
    arguments = parser.parse_args()
    for size in arguments.ranks:
        with tempfile.TemporaryDirectory() as directory:
            rendezvous = str(Path(directory) / "rendezvous")
            work = (rendezvous, arguments.workloads, arguments.methods, arguments.rounds, arguments.out)
            mp.spawn(run_rank, args=(size, *work), nprocs=size, join=True)
    draw(json.loads(arguments.out.read_text())["results"], arguments.out.with_suffix(".png"))
    print(arguments.out)


def _key(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["workload"], row["ranks"], row["method"]


def _order(key: tuple[str, int, str]) -> tuple[int, int, int]:
    workload, ranks, method = key
    return [*WORKLOADS].index(workload), ranks, [*METHODS, *PEER_METHODS].index(method)


if __name__ == "__main__":
    main()
