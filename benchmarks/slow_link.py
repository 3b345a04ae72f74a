"""Bytes and seconds of K-FAC's distribution options over a slow link.

Two hosts that are network namespaces of this machine, a rank each, joined by a link that `tc` limits. For every way to
distribute (how factors are reduced, in which precision, packed or not, and who preconditions) the collectives of the
deep autoencoder are run on the sizes and buffers that K-FAC runs them on, one after the other, with a barrier before:

    reduction    once a refresh: statistics become global
    sharing      once a refresh: inverses reach all ranks (placement replicated only)
    updates      once a step: preconditioned gradients reach all ranks (placement owner only)

Bytes are those that both ranks send: by the counters of K-FAC's communicator, and as the network interfaces counted
them, headers included. The gradients' own all-reduce, which DDP does at every step, stands beside them.

gloo sends large messages of opposite directions at the same time or one after the other, by chance: sharing and updates
take one of two times, which the quartiles show.

    python -m benchmarks.slow_link [--rate 100mbit] [--rounds 3] [--out FILE]     as root; needs iproute2
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.reporting import RESULTS, spread, write
from benchmarks.timing import seconds_of
from benchmarks.workloads import WORKLOADS
from kfac_dist import KFAC
from kfac_dist.distributed.movement.owner_buffer import share_segments
from kfac_dist.preconditioner.invert import refresh
from tests.hosts import Hosts, missing

WORKLOAD = "autoencoder-b256"
SIZE = 2
PARTS = ("reduction", "sharing", "updates")
PATIENCE = timedelta(seconds=60)
INVERSE_EVERY = 100  # over which the last column of the table spreads a refresh


class Variant:
    """One way to distribute, with its bytes and seconds."""

    def __init__(self, reduction: str, dtype: str, packed: bool, placement: str) -> None:
        self.names = {"reduction": reduction, "dtype": dtype, "packed": packed, "placement": placement}
        torch.manual_seed(0)
        workload = WORKLOADS[WORKLOAD]
        self.model = DistributedDataParallel(workload.build())
        self.inputs = workload.inputs()
        self.loss = workload.loss
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        distribution = {
            "reduction": reduction,
            "communication_dtype": dtype,
            "pack_triangles": packed,
            "placement": placement,
            "assignment": "balanced",
            "overlap": False,
        }
        every = {"curvature": {"factor_every": 1}, "inversion": {"inverse_every": 1}}
        self.kfac = KFAC(self.model, {**every, "distribution": distribution}, optimizer=optimizer)
        self._measure()
        self.kfac.step()  # lays buffers out, and looks at the loss's scale
        (self.wire,) = self.kfac._parts.refresh._wires.values()

    def measure(self, rounds: int) -> dict[str, Any]:
        seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        counted = dict.fromkeys(PARTS, 0)
        seen = dict.fromkeys(PARTS, 0)
        for _ in range(rounds):
            self._measure()
            actions = {"reduction": self._reduce, "sharing": self._share, "updates": self._return_updates()}
            for part, action in actions.items():
                took, counted[part], seen[part] = self._timed(action)
                seconds[part].append(took)
            self.kfac.steps += 1
            self.kfac._core.begin()
        self.kfac.remove()
        spreads = {part: spread(values) for part, values in seconds.items()}
        median = {part: spreads[part]["median"] if counted[part] else 0.0 for part in PARTS}
        return {
            **self.names,
            "bytes": counted,
            "bytes_on_interfaces": seen,
            "seconds": {part: spreads[part] for part in PARTS if counted[part]},
            "seconds_a_step": median["updates"] + (median["reduction"] + median["sharing"]) / INVERSE_EVERY,
        }

    def _measure(self) -> None:
        self.model.zero_grad()
        with self.model.no_sync():  # DDP's own traffic is timed once, by itself
            self.loss(self.model(self.inputs), self.inputs).backward()

    @torch.no_grad()
    def _reduce(self) -> None:
        self.kfac._parts.measurement.finish(
            self.kfac._engine.finite_everywhere(self.kfac.communicator), refreshes=False
        )

    def _share(self) -> None:
        column = self.kfac._parts.refresh._sharing
        if column.size > 1:
            buffer = self.wire.sharing_buffer(torch.float32, torch.device("cpu")).zero_()
            share_segments(column, buffer, self.wire.layout, label=refresh.LABEL).wait()

    @torch.no_grad()
    def _return_updates(self) -> Callable[[], None]:
        transport, gradients = self.kfac._parts.transport, self.kfac.solver_access.engine.gradients()
        transport.collect(gradients)
        for groups in transport.arriving():
            transport.send(groups, [group.gradient for group in groups])
        return torch.no_grad()(lambda: transport.deliver(gradients, None))

    def _timed(self, action: Callable[[], None]) -> tuple[float, int, int]:
        traffic = self.kfac.communicator.traffic
        before, interface = traffic.total_bytes, sent_by_interface()
        seconds = seconds_of(action)
        both = torch.tensor([traffic.total_bytes - before, sent_by_interface() - interface])
        dist.all_reduce(both)
        return seconds, int(both[0]), int(both[1])


def sent_by_interface() -> int:
    """Return the bytes that this host's interface has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("eth0:"):
            return int(line.split(":")[1].split()[8])
    raise RuntimeError("this host has no eth0")


def gradient_seconds(model: nn.Module, rounds: int) -> dict[str, Any]:
    gradients = torch.zeros(sum(parameter.numel() for parameter in model.parameters()))
    return {
        "bytes": SIZE * 4 * gradients.numel(),
        "seconds": spread([seconds_of(lambda: dist.all_reduce(gradients)) for _ in range(rounds)]),
    }


def run_rank(rank: int, rounds: int, address: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{address}", rank=rank, world_size=SIZE, timeout=PATIENCE)
    results: dict[str, Any] = {"gradients": gradient_seconds(WORKLOADS[WORKLOAD].build(), rounds), "variants": []}
    choices = itertools.product(
        ("replicated", "owner"), ("all_reduce", "reduce_scatter"), ("float32", "bfloat16"), (False, True)
    )
    for placement, reduction, dtype, packed in choices:
        results["variants"].append(Variant(reduction, dtype, packed, placement).measure(rounds))
        if rank == 0:
            print(row(results["variants"][-1]), flush=True)
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


def header() -> str:
    names = ["placement", "reduction", "precision", "packed", *(f"{part}: MB, s" for part in PARTS), "s a step"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def row(variant: dict[str, Any]) -> str:
    cells = [variant["placement"], variant["reduction"], variant["dtype"], "yes" if variant["packed"] else "no"]
    for part in PARTS:
        sent = variant["bytes"][part]
        cells.append(f"{sent / 1e6:.1f}, {variant['seconds'][part]['median']:.2f}" if sent else "")
    cells.append(f"{variant['seconds_a_step']:.3f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="100mbit", help="of each direction of the link, in tc's words")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "slow_link.json")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments.rank, arguments.rounds, arguments.address, arguments.out)
        return
    if why := missing():
        parser.error(f"this machine can't make hosts: {why}")
    with tempfile.TemporaryDirectory() as directory, Hosts(SIZE) as hosts:
        hosts.limit(arguments.rate)
        print(header(), flush=True)
        out = Path(directory) / "results.pt"
        ranks = [
            hosts.start(
                rank + 1,
                [
                    sys.executable, "-m", "benchmarks.slow_link", "--rank", str(rank), "--rounds",
                    str(arguments.rounds), "--address", f"{hosts.name(1)}:29500", "--out", str(out),
                ],
                {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"},
            )
            for rank in range(SIZE)
        ]  # fmt: skip
        if any(rank.wait() for rank in ranks):
            sys.exit("a rank failed")
        results = torch.load(out)
    settings = {
        "workload": WORKLOAD,
        "hosts": f"{SIZE} network namespaces on one machine",
        "rate_of_each_direction": arguments.rate,
        "ranks": SIZE,
        "rounds": arguments.rounds,
        "threads_a_rank": 1,
        "seconds_a_step": f"updates + (reduction + sharing) / {INVERSE_EVERY}",
    }
    print(write("slow_link", arguments.out, settings, results))


if __name__ == "__main__":
    main()
