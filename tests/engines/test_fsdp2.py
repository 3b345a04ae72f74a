"""Models under `fully_shard` train as one process does: uneven rows, empty shards, replicas, every option of both."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard

from kfac_dist import KFAC
from kfac_dist.distributed.movement.gradient_layout import Slice
from kfac_dist.engines import as_engine
from kfac_dist.errors import ConfigError, ModelError
from tests.engines.fsdp2_runs import MAKE, Case, Training, mesh_of, needs_sharding, sharded, train_all
from tests.harness import run_ranks
from tests.preconditioner.test_invariance import TOLERANCE, configuration
from tests.preconditioner.workloads import place, relative

pytestmark = needs_sharding

# What a forward pass in bf16 leaves of equality between numbers of ranks: eight bits of mantissa, through an inverse.
BF16_TOLERANCE = 2e-2

TOKEN = {"loss_terms": "token"}
LEAN = {"reduction": "reduce_scatter", "reduce_every": "step"}

# Without the noise that AdamW makes of gradients that are zero but for rounding.
ORTHOGONAL = {
    "direction": "orthogonal",
    "orthogonal": {"iteration": "polar_express", "iterations": 8},
    "first_order": {"eps": 1e-3},
}

CASES = [
    Case("mlp", {**configuration("eigen"), "update": ORTHOGONAL}, steps=8),
    Case("mlp", configuration()),
    Case("mlp", configuration("eigen", **LEAN, buckets=2)),
    Case("mlp", configuration("newton_schulz", fisher="mc", inversion={"stagger": 2, "inverse_lag": 1})),
    Case("mlp", configuration(fisher="type2", assignment="balanced", placement="owner")),
    Case("mlp", configuration(), micro_batches=2, clip=0.05, adam=True),
    Case("mlp", {**configuration(**LEAN), "update": {"l2": 0.01}}, micro_batches=3),
    Case("mlp", configuration(fisher="mc"), frozen=("2",)),
    Case("conv", configuration(buckets=16)),
    Case("conv", configuration("ekfac", inversion={"rescale_every": 1}, **LEAN)),
    Case("token", configuration("eigen", curvature=TOKEN, reduction="reduce_scatter")),
    Case("token", configuration(curvature=TOKEN, **LEAN), clip=0.05),
    Case("tied", configuration(curvature=TOKEN)),
    Case("attention", configuration(assignment="balanced")),
    Case("attention", configuration("newton_schulz", **LEAN), frozen=("attention.out_proj",)),
    Case("scaled", configuration(curvature={"uncovered": "diagonal"})),
    Case("scaled", configuration(), clip=0.05),
    Case("scaled", {**configuration(), "update": {"graft": "sign"}}),
    Case("token", {**configuration(curvature=TOKEN, **LEAN), "update": {"graft": "gradient"}}),
    Case("checkpointed", configuration()),
    Case("reentrant", configuration(**LEAN)),
    Case("gpt2", configuration(curvature=TOKEN, inversion={"max_factor_dim": 6}, **LEAN)),
]
BF16 = [
    Case("mlp", configuration(), policy={"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}),
    Case("mlp", configuration(**LEAN), policy={"param_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16}),
    Case(
        "token",
        configuration(curvature=TOKEN),
        policy={"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "output_dtype": torch.float32},
    ),
    Case("checkpointed", configuration(), policy={"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}),
]
# (2, 1) holds every gradient whole, (2, 2) in two halves, twice.
MESHES = [((2,), 2), ((3,), 1), ((2, 1), 4), ((2, 2), 3)]


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Tensor]]:
    in_bf16: list[dict[str, Tensor]]
    [in_bf16] = run_ranks(1, train_all, BF16, (1,))
    return [*train_all(CASES, None), *in_bf16]


@pytest.mark.parametrize(("shape", "every"), MESHES, ids=[str(shape) for shape, _ in MESHES])
def test_rows_change_nothing(shape: tuple[int, ...], every: int, alone: list[dict[str, Tensor]]) -> None:
    """All cases on three ranks, where rows are uneven and shards empty; elsewhere every `every`-th, for time."""
    cases = [*CASES, *BF16][::every]
    wrong = {}
    for results in run_ranks(torch.Size(shape).numel(), train_all, cases, shape, timeout=240):
        for case, result, wanted in zip(cases, results, alone[::every], strict=True):
            error = relative(result, wanted)
            if not error < (BF16_TOLERANCE if case.policy else TOLERANCE):
                wrong[f"{case}"] = error
    assert not wrong


def train_on_part(case: Case, names: tuple[str, ...]) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("pipeline", "replicate", "shard"))
    training = Training(case, mesh[names])
    training.train()
    training.close()
    return training.parameters()


@pytest.mark.parametrize("names", [("replicate",), ("replicate", "shard")], ids=str)
def test_the_mesh_may_be_part_of_the_world(names: tuple[str, ...], alone: list[dict[str, Tensor]]) -> None:
    for result in run_ranks(4, train_on_part, CASES[0], names):
        assert relative(result, alone[0]) < TOLERANCE


def views() -> None:
    """Gradients and parameters are the optimizer's own memory, flat, and only what the rank holds."""
    training = Training(CASES[0], mesh_of((3,)))
    engine = training.engine
    assert engine.sharded
    assert engine.shard_size(3) == 3
    training.step(0)
    rank = place()[0]
    layout = engine.layout(["2.weight", "4.bias"])
    assert [layout["4.bias"].held_by(other) for other in range(3)] == [Slice(0, 0, 2), Slice(1, 2, 4), None]
    gradients, parameters = engine.gradients(), engine.parameters()
    names = [name for name, _ in training.model.named_parameters()]
    assert list(gradients) == list(parameters) == names[: 6 if rank < 2 else 4]
    for name, parameter in training.model.named_parameters():
        if name in gradients:
            piece = layout[name].held_by(rank) if name in layout else None
            assert piece is None or gradients[name].shape == (piece.numel,)
            gradients[name].fill_(7.0)
            assert bool((parameter.grad.to_local() == 7).all())
            parameters[name].fill_(8.0)
            assert bool((parameter.to_local() == 8).all())
    assert bool(engine.finite())
    if rank == 1:
        gradients["0.weight"][0] = float("nan")
    assert bool(engine.finite()) == (rank != 1)
    training.close()


def test_slices_are_views_of_what_the_optimizer_sees() -> None:
    run_ranks(3, views)


def after_a_forward_pass() -> None:
    """The outermost module keeps its whole parameters after a forward pass that no backward follows."""
    model = sharded(MAKE["mlp"](), mesh_of((2,)))
    with torch.no_grad():
        model(torch.randn(2, 8))
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    kfac = KFAC(model, {"update": {"kl_clip": None}})
    model(torch.randn(2, 8)).square().mean().backward()
    kfac.step()
    assert all(isinstance(p.grad, DTensor) for p in model.parameters())
    kfac.remove()


def test_kfac_may_come_after_a_forward_pass() -> None:
    run_ranks(2, after_a_forward_pass)


def refusals() -> list[str]:
    def plain(model: nn.Module) -> None:
        fully_shard(model, ignored_params={model[2].weight})

    def columns(model: nn.Module) -> None:
        fully_shard(model, shard_placement_fn=lambda p: Shard(p.ndim - 1))

    def apart(model: nn.Module) -> None:
        fully_shard(model[0], mesh=init_device_mesh("cpu", (1,), mesh_dim_names=("other",)))
        fully_shard(model, mesh=mesh_of((1,)))

    messages = []
    for make in (plain, columns, apart):
        model = MAKE["mlp"]()
        make(model)
        with pytest.raises(ModelError) as caught:
            as_engine(model)
        messages.append(str(caught.value))
    frozen = MAKE["mlp"]()
    frozen[2].requires_grad_(False)
    fully_shard(frozen, ignored_params=set(frozen[2].parameters()))
    as_engine(frozen)  # what isn't trained may lie where it wants
    with pytest.raises(ModelError) as caught:
        as_engine(fully_shard(nn.Linear(2, 2).requires_grad_(False)))
    messages.append(str(caught.value))
    with pytest.raises(ModelError) as caught:
        as_engine(nn.Sequential(FullyShardedDataParallel(MAKE["mlp"](), device_id=torch.device("cpu"))))
    return [*messages, str(caught.value)]


def test_what_it_cannot_serve_is_refused() -> None:
    [messages] = run_ranks(1, refusals)
    for pattern, message in zip(REFUSED, messages, strict=True):
        assert re.match(pattern, message), message


REFUSED = [
    r"2\.weight is trained, but not sharded: .* Apply fully_shard to the whole model .* or freeze it",
    r"0\.weight is placed as \(Shard\(dim=1\),\): .* leave out shard_placement_fn and tensor parallelism",
    r"0\.weight and 2\.weight are sharded over different meshes, .* K-FAC needs one mesh for all parameters",
    r"the model has no trained parameter",
    r"the model is wrapped in FullyShardedDataParallel, .* shard it by torch.distributed.fsdp.fully_shard instead",
]


def refused_placement() -> str:
    with pytest.raises(ConfigError) as caught:
        Training(Case("mlp", configuration(placement="replicated")), mesh_of((2,)))
    return str(caught.value)


def test_placements_that_need_whole_gradients_are_refused() -> None:
    for message in run_ranks(2, refused_placement):
        assert "placement: replicated needs every gradient whole on every rank" in message
