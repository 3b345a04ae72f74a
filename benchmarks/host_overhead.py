"""CPU time of `kfac.step()` on models whose layers are so small that only Python and dispatch are measured.

    ordinary      nothing is measured: gradients are collected, preconditioned and delivered
    measuring     the statistics that backward measured are closed, too
    refresh       ... and every inverse is solved

Each round measures this package and, with `--against`, another checkout of it in processes of their own, one after the
other, so that both see the same load. A number is the median of a round's steps; the best round is the result.

    python -m benchmarks.host_overhead [--blocks 50 200 1000] [--rounds 5] [--against DIRECTORY] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

KINDS = ("refresh", "ordinary", "measuring", "ordinary")
WIDTH, BATCH = 4, 4
PACKAGE = Path(__file__).resolve().parents[1]


class Parallel(nn.Module):
    """Layers side by side: no gradient vanishes, however many there are."""

    def __init__(self, blocks: int, bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(blocks))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(inputs) for layer in self.layers]).mean(0)


def microseconds(blocks: int, cycles: int, bias: bool) -> dict[str, float]:
    """Return the median CPU microseconds of `kfac.step()` by kind of step, with so many linear layers."""
    from kfac_dist import KFAC

    torch.manual_seed(0)
    model = Parallel(blocks, bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    config = {
        "curvature": {"factor_every": 2, "loss_terms": "sample"},
        "inversion": {"inverse_every": 4, "early_refresh": 0, "damping": 0.1},
    }
    kfac = KFAC(model, config, optimizer=optimizer)
    inputs = torch.randn(BATCH, WIDTH)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for step in range(len(KINDS) * (cycles + 1)):
        # Gradients come anew each step, as `zero_grad` leaves them.
        optimizer.zero_grad()
        (model(inputs).square().sum(1).mean()).backward()
        before = time.process_time_ns()
        kfac.step()
        spent = (time.process_time_ns() - before) / 1000
        optimizer.step()
        if step >= len(KINDS):  # the first steps allocate
            found[KINDS[step % len(KINDS)]].append(spent)
    kfac.remove()
    return {kind: statistics.median(values) for kind, values in found.items()}


def _one_process() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(1)
    found = {
        str(blocks): microseconds(blocks, _cycles(blocks, arguments.steps), not arguments.no_bias)
        for blocks in arguments.blocks
    }
    print(json.dumps(found))


def _cycles(blocks: int, steps: int) -> int:
    return max(3, steps * 200 // max(blocks, 200) // len(KINDS))


def _measure(checkout: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    command = [
        *(sys.executable, str(Path(__file__).resolve()), "--one-process"),
        *("--steps", str(arguments.steps), "--blocks", *map(str, arguments.blocks)),
        *(["--no-bias"] if arguments.no_bias else []),
    ]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _best(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    return {
        blocks: {
            kind: {
                "best": round(min(found[blocks][kind] for found in rounds), 1),
                "median": round(statistics.median(found[blocks][kind] for found in rounds), 1),
                "rounds": len(rounds),
            }
            for kind in dict.fromkeys(KINDS)
        }
        for blocks in rounds[0]
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=160, help="steps a round, with 200 blocks or fewer")
    parser.add_argument("--no-bias", action="store_true", help="layers without a bias: one parameter a block")
    parser.add_argument("--against", type=Path, help="another checkout, measured in the same run as `before`")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one-process", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    from benchmarks.reporting import write

    arguments = _parser().parse_args()
    checkouts = {"after": PACKAGE} | ({} if arguments.against is None else {"before": arguments.against.resolve()})
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in checkouts}
    for _ in range(arguments.rounds):
        for name, checkout in checkouts.items():
            found[name].append(_measure(checkout, arguments))
    settings = {
        "unit": "CPU microseconds of kfac.step(): median of a round's steps, best and median of the rounds",
        "layers": f"nn.Linear({WIDTH}, {WIDTH}{', bias=False' if arguments.no_bias else ''})",
        "rounds": arguments.rounds,
        "threads": 1,
    }
    results = {name: _best(rounds) for name, rounds in found.items()}
    print(write("host_overhead", arguments.out, settings, results))


if __name__ == "__main__":
    if "--one-process" in sys.argv:
        _one_process()
    else:
        main()
