"""Distribution of K-FAC's step times: the GPT at T_inv = 100, statistics every 10 steps.

SGD alone and every variant take one window of T_inv steps each, one variant after the other: what a variant does beside
training would else run while another one is timed. A window begins where early refreshes are over: step 0, which
solves everything wherever it runs, is taken unmeasured, and the next step is numbered T_inv.

Of each step: the seconds by the clock, and the CPU seconds of the training thread, both the slowest rank's. The clock
has all that the machine does meanwhile: what SGD alone shows of it is how quiet the machine was. CPU seconds have the
training thread's own work only, without what it waits for.

    python -m benchmarks.step_times [--ranks 1 2] [--variants …] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.reporting import RESULTS, write
from benchmarks.workloads import Workload, gpt, next_token
from kfac_dist import KFAC

INVERSE_EVERY, FACTOR_EVERY = 100, 10
SEQUENCES, TOKENS = 4, 128
GPT = Workload(gpt, lambda: torch.randint(0, 256, (SEQUENCES, TOKENS)), next_token, "token")
SGD = "SGD alone"
VARIANTS: dict[str, dict[str, Any]] = {
    "all in one step": {},
    "layers take turns": {"curvature": {"stagger": 10}, "inversion": {"stagger": 100}},
    "turns, solved beside": {"curvature": {"stagger": 10}, "inversion": {"stagger": 100, "inverse_lag": 10}},
}
"""By name, what `kfac.curvature` and `kfac.inversion` say besides the intervals."""

KINDS = {"seconds": "seconds by the clock", "cpu_seconds": "CPU seconds of the training thread"}
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def sections(variant: str) -> dict[str, Any]:
    changes = VARIANTS[variant]
    return {
        "curvature": {
            "factor_every": FACTOR_EVERY,
            "loss_terms": GPT.loss_terms,
            **changes.get("curvature", {}),
        },
        "inversion": {
            "inverse_every": INVERSE_EVERY,
            "early_refresh": 0,
            "damping": 0.1,
            **changes.get("inversion", {}),
        },
    }


class Stepper:
    """A model that takes steps in one way, from the start of a window."""

    def __init__(self, variant: str) -> None:
        torch.manual_seed(0)
        bare = GPT.build()
        self._model: nn.Module = DistributedDataParallel(bare) if dist.is_initialized() else bare
        self._optimizer = torch.optim.SGD(bare.parameters(), lr=1e-5, momentum=0.9)
        self._inputs = GPT.inputs()
        self._kfac = None
        if variant != SGD:
            self._kfac = KFAC(self._model, sections(variant), optimizer=self._optimizer)
        self.step()
        if self._kfac is not None:
            self._kfac.steps = INVERSE_EVERY - 1
        self.step()

    def step(self) -> None:
        GPT.loss(self._model(self._inputs), self._inputs).backward()
        if self._kfac is not None:
            self._kfac.step()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def close(self) -> None:
        if self._kfac is not None:
            self._kfac.remove()


def timed(stepper: Stepper) -> tuple[float, float]:
    """Take a step; return the slowest rank's seconds by the clock, and the most CPU seconds of a training thread."""
    if dist.is_initialized():
        dist.barrier()
    clock, thread = time.perf_counter(), time.thread_time()
    stepper.step()
    seconds = torch.tensor([time.perf_counter() - clock, time.thread_time() - thread], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds[0].item(), seconds[1].item()


def quantile(ordered: list[float], share: float) -> float:
    """Return the value that a share of the ordered values doesn't exceed, one of them."""
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


def summarize(seconds: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(seconds)
    values = {name: quantile(ordered, share) for name, share in QUANTILES.items()}
    return {
        **values,
        "mean": sum(ordered) / len(ordered),
        "p99/p50": values["p99"] / values["p50"],
        "max/p50": values["max"] / values["p50"],
    }


def run_rank(rank: int, size: int, rendezvous: str, variants: list[str], out: Path) -> None:
    torch.set_num_threads(1)
    if size > 1:
        os.environ["LOCAL_WORLD_SIZE"] = str(size)
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    for variant in variants:
        stepper = Stepper(variant)
        seconds = [timed(stepper) for _ in range(INVERSE_EVERY)]
        stepper.close()
        if rank == 0:
            save(size, variant, seconds, out)
    if size > 1:
        dist.destroy_process_group()


def save(size: int, variant: str, both: list[tuple[float, float]], out: Path) -> None:
    """Put a row into the output, in the place of one that measured the same."""
    kinds = dict(zip(KINDS, zip(*both, strict=True), strict=True))
    found = {kind: summarize(values) for kind, values in kinds.items()}
    for kind, values in found.items():
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(f"{size} rank{'s' * (size > 1)}, {variant}, {kind}: {numbers}", flush=True)
    rows = json.loads(out.read_text())["results"] if out.exists() else []
    rows = [row for row in rows if (row["ranks"], row["variant"]) != (size, variant)]
    row = {
        "ranks": size,
        "variant": variant,
        "sections": None if variant == SGD else sections(variant),
        **found,
        "steps": {kind: [round(value, 5) for value in values] for kind, values in kinds.items()},
    }
    rows.append(row)
    rows.sort(key=lambda row: (row["ranks"], [SGD, *VARIANTS].index(row["variant"])))
    settings = {
        "workload": f"GPT of 6 layers, 384 wide; {SEQUENCES} sequences of {TOKENS} tokens a rank",
        "factor_every": FACTOR_EVERY,
        "inverse_every": INVERSE_EVERY,
        "threads_a_rank": "1, and one more where inverses are solved beside training",
    }
    write("step_times", out, settings, rows)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the ordered step times of each variant: a column for each number of ranks, a row for each kind of second."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({row["ranks"] for row in rows})
    looks = dict(zip([SGD, *VARIANTS], [(":", "o"), ("-", "v"), ("--", "s"), ("-.", "D")], strict=True))
    figure, axes = plt.subplots(
        len(KINDS), len(sizes), figsize=(6 * len(sizes), 8), squeeze=False, layout="constrained"
    )
    for (kind, label), line in zip(KINDS.items(), axes, strict=True):
        for axis, size in zip(line, sizes, strict=True):
            for row in (row for row in rows if row["ranks"] == size):
                ordered = sorted(row["steps"][kind])
                shares = [100 * (place + 1) / len(ordered) for place in range(len(ordered))]
                style, mark = looks[row["variant"]]
                axis.plot(
                    shares,
                    ordered,
                    linestyle=style,
                    marker=mark,
                    markevery=[*range(0, len(ordered), 12), len(ordered) - 1],
                    markersize=5,
                    linewidth=1.6,
                    label=f"{row['variant']}: p99/p50 {row[kind]['p99/p50']:.2f}",
                )
            axis.set(
                title=f"{size} rank{'s' * (size > 1)}",
                xlabel="steps, shortest first (%)",
                ylabel=label,
                ylim=(0, None),
            )
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small", loc="upper left")
    figure.suptitle(f"GPT 6×384, {SEQUENCES}×{TOKENS} tokens a rank: statistics every 10 steps, inverses every 100")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--variants", nargs="+", choices=[SGD, *VARIANTS], default=[SGD, *VARIANTS])
    parser.add_argument("--out", type=Path, default=RESULTS / "step_times.json")
    arguments = parser.parse_args()
    for size in arguments.ranks:
        with tempfile.TemporaryDirectory() as directory:
            work = (str(Path(directory) / "rendezvous"), arguments.variants, arguments.out)
            mp.spawn(run_rank, args=(size, *work), nprocs=size, join=True)
    draw(json.loads(arguments.out.read_text())["results"], arguments.out.with_suffix(".png"))
    print(arguments.out)


if __name__ == "__main__":
    main()
