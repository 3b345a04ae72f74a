"""Options that spare memory: planned bytes are those that are really there, and results stay what they were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.curvature.blocks import LayerCall, MicroBatch, find_blocks
from kfac_dist.curvature.factors import FactorKind, Side
from kfac_dist.curvature.statistics import RunningAverages
from kfac_dist.planning.memory_options import MicroRows, Saving, copied_bytes, savings
from kfac_dist.planning.plan_table import plan_view
from kfac_dist.preconditioner.memory import rank_bytes
from kfac_dist.preconditioner.plan import build_plan
from kfac_dist.training.records.logbook import of_all_ranks
from tests.harness import run_ranks
from tests.preconditioner.precondition.test_transport import ShardedRun
from tests.preconditioner.test_invariance import TOLERANCE, configuration
from tests.preconditioner.workloads import CLASSES, Run, relative

AWAY = {"offload": True}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mlp", configuration(inversion=AWAY)),
    ("mlp", configuration("eigen", inversion={**AWAY, "inverse_lag": 1, "stagger": 2}, placement="owner")),
    ("token", configuration("newton_schulz", inversion=AWAY, curvature={"loss_terms": "token"})),
]


def trained(cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Tensor]]:
    found = []
    for name, config in cases:
        run = Run(name, config)
        found.append(run.train(8))
        offload = run.kfac._parts.offload
        planned = rank_bytes(run.kfac.monitor.plan, run.kfac.solver_access.config, sharded=False)[run.rank]
        if offload is not None:
            assert (planned.inverses, planned.host) == (offload.device_bytes, offload.host_bytes)
        run.close()
    return found


def sharded(cases: list[tuple[str, dict[str, Any]]], size: int) -> list[dict[str, Tensor]]:
    """The same where each rank has slices of gradients, which exchanges bring to the blocks' owners in buckets."""
    found = []
    for name, config in cases:
        run = ShardedRun(name, config, size)
        found.append(run.train(8))
        offload = run.kfac._parts.offload
        planned = rank_bytes(run.kfac.monitor.plan, run.kfac.solver_access.config, sharded=True)[run.rank]
        assert offload is not None
        assert (planned.inverses, planned.host) == (offload.device_bytes, offload.host_bytes)
        run.close()
    return found


def test_what_exchanges_bring_is_preconditioned_from_the_host() -> None:
    by_class = {"class_conditional": {"classes": CLASSES}}
    cases = [
        ("mlp", configuration("eigen", inversion=AWAY, buckets=2)),
        ("conv", configuration(inversion=AWAY, curvature=by_class, reduction="reduce_scatter", reduce_every="step")),
    ]
    expected = trained([(name, without(config)) for name, config in cases])
    for found in run_ranks(2, sharded, cases, 2):
        for parameters, wanted in zip(found, expected, strict=True):
            assert relative(parameters, wanted) < TOLERANCE


def without(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "inversion": {**config["inversion"], "offload": False}}


def test_offloading_changes_no_bit_and_not_with_the_ranks() -> None:
    here = trained([(name, without(config)) for name, config in CASES])
    away = trained(CASES)
    for expected, found in zip(here, away, strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    for ranks in run_ranks(3, trained, CASES):
        for expected, found in zip(here, ranks, strict=True):
            assert relative(found, expected) < TOLERANCE


def test_a_state_comes_from_the_host_and_goes_back() -> None:
    name, config = CASES[0]
    run = Run(name, config)
    run.train(4)
    state = run.kfac.state_dict()
    expected = run.train(4, first=4)
    again = Run(name, without(config))
    again.train(4)
    again.kfac.load_state_dict(state)
    found = again.train(4, first=4)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    run.close()
    again.close()


def planned(
    config: dict[str, Any], world_size: int = 4, shard_size: int = 1, micro: MicroRows | None = None
) -> dict[str, Saving]:
    parsed = parse_kfac(config)
    model = nn.Sequential(*(nn.Linear(64 + index, 65 + index, device="meta") for index in range(8)))
    blocks = find_blocks(model, parsed.curvature).blocks
    found = savings(
        blocks, parsed, world_size=world_size, local_world_size=world_size, shard_size=shard_size, micro=micro
    )
    return {saving.option: saving for saving in found}


def test_each_option_is_planned_with_and_without() -> None:
    found = planned({})
    assert not any(saving.active for saving in found.values())
    values = sum((64 + i + 1) ** 2 + (65 + i) ** 2 for i in range(8))
    assert found["curvature.factor_dtype: bfloat16"].device == 2 * values
    assert found["inversion.inverse_dtype: bfloat16"].device == 2 * values
    sampling = found["curvature.sample_fraction: 0.25"]
    assert (sampling.device, sampling.copies) == (0, 0)  # rows in fp32 are multiplied where autograd holds them
    offload = found["inversion.offload: true"]
    assert offload.without.host == 0
    assert 4 * values <= offload.having.host < 4 * values + 2 * 256 * 8
    assert offload.having.inverses < 4 * values / 3
    scattered = found["distribution: reduce_scatter, step"]
    assert scattered.having.factors < scattered.without.factors / 4
    assert found["distribution.placement: owner"].having.inverses < 4 * values / 3
    on = planned({"inversion": {"offload": True}})["inversion.offload: true"]
    assert on.active
    assert (on.without, on.having) == (offload.without, offload.having)
    excluded = planned({"curvature": {"decay": 0.99}, "inversion": {"solver": "ekfac"}})
    assert found.keys() - excluded.keys() == {"curvature.factor_dtype: bfloat16", "inversion.offload: true"}


def test_an_option_is_on_wherever_it_is_in_effect() -> None:
    sampling = planned({"curvature": {"sample_fraction": 0.125}})["curvature.sample_fraction: 0.125"]
    assert sampling.active
    owner = "distribution.placement: owner"
    for config in ({"placement": "owner"}, {"placement": "hybrid", "grad_worker_fraction": 0.25}):
        assert planned({"distribution": config})[owner].active
    assert not planned({"distribution": {"placement": "hybrid", "grad_worker_fraction": 0.5}})[owner].active
    assert not planned({}, world_size=1)[owner].active
    for placement in ("auto", "owner"):  # slices of gradients know no other placement
        sharded = planned({"distribution": {"placement": placement}}, shard_size=4)
        assert (sharded[owner].active, sharded[owner].required, sharded[owner].device) == (True, True, 0)
    text = _shown(sharded.values())
    assert "distribution.placement: owner        required by the engine" in text


def _shown(options: Iterable[Saving]) -> str:
    plan = build_plan([], parse_kfac({}), world_size=4)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(plan_view(plan, [], {}, options=list(options)))
    return capture.get()


class Copied(TorchDispatchMode):
    """Bytes of new tensors as large as rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.bytes = 0
        self._rows = rows

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        if isinstance(out, Tensor) and out.numel() >= self._rows and out.untyped_storage().data_ptr() not in held:
            self.bytes += out.numel() * out.element_size()
        return out


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_spares_what_measuring_copies(dtype: torch.dtype, counted: bool) -> None:
    model = nn.Sequential(nn.Embedding(6, 24), nn.Linear(24, 40), nn.Linear(40, 16, bias=False))
    samples, positions = 8, 16
    rows = samples * positions
    copied = []
    for fraction in (1.0, 0.25):
        config = parse_kfac({"curvature": {"sample_fraction": fraction, "loss_terms": "token"}})
        blocks = find_blocks(model, config.curvature).blocks
        batch = MicroBatch(
            terms=float(rows),
            loss_terms=config.curvature.loss_terms,
            batch_size=samples,
            divisor=torch.tensor(float(rows)) if counted else float(rows),
            stride=round(1 / fraction),
        )
        plan = build_plan(blocks, config, world_size=1)
        sink = RunningAverages(plan.units, plan.units, decay=0.9, device=torch.device("cpu"))
        assert sink.window.numel()
        most = 0
        for block in blocks:
            embeds = isinstance(block.module, nn.Embedding)
            call = LayerCall(block.module, torch.Size((samples, positions, block.matrix_shape[1])))
            tokens = torch.zeros(samples, positions, dtype=torch.long)
            call.keep(tokens if embeds else torch.randn(samples, positions, block.module.weight.shape[1], dtype=dtype))
            call.take(torch.randn(call.shape, dtype=dtype))
            for side in (Side.A, Side.G):
                if embeds and side is Side.A:  # counts of tokens
                    continue
                with Copied(round(rows * fraction)) as found:
                    block.measure([call], batch, sink, frozenset({side}))
                most = max(most, found.bytes)
        micro = MicroRows({block.name: rows for block in blocks}, dtype is torch.bfloat16, counted)
        assert copied_bytes(blocks, config, micro) == most
        copied.append(most)
    [saving] = [
        saving
        for saving in savings(blocks, config, world_size=1, local_world_size=1, shard_size=1, micro=micro)
        if saving.option == "curvature.sample_fraction: 0.25"
    ]
    assert saving.copies == copied[0] - copied[1] == (4 * rows * 40 * 3 // 4) * (counted + (dtype is torch.bfloat16))
    assert copied_bytes(blocks, config, MicroRows({}, half=True)) is None  # a model that can't be called on meta


@pytest.mark.parametrize("solver", ["cholesky", "newton_schulz", "eigen"])
def test_asymmetry_is_measured_before_anything_mirrors(solver: str) -> None:
    run = Run("conv", configuration(solver, inversion={"inverse_every": 2}))
    assert "asymmetry" not in run.kfac.metrics()
    run.train(2)
    found = run.kfac.monitor.asymmetries()
    names = {unit.name for unit in run.kfac.monitor.plan.units}
    assert {name for name, kind in found if kind == "factor"} == names  # all are dense
    inverses = {name for name, kind in found if kind == "inverse"}
    # Unit-wise blocks are inverted whatever the solver.
    assert inverses == (names if solver != "eigen" else {name for name in names if "/F/" in name})
    assert all(0 <= value < 1e-4 for value in found.values())
    assert run.kfac.metrics()["asymmetry"] == max(found.values())
    if solver == "newton_schulz":
        assert found["stem/A/0", "inverse"] > 0  # products of rounded numbers
    # What is put into one half alone is seen, and named.
    unit = next(unit for unit in run.kfac.monitor.plan.units if unit.name == "stem/G/0")
    run.kfac._parts.averages.sums(unit)[0, 3, 1] += 100.0
    run.train(1, first=2)
    spoilt = run.kfac.monitor.asymmetries()
    assert max(spoilt, key=lambda key: spoilt[key]) == ("stem/G/0", "factor")
    assert spoilt["stem/G/0", "factor"] > 0.1
    run.close()


def packed() -> dict[tuple[str, str], float]:
    run = Run("mlp", configuration(pack_triangles=True))
    run.train(1)
    found = run.kfac.monitor.asymmetries()
    run.close()
    return found


def test_what_a_packed_wire_has_mirrored_is_not_said_to_be_measured() -> None:
    found = [key for rank in run_ranks(3, packed) for key in rank]
    assert {kind for _, kind in found} == {"inverse"}


def spoilt_on_the_last_rank(structure: str) -> tuple[float, dict[str, float], float]:
    """Spoil one half of a factor that rank 2 inverts, before a refresh; metrics, own factors, and metrics before."""
    inversion = {"inverse_every": 2, "solver": "eigen", "structure": structure}
    run = Run("mlp", configuration("eigen", inversion=inversion))
    run.train(2)
    before = run.kfac.metrics()["asymmetry"]
    owners = run.kfac.monitor.plan.assignment.owners
    unit = next(
        unit for unit in run.kfac.monitor.plan.units if owners[unit.name] == 2 and unit.kind is FactorKind.DENSE
    )
    run.kfac._parts.averages.sums(unit)[0, 3, 1] += 100.0
    run.train(1, first=2)
    own = {name: value for (name, kind), value in run.kfac.monitor.asymmetries().items() if kind == "factor"}
    numbers = run.kfac.metrics()
    assert numbers["asymmetry"] == max(run.kfac.monitor.asymmetries().values())
    logged = of_all_ranks(numbers, run.kfac.communicator)["asymmetry"]
    run.close()
    return logged, own, before


@pytest.mark.parametrize("structure", ["block_diagonal", "block_tridiagonal"])
def test_the_largest_asymmetry_of_any_rank_is_logged(structure: str) -> None:
    found = run_ranks(3, spoilt_on_the_last_rank, structure)
    [largest] = {value for value, _, _ in found}
    assert largest > 0.1
    assert max(value for _, _, value in found) < 1e-4
    assert all(max(own.values()) < 1e-4 for _, own, _ in found[:2])
    # Each factor is measured by one rank: who inverts it.
    names = [name for _, own, _ in found for name in own]
    assert len(names) == len(set(names)) > 3
