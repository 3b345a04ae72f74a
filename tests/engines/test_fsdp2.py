"""Models under `fully_shard` train as one process does: uneven rows, empty shards, replicas, every option of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engines.fsdp2_runs import Case, train_all
from tests.harness import run_ranks
from tests.preconditioner.test_invariance import TOLERANCE, configuration
from tests.preconditioner.workloads import relative

# What a forward pass in bf16 leaves of equality between numbers of ranks: eight bits of mantissa, through an inverse.
BF16_TOLERANCE = 3e-2

TOKEN = {"loss_terms": "token"}
LEAN = {"reduction": "reduce_scatter", "reduce_every": "step"}

CASES = [
    Case("mlp", configuration()),
    Case("mlp", configuration("eigen", **LEAN, buckets=2)),
    Case("mlp", configuration("newton_schulz", fisher="mc", inversion={"stagger": 2, "inverse_lag": 1})),
    Case("mlp", configuration(fisher="type2", assignment="balanced", placement="owner")),
    Case("mlp", configuration(), micro_batches=2, clip=0.05, adam=True),
    Case("mlp", {**configuration(**LEAN), "update": {"l2": 0.01}}, micro_batches=3),
    Case("mlp", configuration(fisher="mc"), frozen=("2",)),
    Case("conv", configuration(buckets=16)),
    Case("token", configuration("eigen", curvature=TOKEN, reduction="reduce_scatter")),
    Case("token", configuration(curvature=TOKEN, **LEAN), clip=0.05),
    Case("tied", configuration(curvature=TOKEN)),
    Case("attention", configuration(assignment="balanced")),
    Case("attention", configuration("newton_schulz", **LEAN), frozen=("attention.out_proj",)),
    Case("scaled", configuration(curvature={"uncovered": "diagonal"})),
    Case("scaled", configuration(), clip=0.05),
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
MESHES = [(2,), (3,), (2, 1), (2, 2)]


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Tensor]]:
    return train_all(CASES, None)


@pytest.fixture(scope="module")
def alone_in_bf16() -> list[dict[str, Tensor]]:
    [results] = run_ranks(1, train_all, BF16, (1,))
    return results


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_rows_change_nothing(shape: tuple[int, ...], alone: Any, alone_in_bf16: Any) -> None:
    size = torch.Size(shape).numel()
    wrong = {}
    for results in run_ranks(size, train_all, [*CASES, *BF16], shape, timeout=240):
        for case, result, wanted in zip([*CASES, *BF16], results, [*alone, *alone_in_bf16], strict=True):
            error = relative(result, wanted)
            if not error < (BF16_TOLERANCE if case.policy else TOLERANCE):
                wrong[f"{case}"] = error
    assert not wrong
