"""The doctor finds what is wrong, says what to write instead, and lets good runs pass; alone and on three ranks."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from kfac_dist.config.schema import Config
from kfac_dist.doctor import Report, Severity, examine
from kfac_dist.errors import ConfigError
from tests.harness import run_ranks
from tests.training.runs import launched, small_config

MODELS, DATA = "tests.bad_models:", "tests.bad_models:samples"
WORLD_SIZE = 3

GPT = {"name": "byte_gpt", "args": {"layers": 1, "width": 8, "heads": 2, "context": 5, "vocabulary": 8}}
CNN = {"name": "resnet20", "args": {"in_channels": 1, "num_classes": 3, "width": 4}}


def _config(directory: str | Path, case: dict[str, Any]) -> Config:
    model = case.get("model", "good")
    data = case.get("data", {})
    sections = {
        "model": model if isinstance(model, dict) else {"name": MODELS + model, "args": case.get("args", {})},
        "data": data if "name" in data else {"name": DATA, "args": data},
        "loss": {"name": case.get("loss", "cross_entropy")},
        "train": {"batch_size": 9, **case.get("train", {})},
        "engine": case.get("engine", {}),
    }
    config = small_config(directory, kfac=True, **sections)
    kfac = {**config.kfac.model_dump(), **case.get("kfac", {})}
    optimizer = None if "solver" in case.get("kfac", {}) else config.optimizer
    return Config.model_validate({**config.model_dump(), "kfac": kfac, "optimizer": optimizer})


def _report(case: dict[str, Any]) -> Report:
    return examine(_config("/nowhere", case))


# Case → what the one thing that is wrong is called, its severity, and the words; None where all is fine.
GOOD: dict[str, dict[str, Any]] = {
    "linear": {},
    "accumulated": {"train": {"accumulate": 2}},
    "partly covered": {"model": "Partly"},
    "tokens": {
        "model": GPT,
        "data": {"name": "tests.training.runs:ragged_text", "args": {}},
        "loss": "token_cross_entropy",
    },
    "batch norm": {"model": "normalised"},
    "a solver's": {"kfac": {"solver": "cg", "update": {"kl_clip": None}}},
    "one position to attend to": {
        "model": {"name": "tests.preconditioner.test_models:Attends", "args": {}},
        "data": {"name": "tests.doctor.whole_models:tokens", "args": {"length": 4, "vocabulary": 7, "classes": 5}},
        "loss": "token_cross_entropy",
    },
    "tied weights": {
        "model": {"name": "tests.preconditioner.test_models:Language", "args": {}},
        "data": {
            "name": "tests.doctor.whole_models:tokens",
            "args": {"length": 4, "vocabulary": 5, "classes": 5},
        },
        "loss": "token_cross_entropy",
    },
}
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "nan": ({"data": {"nan_at": 17}}, "data", r"NaN or infinity in 1 sample of the training data: 17 \(nan\)"),
    "label": ({"data": {"bad_label": 20}}, "data", r"not a label from 0 to 3, in 1 sample of the tr.*: 20 \(7\)"),
    "no samples": ({"data": {"count": 0, "test": 0}}, "data", "the training data has no samples"),
    "no test samples": ({"data": {"test": 0}}, "data", "the test data has no samples"),
    "raises": (
        {"data": {"name": "tests.bad_models:items", "args": {"kind": "raises", "start": 20}}},
        "data",
        "BadItems: reading samples fails with KeyError: 'no such image'",
    ),
    "shape": ({"data": {"features": 5}}, "forward", r"inputs float32 \[2, 5\] .*first.*0.weight, float32 \[8, 6\]"),
    "not a tensor": ({"model": "NotATensor"}, "forward", "the model returns dict"),
    "frozen": ({"model": "frozen"}, "forward", "requires_grad is false everywhere"),
    "nothing to precondition": ({"model": "Scaled"}, "plan", "no layer gets a K-FAC block"),
    "kept": (
        {"model": "Keeps", "args": {"what": "state"}},
        "forward",
        r"and back twice \(RuntimeError: Trying to backward .*\): .* Detach what the model keeps of one pass",
    ),
    "scale by samples": (
        {"model": "LeakyScale", "args": {"factor": "samples"}},
        "scale",
        # By the samples of a rank: 8 alone, 3 of 9 on three ranks, where it could be a weight that happens to be W.
        "head, first: the (loss's gradient is 8 times that of a mean over 8 sa|output gradients of .* are 3 times)",
    ),
    "scale": (
        {"model": "LeakyScale", "args": {"factor": "other"}},
        "scale",
        "head, first: the output gradients of .* together are 1.5 times those of the samples alone",
    ),
}
WARNED: dict[str, tuple[dict[str, Any], str, str]] = {
    "constant": ({"data": {"constant": True}}, "inputs", "the input is the same for all"),
    "borrowed weight": (
        {"model": "Borrowed"},
        "capture",
        "first: what its hooks captured misses .*name the layer in kfac",
    ),
    "kept in evaluation": (
        {"model": "Keeps", "args": {"what": "scale"}},
        "evaluation",
        r"be differentiated in evaluation mode \(RuntimeError: Trying to backward through the graph a second time",
    ),
    "detached in evaluation": (
        {"model": "Keeps", "args": {"what": "detached"}},
        "evaluation",
        r"evaluation mode \(the second of two passes brings no gradient to scale\): .* in training mode",
    ),
    "training alone": (
        {"model": "TrainsAlone"},
        "evaluation",
        r"\(AssertionError: call model.train\(\) before you train it \(.*bad_models.py:\d+\)\)",
    ),
    "coupled": ({"model": "Coupled"}, "scale", "samples influence each other"),
}


def _errors(report: Report) -> list[tuple[str, str]]:
    return [(finding.check, finding.text) for finding in report.findings if finding.severity is Severity.ERROR]


def _all_reports() -> dict[str, Report]:
    if dist.is_initialized():
        os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    cases = {**GOOD, **{name: case for name, (case, *_) in (BAD | WARNED).items()}}
    return {name: _report(case) for name, case in cases.items()}


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Report]]:
    return [_all_reports(), *run_ranks(WORLD_SIZE, _all_reports, timeout=120)]


def test_good_runs_are_ready(reports: list[dict[str, Report]]) -> None:
    for by_name in reports:
        for name in GOOD:
            report = by_name[name]
            assert report.ready, (name, _errors(report))
            assert report.verdict.startswith("ready")
            assert {"forward", "data", "plan", "coverage", "curvature", "scale"} <= {f.check for f in report.findings}
            compared = [row for row in report.curvature if row.exact]
            assert compared or name == "tied weights", name  # of which each is used twice
            assert all(row.error is not None and row.error < 1e-4 for row in compared), name


def test_bad_runs_are_not(reports: list[dict[str, Report]]) -> None:
    for by_name in reports:
        for name, (_, check, words) in BAD.items():
            errors = _errors(by_name[name])
            assert any(check == found and re.search(words, text, re.DOTALL) for found, text in errors), (name, errors)
            assert not by_name[name].ready
            assert by_name[name].verdict.startswith("not ready: 1 thing to put right"), (name, errors)


def test_remarks_leave_a_run_ready(reports: list[dict[str, Report]]) -> None:
    for by_name in reports:
        for name, (_, check, words) in WARNED.items():
            found = [(f.check, f.text) for f in by_name[name].findings if f.severity is Severity.WARNING]
            assert any(check == kind and re.search(words, text) for kind, text in found), (name, found)
            assert by_name[name].ready


def test_what_needs_training_mode_is_measured_in_it(reports: list[dict[str, Report]]) -> None:
    """Nothing is dropped then, so that the scale can be checked and blocks are exact."""
    for by_name in reports:
        for name in ("kept in evaluation", "detached in evaluation", "training alone"):
            report = by_name[name]
            assert [f.check for f in report.findings if f.severity is not Severity.FINE] == ["evaluation"]
            assert {row.block for row in report.curvature if row.exact} >= {"first", "head"}
            assert all((row.error or 0.0) < 1e-4 for row in report.curvature if row.exact)


def test_ranks_report_the_same(reports: list[dict[str, Report]]) -> None:
    _, first, *others = reports
    for other in others:
        assert {name: report.to_json() for name, report in other.items()} == {
            name: report.to_json() for name, report in first.items()
        }


def test_curvature_does_not_depend_on_the_ranks(reports: list[dict[str, Report]]) -> None:
    alone, first, *_ = reports
    for name in GOOD:
        rows = [(row.block, row.samples, row.positions, row.exact) for row in alone[name].curvature]
        assert rows == [(row.block, row.samples, row.positions, row.exact) for row in first[name].curvature]


def test_next_to_no_gradient_is_not_judged(reports: list[dict[str, Report]]) -> None:
    """A softmax over one position has no gradient: what comes through it is rounding, in any direction."""
    exact = {row.block for row in reports[0]["one position to attend to"].curvature if row.exact}
    assert exact >= {"encoder.self_attn.in_proj.v", "encoder.self_attn.out_proj", "encoder.linear1", "head"}
    assert not exact & {"encoder.self_attn.in_proj.q", "encoder.self_attn.in_proj.k"}


def test_every_parameter_has_a_row(reports: list[dict[str, Report]]) -> None:
    rows = {row.name: row for row in reports[0]["partly covered"].parameters}
    assert rows["first.weight"].factors == "A 7  G 8"
    assert rows["first.weight"].factor_bytes == 4 * (7**2 + 8**2)
    assert rows["first.weight"].inversion_cost == 7**3 + 8**3
    assert (rows["first.bias"].block, rows["first.bias"].factors) == ("first", "")
    assert rows["norm.weight"].kind == "LayerNorm"
    assert rows["frozen.weight"].reason == "frozen"
    assert "LSTM" in rows["mixed.weight_ih_l0"].reason
    assert rows["scale"].reason
    assert len(rows) == 13


def test_tokens_and_convolutions_are_compared_where_they_can_be_exact(reports: list[dict[str, Report]]) -> None:
    exact = {row.block for row in reports[0]["tokens"].curvature if row.exact}
    assert {"tokens", "positions", "blocks.0.attention.qkv", "blocks.0.expand", "norm", "head"} <= exact
    approximate = [row for row in reports[0]["tokens"].curvature if not row.exact]
    assert {row.positions for row in approximate} == {5}
    assert all(row.cosine is not None and 0 < row.cosine <= 1 for row in approximate)


def test_plans_for_other_numbers_of_ranks() -> None:
    config = _config("/nowhere", {})
    report = examine(config, world_size=4)
    assert len(report.load) == 4
    assert "planned for 4" in report.environment["ranks"]
    assert report.plan_hash != examine(config).plan_hash


def test_plans_as_a_sharded_engine_does() -> None:
    sharded = _config("/nowhere", {"engine": {"name": "fsdp2"}})
    owned = _config("/nowhere", {"kfac": {"distribution": {"placement": "owner"}}})
    assert examine(sharded, world_size=4).plan_hash != examine(_config("/nowhere", {}), world_size=4).plan_hash
    assert examine(sharded, world_size=4).plan_hash == examine(owned, world_size=4).plan_hash
    refused = _config("/nowhere", {"engine": {"name": "fsdp2"}, "kfac": {"distribution": {"placement": "replicated"}}})
    [finding] = [found for found in examine(refused, world_size=4).findings if found.severity is Severity.ERROR]
    assert "placement: replicated needs every gradient whole" in finding.text


def _differing(what: str) -> tuple[str, str]:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    if what == "world size":
        with pytest.raises(ConfigError) as caught:
            examine(_config("/nowhere", {}), world_size=5)
        return "", str(caught.value)
    report = _report({"model": what, **({"args": {"rule": "rank"}} if what == "Branches" else {})})
    [(check, text)] = _errors(report)
    return check, text


@pytest.mark.parametrize(
    ("what", "check", "words"),
    [
        ("shaped_by_rank", "model", r"plan different work, first at block 0 \(0.weight\)"),
        ("covered_by_rank", "model", "plan different work"),
        ("Branches", "gradients", "depend on left.bias, left.weight, right.bias and 1 more; on several ranks"),
        ("world size", "", "--world-size 5, but environment started 3 ranks"),
    ],
)
def test_ranks_that_differ_are_told_apart(what: str, check: str, words: str) -> None:
    for found, text in run_ranks(WORLD_SIZE, _differing, what):
        assert found == check
        assert re.search(words, text)


def test_reports_are_plain_values(reports: list[dict[str, Report]]) -> None:
    values = json.loads(reports[0]["nan"].to_json())
    assert values["ready"] is False
    assert values["findings"][1]["severity"] == "error"
