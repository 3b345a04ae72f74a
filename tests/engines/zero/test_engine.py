"""K-FAC under DeepSpeed gives what one process gives, whatever is sharded and however."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_dist import KFAC
from kfac_dist.errors import KFACError, ModelError
from tests.engines import zero_runs
from tests.engines.zero_runs import Case, Run, alone_all, deepspeed_world, train_all, train_some, train_some_ddp
from tests.harness import RankError, run_ranks
from tests.preconditioner import workloads
from tests.preconditioner.workloads import relative

deepspeed = pytest.importorskip("deepspeed")

TOLERANCE = 1e-5
# Of the fp32 parameters after 20 steps with gradients in that precision: against the same on one rank, against fp32.
LOW_TOLERANCE = {torch.bfloat16: (1e-2, 3e-2), torch.float16: (1e-3, 3e-3)}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
ALL_SHARDED = {"stage3_param_persistence_threshold": 0}
UNMANAGED = {"managed_gradient_accumulation": False}
BF16 = {"bf16": {"enabled": True}}
BF16_ACCUMULATED = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
FP16_ACCUMULATED = {**FP16, "data_types": {"grad_accum_dtype": "fp32"}}
# Without the noise that AdamW makes of gradients that are zero but for rounding.
ORTHOGONAL = {
    "direction": "orthogonal",
    "orthogonal": {"iteration": "polar_express", "iterations": 8},
    "first_order": {"eps": 1e-3},
}
LEAN = {"reduction": "reduce_scatter", "reduce_every": "step"}


def name_of(case: Case) -> str:
    default = Case(case.stage)
    return f"zero{case.stage} " + " ".join(
        f"{key}={value}" for key, value in vars(case).items() if value != getattr(default, key) and key != "stage"
    )


# What DeepSpeed does in its own way in each stage.
LAYOUTS = [
    case
    for stage in (1, 2, 3)
    for case in (
        Case(stage, accumulated=2, clip=0.3, zero={"overlap_comm": True, "reduce_bucket_size": 100}),
        Case(stage, zero={"contiguous_gradients": False}, by_hand=True),
        Case(stage, zero={"reduce_scatter": False}, groups=True),
        Case(stage, zero=OFFLOAD, clip=0.3, accumulated=2),
        Case(stage, "narrow", groups=True, optimizer="msvag"),
        Case(stage, "frozen", kfac={"update": {"kl_clip": 0.001, "l2": 0.01}, "inversion": {"max_factor_dim": 4}}),
    )
] + [
    Case(0, accumulated=2, clip=0.3),
    Case(1, zero={"round_robin_gradients": True}),
    Case(2, zero={"round_robin_gradients": True}, accumulated=2, groups=True),
    Case(2, accumulated=2, deepspeed=UNMANAGED, zero=OFFLOAD),
    Case(3, "skipping", optimizer="plain"),
    Case(3, "skipping", optimizer="plain", zero=OFFLOAD),
    Case(3, "tied", accumulated=2, zero=ALL_SHARDED),
    Case(3, "token", zero={**ALL_SHARDED, "sub_group_size": 40}, init=True),
    Case(3, "gpt2", zero=ALL_SHARDED, kfac={"inversion": {"max_factor_dim": 8}}),
    Case(2, "conv", kfac={"inversion": {"solver": "ekfac"}}),
]
# What doesn't depend on how many ranks there are.
OPTIONS = [
    case
    for stage in (1, 2, 3)
    for case in (
        Case(stage, "token", zero=OFFLOAD, optimizer="adamw"),
        Case(stage, "tied", accumulated=2),
        Case(stage, "conv", kfac={"distribution": LEAN}),
        Case(stage, "token", kfac={"curvature": {"fisher": "mc"}, "distribution": {"buckets": 2}}, accumulated=2),
        Case(stage, "conv", clip=0.3, zero=OFFLOAD),
    )
] + [
    Case(1, "skipping", optimizer="plain", zero=OFFLOAD),
    Case(2, accumulated=2, deepspeed=UNMANAGED),
    Case(2, kfac={"curvature": {"fisher": "type2"}}),
    Case(2, kfac={"update": {"graft": "sign"}}),
    *(Case(stage, kfac={"update": ORTHOGONAL}, optimizer="plain") for stage in (1, 2, 3)),
    Case(2, "token", kfac={"curvature": {"exclude": ("embedding",), "uncovered": "diagonal"}}),
    Case(3, accumulated=2, deepspeed=UNMANAGED),
    Case(3, "token", zero={**ALL_SHARDED, "overlap_comm": True}, kfac={"curvature": {"fisher": "mc"}}),
    Case(3, "conv", zero={**ALL_SHARDED, **OFFLOAD, "offload_param": {"device": "cpu", "pin_memory": False}}),
]
LOW_PRECISION = [
    Case(0, deepspeed=BF16),
    *(Case(stage, deepspeed=kind) for stage in (1, 2, 3) for kind in (BF16, BF16_ACCUMULATED, FP16, FP16_ACCUMULATED)),
    Case(1, deepspeed=BF16_ACCUMULATED, clip=0.3, accumulated=2),
    Case(3, deepspeed=FP16, clip=0.3, accumulated=2, zero=OFFLOAD),
    Case(2, deepspeed=FP16, zero=OFFLOAD, kfac={"update": {"kl_clip": 0.001, "l2": 0.01}}),
    Case(3, "token", deepspeed=FP16, kfac={"curvature": {"fisher": "mc"}}),
]


def errors_of(cases: list[Case], found: list[dict[str, Tensor]], known: list[dict[str, Tensor]]) -> dict[str, float]:
    return {name_of(c): relative(a, b) for c, a, b in zip(cases, found, known, strict=True)}


def check(size: int, cases: list[Case]) -> None:
    expected = run_ranks(1, alone_all, cases, process_group=False)[0]
    for found in run_ranks(size, train_all, cases, timeout=300):
        wrong = {name: e for name, e in errors_of(cases, found, expected).items() if not e <= TOLERANCE}
        assert not wrong


@pytest.mark.parametrize(("size", "every"), [(2, 4), (3, 1)])
def test_ranks_give_what_one_process_gives_wherever_gradients_are_cut(size: int, every: int) -> None:
    """All cases on three ranks, where cuts are uneven; on two every `every`-th, for time."""
    check(size, LAYOUTS[::every])


def test_ranks_give_what_one_process_gives_whatever_is_asked_of_them() -> None:
    check(2, OPTIONS)


def test_low_precision_gives_what_it_gives_on_one_rank() -> None:
    exact = run_ranks(1, alone_all, LOW_PRECISION, process_group=False)[0]
    # One rank holds everything: of the low precision nothing but the rounding remains.
    like = [dataclasses.replace(case, stage=1, zero={}, accumulated=1) for case in LOW_PRECISION]
    expected = run_ranks(1, train_all, like, timeout=120)[0]
    for found in run_ranks(2, train_all, LOW_PRECISION, timeout=300):
        by_like, by_exact = errors_of(LOW_PRECISION, found, expected), errors_of(LOW_PRECISION, found, exact)
        wrong = {
            name: (by_like[name], by_exact[name])
            for case, name in zip(LOW_PRECISION, by_like, strict=True)
            if not (by_like[name] <= LOW_TOLERANCE[case.dtype][0] and by_exact[name] <= LOW_TOLERANCE[case.dtype][1])
        }
        assert not wrong


def overflow() -> dict[str, Any]:
    """Steps under fp16, of which the fifth, where inverses are due, has an infinite loss on one rank."""
    with deepspeed_world():
        run = Run(Case(3, deepspeed=FP16, zero=ALL_SHARDED))
        for step in range(4):
            run.step(step)
        before = run.kfac.state_dict(), run.parameters()
        run.step(4, lambda outputs: outputs * (float("inf") if run.rank == 1 else 1.0))
        after = run.kfac.state_dict(), run.parameters()
        skipped = run.engine.skipped_steps
        for step in range(5, 12):
            run.step(step)
        finite = all(bool(value.isfinite().all()) for value in run.parameters().values())
        refreshes = run.kfac.metrics()["refreshes"]
        run.close()
        return {
            "before": before,
            "after": after,
            "skipped": skipped,
            "finite": finite,
            "refreshes": refreshes,
        }


def test_an_overflow_leaves_statistics_inverses_and_parameters_alone() -> None:
    for found in run_ranks(2, overflow):
        assert found["skipped"] == 1
        (kfac, parameters), (later, unmoved) = found["before"], found["after"]
        assert relative(unmoved, parameters) == 0
        assert all(
            entry.pop("overdue") and not kfac["units"][name].pop("overdue") for name, entry in later["units"].items()
        )
        torch.testing.assert_close(later["units"], kfac["units"], rtol=1e-6, atol=0)
        assert found["finite"]
        assert found["refreshes"] >= 2  # what was due then came later


def test_state_moves_between_engines_stages_and_numbers_of_ranks() -> None:
    case = Case(3, "token", optimizer="plain", zero=ALL_SHARDED)
    state = run_ranks(3, train_some, case, range(6), None)[0]
    expected = run_ranks(1, zero_runs.alone, case, 12, process_group=False)[0]
    rest = range(6, 12)
    for found in (
        run_ranks(2, train_some_ddp, case, rest, state)[0],
        run_ranks(2, train_some, dataclasses.replace(case, stage=1, zero={}), rest, state)[0],
    ):
        assert relative(found["model"], expected) <= TOLERANCE


def disagree(stage: int) -> str:
    """One rank leaves out a layer that the other uses."""
    with deepspeed_world():
        run = Run(Case(stage, "skipping"))
        run.engine.module.register_forward_pre_hook(lambda module, _: setattr(module, "skips", run.rank == 1))
        try:
            run.step(0)
        except ModelError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("stage", [1, 2])
def test_a_layer_that_one_rank_leaves_out_is_named_on_every_rank(stage: int) -> None:
    for said in run_ranks(2, disagree, stage):
        assert "rank 1 left second.weight out" in said


def test_zero3_never_trains_on_after_one_rank_has_left_out_a_layer() -> None:
    # Ranks gather weights of different layers in their first forward pass; DeepSpeed fails, before anybody could look.
    with pytest.raises(RankError):
        run_ranks(2, disagree, 3)


def refusals() -> dict[str, str]:
    """What K-FAC says to engines that it can't serve."""
    cases = {
        "fp16": Case(0, deepspeed=FP16),
        "hpz": Case(3, zero={"zero_hpz_partition_size": 2}),
        "sum": Case(1, deepspeed={"gradient_allreduce_op": "sum"}),
        "autocast": Case(1, deepspeed={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    }
    said = {}
    with deepspeed_world():
        for name, case in cases.items():
            try:
                Run(case)
            except KFACError as error:
                said[name] = str(error)
        run = Run(Case(1, accumulated=2))
        inputs, labels = zero_runs.global_batch("mlp", 0)
        try:
            zero_runs.loss_of(run.engine(inputs), labels).backward()
        except ModelError as error:
            said["backward"] = str(error)
        run.close()
        stranger = Run(Case(2))
        stranger.kfac.remove()
        stranger.engine.module.append(torch.nn.Linear(workloads.CLASSES, workloads.CLASSES))
        try:
            KFAC(stranger.engine, stranger.case.kfac_config())
        except ModelError as error:
            said["stranger"] = str(error)
    return said


def test_what_goes_wrong_is_refused_with_the_key_to_change() -> None:
    for said in run_ranks(2, refusals):
        assert "stage 1" in said["fp16"]
        assert "zero_hpz_partition_size" in said["hpz"]
        assert "gradient_allreduce_op" in said["sum"]
        assert "torch_autocast" in said["autocast"]
        assert "engine.backward(loss)" in said["backward"]
        assert "5.weight" in said["stranger"]


def train_on() -> tuple[int, int]:
    """K-FAC is taken off before the first backward, then put on again."""
    with deepspeed_world():
        run = Run(Case(2))
        run.kfac.remove()
        inputs, labels = zero_runs.global_batch("mlp", 0)
        run.engine.backward(zero_runs.loss_of(run.engine(inputs), labels))
        run.engine.step()
        removed, run.kfac = run.kfac, KFAC(run.engine, run.case.kfac_config())
        run.step(1)
        run.close()
        return removed.steps, run.kfac.steps


def test_without_kfac_the_engine_trains_on() -> None:
    assert run_ranks(2, train_on) == [(0, 1)] * 2


def by_both_ways() -> list[dict[str, Tensor]]:
    """The same run with `kfac.step()` called by hand and inside of DeepSpeed's step."""
    with deepspeed_world():
        return [zero_runs.train(Case(2, accumulated=2, by_hand=by_hand), 6) for by_hand in (False, True)]


def test_a_loop_that_calls_step_itself_gets_the_same_numbers() -> None:
    for inside, by_hand in run_ranks(2, by_both_ways):
        assert relative(inside, by_hand) == 0


def test_without_deepspeed_everything_else_works() -> None:
    program = """
import sys
sys.modules["deepspeed"] = None  # as if it weren't installed
import torch
from kfac_dist import KFAC
model = torch.nn.Linear(3, 2)
kfac = KFAC(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
torch.nn.functional.cross_entropy(model(torch.randn(5, 3)), torch.zeros(5, dtype=torch.long)).backward()
before = model.weight.grad.clone()
kfac.step()
print(kfac.steps, list(kfac.coverage.uncovered), torch.equal(model.weight.grad, before))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (0, "1 [] False\n"), ended.stderr


def two_backward_passes(stage: int) -> list[dict[str, Tensor]]:
    """The factors of two losses: of their sum, and of one backward pass after the other through the same graph."""
    found = []
    with deepspeed_world():
        for together in (True, False):
            run = Run(Case(stage, kfac={"curvature": {"factor_every": 1}, "inversion": {"inverse_every": 1}}))
            inputs, labels = workloads.global_batch("mlp", 0)
            part = slice(run.rank * len(inputs) // run.size, (run.rank + 1) * len(inputs) // run.size)
            outputs = run.engine(inputs[part])
            first, second = F.cross_entropy(outputs, labels[part]), 3 * outputs.square().sum(1).mean()
            if together:
                run.engine.backward(first + second)
            else:
                run.engine.backward(first, retain_graph=True)
                run.engine.backward(second)
            run.engine.step()
            units = run.kfac.state_dict()["units"]
            found.append({name: entry["sum"] / entry["scalars"][0] for name, entry in units.items()})
            assert len(run.kfac.coverage.blocks) == 3
            run.close()
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_backward_passes_through_one_graph_add_up(stage: int) -> None:
    for together, apart in run_ranks(2, two_backward_passes, stage):
        for name, value in together.items():
            assert relative({name: apart[name]}, {name: value}) <= 1e-5, name
