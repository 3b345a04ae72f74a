"""Time and bytes of sharded gradients to their owners and back, against two other ways.

The GPT's gradients, after one backward pass under an engine, make the round trip in three ways, in turn:

    exchange    K-FAC's own: slices to owners and back, one pair of all-to-alls a bucket
    public      the engine's public calls: DeepSpeed's safe_get/set_full_grad, DTensor's full_tensor: a collective or
                more for each parameter
    gather      every gradient to every rank by one all-gather of what each rank holds, and its own slices back

No way preconditions anything; afterwards the gradients must be what they were. Beside the exchange's bytes stand those
of the formula: every rank sends what it holds and does not own, and owners send it back.

    python -m benchmarks.sharded_exchange [--ranks 2] [--engines zero1 zero2 zero3 fsdp2] [--rounds 15] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from benchmarks.reporting import spread, write
from benchmarks.timing import seconds_of
from benchmarks.workloads import WORKLOADS
from kfac_dist import KFAC
from kfac_dist.engines import Engine, as_engine

WORKLOAD = "gpt-6x384-8x128"
ENGINES = ("zero1", "zero2", "zero3", "fsdp2")
CONFIG = {"curvature": {"factor_every": 1000, "loss_terms": "token"}, "inversion": {"inverse_every": 1000}}


class Setting:
    """A model under an engine, after a backward pass."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        workload = WORKLOADS[WORKLOAD]
        model, inputs = workload.build(), workload.inputs()
        self.name = name
        self.module = model
        self.deepspeed = _deepspeed(model, int(name[-1])) if name.startswith("zero") else None
        if self.deepspeed is None:
            _shard(model)
        self.engine: Engine = as_engine(model if self.deepspeed is None else self.deepspeed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0) if self.deepspeed is None else None
        self.kfac = KFAC(self.engine, CONFIG, optimizer=optimizer)
        self.names = [parameter for block in self.kfac.coverage.blocks for parameter in block.parameters]
        if self.deepspeed is None:
            workload.loss(model(inputs), inputs).backward()
        else:
            self.deepspeed.backward(workload.loss(self.deepspeed(inputs), inputs))

    def exchange(self) -> None:
        transport, gradients = self.kfac._parts.transport, self.engine.gradients()
        transport.collect(gradients)
        for groups in transport.arriving():
            transport.send(groups, [group.gradient for group in groups])
        transport.deliver(gradients, None)

    def public(self) -> None:
        parameters = dict(self.module.named_parameters())
        for name in self.names:
            parameter = parameters[name]
            if self.deepspeed is None:
                _through_dtensor(parameter)
            else:
                from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

                safe_set_full_grad(parameter, safe_get_full_grad(parameter))

    def gather(self) -> None:
        layout, local = self.engine.layout(self.names), self.engine.gradients()
        rank, size = dist.get_rank(), dist.get_world_size()
        held = [layout.held_by(other) for other in range(size)]
        longest = max(sum(piece.numel for piece in pieces.values()) for pieces in held)
        mine = torch.zeros(longest)
        own = torch.cat([local[name] for name in held[rank]]) if held[rank] else mine[:0]
        mine[: own.numel()] = own
        everything = torch.empty(size * longest)
        dist.all_gather_into_tensor(everything, mine)
        full = {name: torch.empty(layout[name].numel) for name in self.names}
        for other, pieces in enumerate(held):
            start = other * longest
            for name, piece in pieces.items():
                full[name][piece.start : piece.stop] = everything[start : start + piece.numel]
                start += piece.numel
        for name, piece in held[rank].items():
            local[name].copy_(full[name][piece.start : piece.stop])

    def formula_bytes(self) -> int:
        """Return this rank's sent elements: held and not owned, and owned and not held."""
        layout, rank = self.engine.layout(self.names), dist.get_rank()
        elements = 0
        for name, block in self.kfac.monitor.plan.blocks.items():
            for parameter in self._block(name).parameters:
                held = layout[parameter].held_by(rank)
                here = 0 if held is None else held.numel
                elements += here if block.column != rank else layout[parameter].numel - here
        return 4 * elements

    def _block(self, name: str) -> Any:
        return next(block for block in self.kfac.coverage.blocks if block.name == name)


def _deepspeed(model: nn.Module, stage: int) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # An extension for inference is compiled here otherwise, half a minute for nothing.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    deepspeed.init_distributed("gloo", verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _shard(model: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for child in model.modules():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for layer in child:
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _through_dtensor(parameter: nn.Parameter) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    grad = parameter.grad
    assert isinstance(grad, DTensor)
    whole = grad.full_tensor()
    grad.to_local().copy_(distribute_tensor(whole, grad.device_mesh, grad.placements, src_data_rank=None).to_local())


def measure(name: str, rounds: int) -> dict[str, Any]:
    setting = Setting(name)
    before = {key: value.clone() for key, value in setting.engine.gradients().items()}
    ways: dict[str, Callable[[], None]] = {
        "exchange": setting.exchange,
        "public": setting.public,
        "gather": setting.gather,
    }
    traffic = setting.kfac.communicator.traffic
    collectives, sent = traffic.total_calls, traffic.total_bytes
    setting.exchange()
    counted = torch.tensor([traffic.total_bytes - sent, setting.formula_bytes()], dtype=torch.float64)
    collectives = traffic.total_calls - collectives
    dist.all_reduce(counted)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for action in ways.values():
        action()
    for _ in range(rounds):
        for way, action in ways.items():
            seconds[way].append(seconds_of(action))
    after = setting.engine.gradients()
    unchanged = all(torch.equal(after[key], value) for key, value in before.items())
    spreads = {way: spread(values) for way, values in seconds.items()}
    base = spreads["exchange"]["median"]
    setting.kfac.remove()
    if setting.deepspeed is not None:
        setting.deepspeed.destroy()
    return {
        "engine": name,
        "ranks": dist.get_world_size(),
        "parameters": len(setting.names),
        "elements": sum(setting.engine.layout(setting.names)[key].numel for key in setting.names),
        "seconds": spreads,
        "times_the_exchange": {way: spreads[way]["median"] / base for way in ways},
        "exchange_collectives": collectives,
        "exchange_bytes_all_ranks": int(counted[0]),
        "formula_bytes_all_ranks": int(counted[1]),
        "bytes_over_formula": float(counted[0] / counted[1]),
        "gradients_unchanged": unchanged,
    }


def run_rank(rank: int, size: int, rendezvous: str, engines: list[str], rounds: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    results = []
    for name in engines:
        results.append(measure(name, rounds))
        if rank == 0:
            ratios = ", ".join(f"{way} {ratio:.2f}" for way, ratio in results[-1]["times_the_exchange"].items())
            print(f"{name}, {size} ranks: {ratios}; bytes {results[-1]['bytes_over_formula']:.3f} of the formula")
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    for size in arguments.ranks:
        with tempfile.TemporaryDirectory() as directory:
            out = str(Path(directory) / "results.pt")
            rendezvous = str(Path(directory) / "rendezvous")
            mp.spawn(
                run_rank, args=(size, rendezvous, arguments.engines, arguments.rounds, out), nprocs=size, join=True
            )
            results += torch.load(out)
    settings = {"workload": WORKLOAD, "rounds": arguments.rounds, "threads_a_rank": 1, "dtype": "float32"}
    print(write("sharded_exchange", arguments.out, settings, results))


if __name__ == "__main__":
    main()
