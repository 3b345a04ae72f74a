"""K-FAC under DeepSpeed gives what one process gives, whatever is sharded and however."""

from __future__ import annotations

import pytest

from tests.engines.zero_runs import Case, alone_all, train_all
from tests.harness import run_ranks
from tests.preconditioner.workloads import relative

deepspeed = pytest.importorskip("deepspeed")

TOLERANCE = 1e-5
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
ALL_SHARDED = {"stage3_param_persistence_threshold": 0}
UNMANAGED = {"managed_gradient_accumulation": False}
LEAN = {"reduction": "reduce_scatter", "reduce_every": "step"}


def name_of(case: Case) -> str:
    default = Case(case.stage)
    return f"zero{case.stage} " + " ".join(
        f"{key}={value}" for key, value in vars(case).items() if value != getattr(default, key) and key != "stage"
    )


EVERY_STAGE = [
    case
    for stage in (1, 2, 3)
    for case in (
        Case(stage),
        Case(stage, accumulated=2, clip=0.3),
        Case(stage, accumulated=2, zero={"overlap_comm": True, "reduce_bucket_size": 100}),
        Case(stage, zero={"contiguous_gradients": False}),
        Case(stage, zero={"reduce_scatter": False}, groups=True),
        Case(stage, zero=OFFLOAD, clip=0.3, accumulated=2),
        Case(stage, "token", zero=OFFLOAD, optimizer="adamw"),
        Case(stage, "narrow", groups=True),
        Case(stage, "frozen"),
        Case(stage, "tied", accumulated=2),
        Case(stage, "conv", kfac={"distribution": LEAN}),
        Case(stage, "token", kfac={"curvature": {"fisher": "mc"}, "distribution": {"buckets": 2}}, accumulated=2),
        Case(stage, kfac={"curvature": {"fisher": "type2"}}),
        Case(stage, kfac={"update": {"kl_clip": 0.001, "l2": 0.01}, "inversion": {"max_factor_dim": 4}}, by_hand=True),
    )
]
SOME_STAGES = [
    Case(0, accumulated=2, clip=0.3),
    Case(1, zero={"round_robin_gradients": True}),
    Case(2, zero={"round_robin_gradients": True}, accumulated=2, groups=True),
    Case(2, accumulated=2, deepspeed=UNMANAGED),
    Case(3, accumulated=2, deepspeed=UNMANAGED),
    Case(2, accumulated=2, deepspeed=UNMANAGED, zero=OFFLOAD),
    Case(3, zero=ALL_SHARDED),
    Case(3, "tied", zero=ALL_SHARDED),
    Case(3, "token", zero={**ALL_SHARDED, "sub_group_size": 40}, init=True),
    Case(3, "token", zero={**ALL_SHARDED, "overlap_comm": True}, kfac={"curvature": {"fisher": "mc"}}),
    Case(3, "conv", zero={**ALL_SHARDED, **OFFLOAD, "offload_param": {"device": "cpu", "pin_memory": False}}),
]


@pytest.mark.parametrize("size", [2, 3])
def test_every_stage_and_option_gives_what_one_process_gives(size: int) -> None:
    cases = [*EVERY_STAGE, *SOME_STAGES]
    expected = run_ranks(1, alone_all, cases, process_group=False)[0]
    for results in run_ranks(size, train_all, cases, timeout=300):
        errors = {
            name_of(case): relative(found, known) for case, found, known in zip(cases, results, expected, strict=True)
        }
        assert max(errors.values()) <= TOLERANCE, {name: error for name, error in errors.items() if error > TOLERANCE}
