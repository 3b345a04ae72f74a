"""Parts of several owners to all ranks: a broadcast an owner, or scatter and all-gather of all at once.

The buffer is what ResNet-50's inverses make, scaled down, owned evenly or as `assignment: balanced` gives them to as
many ranks. Both ways are run one after the other on the same buffer, with a barrier before; what arrives is compared.
gloo, one thread a rank; on this machine, and from host to host (network namespaces) over links that `tc` limits.

    python -m benchmarks.sharing [--size 8] [--rates none 1gbit] [--megabytes 1 16] [--rounds 9] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.launch import join, run_ranks
from benchmarks.models import ResNet50
from benchmarks.reporting import RESULTS, spread, write
from benchmarks.timing import seconds_of
from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.curvature.blocks import find_blocks
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.distributed.movement import owner_buffer as segments
from kfac_dist.distributed.movement.owner_buffer import Segment, SegmentLayout, share_segments, sharing_traffic
from kfac_dist.preconditioner.plan import build_plan

WAYS = {"broadcasts": 10**9, "scatter and all-gather": 0}
"""Owners up to which each broadcasts its part."""


def shares(ownership: str, size: int) -> list[float]:
    """Return which share of the buffer each rank owns."""
    if ownership == "even":
        return [1 / size] * size
    config = parse_kfac({"inversion": {"max_factor_dim": 2048}, "distribution": {"assignment": "balanced"}})
    with torch.device("meta"):
        blocks = find_blocks(ResNet50(), config.curvature).blocks
    plan = build_plan(blocks, config, world_size=size)
    own = [sum(unit.numel for unit in plan.owned(rank)) for rank in range(size)]
    return [numel / sum(own) for numel in own]


def measure(comm: Communicator, ownership: str, nbytes: int, rounds: int) -> dict[str, Any]:
    """Time both ways in turn, on the same parts."""
    numels = [round(share * nbytes / 4) for share in shares(ownership, comm.size)]
    found: dict[str, Any] = {"ownership": ownership, "bytes": 4 * sum(numels), "part_bytes": [4 * n for n in numels]}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for index in range(rounds + 1):
        for way, most in WAYS.items():
            segments.MOST_BROADCASTS = most
            layout = SegmentLayout([Segment(str(rank), numel, rank) for rank, numel in enumerate(numels)], comm.size)
            expected = torch.arange(layout.numel, dtype=torch.float32)
            buffer = torch.zeros(layout.sharing_numel)
            layout.part(buffer, comm.rank).copy_(layout.part(expected, comm.rank))
            took = seconds_of(lambda: share_segments(comm, buffer, layout, label="shared").wait())  # noqa: B023
            assert torch.equal(buffer[: layout.numel], expected)
            if index:  # the first makes connections
                seconds[way].append(took)
            counted = [sharing_traffic(numels, rank, 4) for rank in range(comm.size)]
            found[way] = {
                "collectives": max(calls for calls, _ in counted),
                "most_bytes_sent_by_a_rank": max(sent for _, sent in counted),
            }
    for way in WAYS:
        found[way]["seconds"] = spread(seconds[way])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--rates", nargs="+", default=["none", "1gbit"], help="of each direction, in tc's words")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "sharing.json")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        join(arguments.rank, arguments.size, arguments.address)
        comm = build_communicator(60.0)
        rows = [
            measure(comm, ownership, int(1e6 * megabytes), arguments.rounds)
            for megabytes in arguments.megabytes
            for ownership in ("even", "balanced")
        ]
        if comm.rank == 0:
            arguments.out.write_text(json.dumps(rows))
        dist.destroy_process_group()
        return
    results = []
    for rate in arguments.rates:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "rows.json"
            megabytes = [str(value) for value in arguments.megabytes]
            words = ["--megabytes", *megabytes, "--rounds", str(arguments.rounds), "--out", str(out)]
            run_ranks("benchmarks.sharing", arguments.size, None if rate == "none" else rate, words)
            results += [{"link": rate, **row} for row in json.loads(out.read_text())]
    for row in results:
        times = ", ".join(f"{way} {1e3 * row[way]['seconds']['median']:.1f} ms" for way in WAYS)
        print(f"{row['link']:8} {row['bytes'] / 1e6:6.1f} MB {row['ownership']:9} {times}")
    settings = {"ranks": arguments.size, "rounds": arguments.rounds, "threads_a_rank": 1, "backend": "gloo"}
    print(write("sharing", arguments.out, settings, results))


if __name__ == "__main__":
    main()
