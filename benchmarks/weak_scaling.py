"""Weak scaling: the same batch on every rank of 1 to 4, on this machine and over links of limited rates.

The deep autoencoder, 256 samples a rank. For SGD alone and for each way to distribute K-FAC, steps of each kind are
timed in turn, with a barrier before: ordinary, measuring, and measuring and refreshing. From their medians follows a
step at statistics every 10 and inverses every 100 steps,

    ordinary + (measuring − ordinary) / 10 + (refreshing − measuring) / 100

On this machine ranks share cores: as soon as there are more of them than cores, their wall times say nothing about
scaling. Hence the CPU seconds of a rank stand beside the wall seconds of the slowest: with enough cores, time that
isn't spent on the CPU is communication and waiting. On limited links (network namespaces and `tc`) the network is
the bottleneck, on any number of cores.

Each call replaces its own rows of the output and leaves the others.

    python -m benchmarks.weak_scaling [--ranks 1 2 3 4] [--rates none 200mbit] [--rounds 5] [--out FILE]
                                                                              rates as root; needs iproute2
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.launch import join, run_ranks
from benchmarks.reporting import RESULTS, spread, write
from benchmarks.timing import seconds_of
from benchmarks.workloads import WORKLOADS
from kfac_dist import KFAC
from kfac_dist.distributed.communicators.traffic import all_reduce_bytes

WORKLOAD = "autoencoder-b256"
BARE = "SGD"
METHODS: dict[str, dict[str, Any]] = {
    BARE: {},
    **{
        f"{placement}, {dtype} factors": {
            "placement": placement,
            "assignment": "balanced",
            "communication_dtype": dtype,
        }
        for placement, dtype in itertools.product(("replicated", "owner"), ("float32", "bfloat16"))
    },
}
# Kinds of four consecutive steps, with statistics every 2 and inverses every 4 steps.
KINDS = ("refreshing", "ordinary", "measuring", "ordinary")
FACTOR_EVERY, INVERSE_EVERY = 10, 100


class Stepper:
    """A model that takes steps with one method."""

    def __init__(self, method: str) -> None:
        torch.manual_seed(0)
        workload = WORKLOADS[WORKLOAD]
        model = workload.build()
        self.numel = sum(parameter.numel() for parameter in model.parameters())
        self.inputs, self.loss = workload.inputs(), workload.loss
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
        self.model: nn.Module = DistributedDataParallel(model) if dist.get_world_size() > 1 else model
        self.kfac: KFAC | None = None
        if method != BARE:
            config = {
                "curvature": {"factor_every": 2},
                "inversion": {"inverse_every": 4, "early_refresh": 0, "damping": 0.1},
                "distribution": METHODS[method],
            }
            self.kfac = KFAC(self.model, config, optimizer=self.optimizer)

    def step(self) -> dict[str, float]:
        """Take a step; return the slowest rank's wall seconds, the mean of the ranks' CPU seconds, and bytes sent."""
        cpu, sent = time.process_time(), self._sent()
        wall = seconds_of(self._step)
        own = torch.tensor([time.process_time() - cpu, float(self._sent() - sent)], dtype=torch.float64)
        dist.all_reduce(own)
        seconds, nbytes = (own / dist.get_world_size()).tolist()
        return {"wall_seconds": wall, "cpu_seconds": seconds, "kfac_bytes": nbytes}

    def _step(self) -> None:
        self.loss(self.model(self.inputs), self.inputs).backward()
        if self.kfac is not None:
            self.kfac.step()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _sent(self) -> int:
        return 0 if self.kfac is None else self.kfac.communicator.traffic.total_bytes


def measure(method: str, rounds: int) -> dict[str, Any]:
    """Time a method's steps by kind."""
    stepper = Stepper(method)
    for _ in KINDS:  # the first steps allocate, and make connections
        stepper.step()
    steps: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _, kind in itertools.product(range(rounds), KINDS):
        steps[kind].append(stepper.step())
    kinds = {
        kind: {key: spread([step[key] for step in own]) for key in ("wall_seconds", "cpu_seconds", "kfac_bytes")}
        for kind, own in steps.items()
    }
    if stepper.kfac is not None:
        stepper.kfac.remove()
    return {
        "method": method,
        "ranks": dist.get_world_size(),
        "kinds": kinds,
        "ddp_bytes": all_reduce_bytes(4 * stepper.numel, dist.get_world_size()),
        **{key: mean(kinds, key) for key in ("wall_seconds", "cpu_seconds", "kfac_bytes")},
    }


def mean(kinds: dict[str, dict[str, dict[str, float]]], key: str) -> float:
    """Return the mean of a step at the intervals that the module names, from the kinds' medians."""
    ordinary, measuring, refreshing = (kinds[kind][key]["median"] for kind in ("ordinary", "measuring", "refreshing"))
    return ordinary + (measuring - ordinary) / FACTOR_EVERY + (refreshing - measuring) / INVERSE_EVERY


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the mean step against the number of ranks: a panel for CPU seconds, and one for each link."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    links = list(dict.fromkeys(row["link"] for row in rows))
    panels = [("none", "cpu_seconds"), *((link, "wall_seconds") for link in links)]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.6), layout="constrained")
    for axis, (link, key) in zip(axes, panels, strict=True):
        for index, method in enumerate(METHODS):
            here = [row for row in rows if row["method"] == method and row["link"] in ("none", link)]
            by_ranks = {row["ranks"]: row for row in here if row["link"] == link or row["ranks"] == 1}
            own = [by_ranks[ranks] for ranks in sorted(by_ranks)]
            axis.plot(
                [row["ranks"] for row in own],
                [1e3 * row[key] for row in own],
                marker="xosD^"[index],
                linestyle=("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))[index],
                markersize=9,
                fillstyle="none",
                label=method,
            )
        place = f"links of {link}" if link != "none" else "this machine"
        axis.set_title(f"{place}: {'CPU of a rank' if key == 'cpu_seconds' else 'wall, slowest rank'}")
        axis.set(xlabel="ranks, 256 samples each", ylabel=f"ms a step at {FACTOR_EVERY}/{INVERSE_EVERY}")
        axis.set_xticks(sorted({row["ranks"] for row in rows}))
        axis.set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--rates", nargs="+", default=["none", "200mbit"], help="in tc's words")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "weak_scaling.json")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        join(arguments.rank, arguments.size, arguments.address)
        rows = [measure(method, arguments.rounds) for method in METHODS]
        if arguments.rank == 0:
            arguments.out.write_text(json.dumps(rows))
        dist.destroy_process_group()
        return
    rows = json.loads(arguments.out.read_text())["results"] if arguments.out.exists() else []
    for rate, size in itertools.product(arguments.rates, arguments.ranks):
        if size == 1 and rate != "none":  # nothing would travel
            continue
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "rows.json"
            words = ["--rounds", str(arguments.rounds), "--out", str(out)]
            run_ranks("benchmarks.weak_scaling", size, None if rate == "none" else rate, words)
            new = [{"link": rate, "rounds": arguments.rounds, **row} for row in json.loads(out.read_text())]
        rows = [*(row for row in rows if (row["link"], row["ranks"]) != (rate, size)), *new]
        for row in new:
            print(
                f"{rate:8} {size} ranks  {row['method']:28} wall {1e3 * row['wall_seconds']:7.1f} ms"
                f"  CPU {1e3 * row['cpu_seconds']:6.1f} ms  MB sent {row['kfac_bytes'] / 1e6:6.2f}"
                f" (DDP {row['ddp_bytes'] / 1e6:.2f})",
                flush=True,
            )
        settings = {"workload": WORKLOAD, "threads_a_rank": 1, "intervals": [FACTOR_EVERY, INVERSE_EVERY]}
        write("weak_scaling", arguments.out, settings, rows)
    draw(rows, arguments.out.with_suffix(".png"))
    print(arguments.out)


if __name__ == "__main__":
    main()
