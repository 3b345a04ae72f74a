"""`kfac-dist calibrate`: measured times of a machine's products, inversions and messages, as a `Hardware`.

    one rank alone        products, second moments, Cholesky, eigendecompositions, copies; what a step takes at no size
    more and more ranks   how much they slow each other down
    all of them           every collective, on every number of consecutive ranks that divides them

Lower quartiles of repeated runs of the very functions that a step calls, of operands that come from memory as they do
there (see `caches`), and the best of a few passes over all of them: what else a machine does only adds, and does so for
a while. Ranks that don't measure wait in a collective.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kfac_dist.config.schema import DType, Solver
from kfac_dist.curvature.factors import FactorKind, Side, Unit
from kfac_dist.curvature.gram import accumulate_gram
from kfac_dist.curvature.inverses.solvers import Task, solve
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.communicators.recording import Collective
from kfac_dist.distributed.startup.bootstrap import World
from kfac_dist.errors import ConfigError
from kfac_dist.planning.machines.caches import Caches
from kfac_dist.planning.machines.fixed_costs import fixed_costs
from kfac_dist.planning.machines.hardware import Hardware, Link

_DTYPES = {DType.FLOAT32: torch.float32, DType.BFLOAT16: torch.bfloat16}
_REPEATS = (3, 9)
_SOLVERS = (Solver.CHOLESKY, Solver.EIGEN)
# Matrices of a batch, to find the cost of each additional one.
_BATCH = 4
_LABEL = "calibration"


@dataclass(frozen=True)
class Effort:
    """The sizes and the time of a calibration.

    Attributes:
        sizes: Of matrices.
        bf16_sizes: Of matrices in bf16, which some processors multiply slowly.
        moved: Bytes of copies.
        messages: Bytes of collectives.
        passes: Over all that one rank measures alone.
        seconds: Of each measurement in a pass, at least.
        crowded_seconds: Seconds of concurrent work of a node's ranks.
        rounds: Steps of each kind for the costs that don't depend on sizes.
    """

    sizes: tuple[int, ...] = (2, 17, 33, 65, 128, 129, 256, 257, 512, 513, 1024, 1025)
    bf16_sizes: tuple[int, ...] = (33, 65, 129, 257, 513)
    moved: tuple[int, ...] = (100_000, 1_000_000, 10_000_000, 100_000_000)
    messages: tuple[int, ...] = (4, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)
    passes: int = 3
    seconds: float = 0.03
    crowded_seconds: float = 0.5
    rounds: int = 15

    @classmethod
    def on(cls, device: torch.device) -> Effort:
        """Return the effort for a device."""
        if device.type != "cuda":
            return cls()
        sizes = (*cls.sizes, 2048, 2049, 4096, 4097)
        return cls(sizes=sizes, bf16_sizes=sizes[2:], messages=(*cls.messages, 100_000_000))


def calibrate(world: World, comm: Communicator, *, name: str = "measured", effort: Effort | None = None) -> Hardware:
    """Measure this machine; collective.

    Args:
        world: This process's rank.
        comm: All ranks.
        name: Name of the result.
        effort: Amount of measurement; by default the one for the device.
    """
    device = world.device
    effort = effort or Effort.on(device)
    alone: dict[str, object] = {}
    if comm.rank == 0:
        alone = _alone(device, effort)
    comm.barrier()
    values = comm.gather_objects(alone, label=_LABEL)[0]
    node = world.local_world_size
    values |= {
        "name": name,
        "kind": "measured",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "notes": (f"kfac-dist calibrate, torch {torch.__version__}, {torch.get_num_threads()} thread(s) a rank",),
        "ranks": comm.size,
        "node_size": node,
        "crowding": crowding(comm, world.local_rank, node, device, effort.crowded_seconds),
        "collectives": {},
        "intra": None,
    }
    if comm.size > 1:
        values["collectives"] = collectives(comm, device, effort.messages)
        if node > 1:
            within = [range(first, first + node) for first in range(0, comm.size, node)]
            values["intra"] = link(comm.split(within), device)
        if comm.size > node:
            across = [range(place, comm.size, node) for place in range(node)]
            values["inter"] = link(comm.split(across), device)
            values["intra"] = values["intra"] or values["inter"]
    return Hardware.model_validate(comm.gather_objects(values, label=_LABEL)[0])


def write(hardware: Hardware, path: Path) -> None:
    """Write the measurements; a reader never sees half of the file.

    Raises:
        ConfigError: The file can't be written.
    """
    text = hardware.model_dump_json(indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        partial.write_text(text + "\n")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"--out: {path} can't be written: {error}") from error


def _alone(device: torch.device, effort: Effort) -> dict[str, object]:
    """Return the measurements of a single rank."""
    passes = [_seconds(device, effort) for _ in range(effort.passes)]
    best = {kind: {n: min(found[kind][n] for found in passes) for n in sizes} for kind, sizes in passes[0].items()}
    found: dict[str, object] = {
        "matmul": {dtype: {n: 2 * n**3 / seconds for n, seconds in best[dtype].items()} for dtype in _DTYPES},
        "gram": {n: n**3 / seconds for n, seconds in best["gram"].items()},
        "memory": {nbytes: nbytes / seconds for nbytes, seconds in best["copy"].items()},
    }
    for solver in _SOLVERS:
        one, some = best[solver], best[f"{solver} together"]
        found[solver] = one
        # At least a tiny part of the first: a batch may cost nothing more than one, but for noise.
        found[f"{solver}_more"] = {n: max((some[n] - one[n]) / (_BATCH - 1), one[n] / 1000) for n in one}
    return found | fixed_costs(device, effort.rounds)


def _seconds(device: torch.device, effort: Effort) -> dict[str, dict[int, float]]:
    """Return the seconds of everything that has a size, by kind and size."""
    clock = _Clock(device, effort.seconds)
    cubes = [n for n in effort.sizes if n >= 32]
    found = {
        str(dtype): {n: clock.time(product(n, kind, device)) for n in sizes}
        for (dtype, kind), sizes in zip(_DTYPES.items(), (cubes, effort.bf16_sizes), strict=True)
    }
    found["gram"] = {n: clock.time(second_moment(n, device)) for n in cubes}
    found["copy"] = {nbytes: clock.time(copy(nbytes, device)) for nbytes in effort.moved}
    for solver in _SOLVERS:
        found[solver] = {n: clock.time(solving(n, 1, solver, device)) for n in effort.sizes}
        found[f"{solver} together"] = {n: clock.time(solving(n, _BATCH, solver, device)) for n in effort.sizes}
    return found


def quartile(taken: Sequence[float]) -> float:
    """Return the lower quartile of some measurements."""
    return sorted(taken)[(len(taken) - 1) // 4]


class _Clock:
    """Times actions whose operands come from memory.

    Args:
        device: The device to measure.
        enough: Seconds of an action's runs after which it isn't repeated more often than it has to be.
    """

    def __init__(self, device: torch.device, enough: float) -> None:
        self._device = device
        self._enough = enough
        self._caches = Caches(device)

    def time(self, action: Callable[[], object]) -> float:
        """Return the seconds of an action that has been run once before."""
        action()
        taken: list[float] = []
        while len(taken) < _REPEATS[0] or (sum(taken) < self._enough and len(taken) < _REPEATS[1]):
            self._caches.evict()
            started = time.perf_counter()
            action()
            _finish(self._device)
            taken.append(time.perf_counter() - started)
        return quartile(taken)


def product(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """Return a batched product of one pair of n×n matrices."""
    left, right = (torch.randn(1, n, n, device=device).to(dtype) for _ in range(2))
    return lambda: torch.bmm(left, right)


def second_moment(n: int, device: torch.device) -> Callable[[], object]:
    """Return the second moments of n rows of n columns, as something to do."""
    rows, out = torch.randn(1, n, n, device=device), torch.zeros(1, n, n, device=device)
    return lambda: accumulate_gram(out, rows, alpha=1.0, beta=0.0)


def copy(nbytes: float, device: torch.device) -> Callable[[], object]:
    """Return a copy that reads and writes so many bytes together."""
    source = torch.randn(int(nbytes / 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def solving(n: int, batch: int, solver: Solver, device: torch.device) -> Callable[[], object]:
    """Return a batch of inverses, as in a refresh; each block's other costs are fixed costs."""
    rows = torch.randn(batch, 2 * n, n, device=device)
    sums = rows.mT @ rows / (2 * n)
    task = Task(Unit("trial", Side.A, 0, 0, n, batch, FactorKind.DENSE), sums, 0.1, None)
    return lambda: solve([task], solver, {})


def crowding(
    comm: Communicator, local_rank: int, node_size: int, device: torch.device, seconds: float
) -> dict[int, float]:
    """Return how many times slower a rank is while so many of its node compute; collective."""
    side = 256
    left, right = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    # More than caches hold: ranks share the way to memory, too.
    pieces = itertools.cycle(torch.randn(2, 40, 200_000, device=device).unbind(1))

    def act() -> None:
        torch.mm(left, right)
        target, source = next(pieces)
        target.copy_(source)

    each = seconds / _Clock(device, seconds).time(act)
    repeats: int = comm.gather_objects(max(1, int(each)), label=_LABEL)[0]
    found: dict[int, float] = {}
    alone = 0.0
    for active in _up_to(node_size):
        comm.barrier()
        own = 0.0
        if local_rank < active:
            started = time.perf_counter()
            for _ in range(repeats):
                act()
            _finish(device)
            own = time.perf_counter() - started
        comm.barrier()
        # All of it, not a quartile: where ranks take turns on a core, a short piece of work often meets no other.
        slowest = max(comm.gather_objects(own, label=_LABEL))
        alone = alone or slowest
        found[active] = max(1.0, slowest / alone)
    return found


def _up_to(count: int) -> Iterator[int]:
    """Yield 1, 2, 4, … and the number itself."""
    yield from sorted({*(2**k for k in range(count.bit_length()) if 2**k <= count), count})


def collectives(
    comm: Communicator, device: torch.device, sizes: Sequence[int]
) -> dict[Collective, dict[int, dict[int, float]]]:
    """Return the seconds of every collective by kind, number of ranks and bytes; collective."""
    found: dict[Collective, dict[int, dict[int, float]]] = {kind: {} for kind in Collective}
    for count in (n for n in range(2, comm.size + 1) if comm.size % n == 0):
        groups = [range(first, first + count) for first in range(0, comm.size, count)]
        group = comm if count == comm.size else comm.split(groups)
        for kind in Collective:
            found[kind][count] = {nbytes: collective(kind, nbytes, group, comm, device) for nbytes in sizes}
    return found


def link(comm: Communicator, device: torch.device) -> Link:
    """Return latency and bandwidth of all-reduces among some ranks; collective."""
    small, large = (collective(Collective.ALL_REDUCE, nbytes, comm, comm, device) for nbytes in (4, 10_000_000))
    hops = 2 * max(1, (comm.size - 1).bit_length())
    moved = 2 * (comm.size - 1) / comm.size * 10_000_000
    return Link(latency=small / hops, bandwidth=moved / max(large - small, 1e-9))


def collective(
    kind: Collective, nbytes: int, group: Communicator, everyone: Communicator, device: torch.device
) -> float:
    """Return the seconds of one collective of so many bytes, all groups of the ranks at once; collective over all."""
    start = _starter(kind, nbytes, group, device)
    repeats = 3 if nbytes > 1_000_000 else 10
    start(0)
    taken = []
    for index in range(repeats):
        everyone.barrier()
        started = time.perf_counter()
        start(index)
        _finish(device)
        taken.append(time.perf_counter() - started)
    slowest: float = max(everyone.gather_objects(quartile(taken), label=_LABEL))
    return slowest


def _starter(kind: Collective, nbytes: int, comm: Communicator, device: torch.device) -> Callable[[int], None]:
    size = comm.size
    part = max(1, nbytes // 4 // size)

    def values(numel: int) -> Tensor:
        return torch.zeros(numel, device=device)

    match kind:
        case Collective.ALL_REDUCE:
            own = values(max(1, nbytes // 4))
            return lambda index: comm.all_reduce(own, label=_LABEL).wait()
        case Collective.BROADCAST:
            own = values(max(1, nbytes // 4))
            return lambda index: comm.broadcast(own, index % size, label=_LABEL).wait()
        case Collective.ALL_GATHER:
            whole, own = values(part * size), values(part)
            return lambda index: comm.all_gather(whole, own, label=_LABEL).wait()
        case Collective.ALL_TO_ALL:
            there, here = values(part * size), values(part * size)
            splits: Sequence[int] = [part] * size
            return lambda index: comm.all_to_all(there, here, splits, splits, label=_LABEL).wait()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
