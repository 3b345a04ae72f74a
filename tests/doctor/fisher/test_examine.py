"""`doctor --fisher`: closed forms beside drawn labels, the last layers named, kinks refused, the command itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from kfac_dist.cli import app
from kfac_dist.doctor import FisherRequest, Severity, examine
from kfac_dist.doctor.fisher.report import FisherReport
from kfac_dist.tasks import build_data, build_model
from kfac_dist.training.checkpoints.random_state import seed_everything
from tests.harness import run_ranks
from tests.training.runs import launched, small_config

CONFIG = Path(__file__).parents[3] / "configs" / "digits_classifier.yaml"
LABELS = "tests.bad_models:samples"


def _report(steps: int = 0, directory: str = "/nowhere", kfac: bool = True, **sections: Any) -> FisherReport:
    config = small_config(directory, kfac=kfac, **sections)
    report = examine(config, fisher=FisherRequest(steps=steps, deviation=0.2))
    assert report.ready, report.findings
    assert report.fisher is not None, report.findings
    return report.fisher


def test_closed_forms_stand_beside_what_labels_give() -> None:
    report = _report()
    assert [row.role for row in report.layers] == ["", "", "penultimate", "last"]
    assert report.likelihood == "bernoulli"
    assert report.columns == 6
    for row in report.layers:
        assert row.coordinates == row.values
        assert row.first_drawn == pytest.approx(row.first, rel=0.3)
        assert row.second == pytest.approx(row.second_drawn, rel=0.3)
        assert row.labels_first == pytest.approx((row.first / 0.2) ** 2, abs=1)
        assert not row.refused
    last = report.layers[-1]
    assert last.structural
    assert (last.second, last.second_drawn, last.labels_second, last.bend) == (0, 0, 0, 0)
    assert last.better == "Î2"
    assert not report.layers[0].structural
    assert "last layer (linear4): Î2. It has no variance, by structure" in report.advice[0]


def test_the_layers_sums_are_those_of_the_model_at_hand() -> None:
    """By autograd over every output: tr I = Σ_k p_k(1 − p_k) ‖∂h_k‖², the mean over the samples."""
    report = _report()
    config = small_config("/nowhere")
    seed_everything(config.run.seed, rank=0)
    model, data = build_model(config.model), build_data(config.data)
    trace = dict.fromkeys((row.layer for row in report.layers), 0.0)
    for index in range(report.samples):
        outputs = model(data.train[index][0][None])[0]
        for value in outputs:
            p = float(value.detach().sigmoid())
            for name, gradient in zip(
                dict(model.named_parameters()),
                torch.autograd.grad(value, list(model.parameters()), retain_graph=True),
                strict=True,
            ):
                trace[name.split(".")[0]] += p * (1 - p) * float(gradient.square().sum()) / report.samples
    for row in report.layers:
        assert row.trace == pytest.approx(trace[row.layer], rel=1e-3)


def test_steps_are_really_taken() -> None:
    report = _report(steps=10)
    steps = sorted({row.step for row in report.trend})
    assert steps[0] == 0
    assert steps[-1] == 10
    first, last = ([row.first for row in report.trend if row.step == step] for step in (0, 10))
    assert [row.first_deviation for row in report.trend[: len(report.layers)]] == [row.first for row in report.layers]
    assert all(a != b for a, b in zip(first, last, strict=True))
    assert report.cost.step is not None
    assert report.cost.step > 0
    assert report.cost.backward > 0


def test_kinks_are_refused_by_name_in_front_of_them_only() -> None:
    model = {"name": "autoencoder", "args": {"dims": [6, 5, 3], "activation": "relu"}}
    report = _report(model=model)
    first, *_, last = report.layers
    assert first.refused.startswith("relu in relu3 (ReLU) and 1 more: not twice differentiable")
    assert (first.second, first.labels_second, first.better) == (None, None, "Î1")
    assert last.structural  # what comes after the last kink has no part in it
    assert last.second == 0
    assert any("Î2 is refused in linear1" in sentence for sentence in report.advice)
    assert all(row.second is None for row in report.trend if row.layer == "linear1")


def test_kinks_without_a_name_are_refused_by_what_they_do() -> None:
    report = _report(model={"name": "tests.doctor.whole_models:Masked", "args": {}})
    assert "the first derivative jumps" in report.layers[0].refused
    assert "gt in masked (Gate)" in report.layers[0].refused


@pytest.mark.parametrize(
    ("loss", "data"),
    [
        ("mse", {"name": "tests.training.runs:random_pixels", "args": {}}),
        ("cross_entropy", {"name": LABELS, "args": {}}),
    ],
)
def test_other_likelihoods_and_runs_without_kfac(loss: str, data: dict[str, Any]) -> None:
    model = {"name": "tests.bad_models:good", "args": {}} if data["name"] == LABELS else {}
    report = _report(loss={"name": loss}, data=data, kfac=loss == "mse", **({"model": model} if model else {}))
    assert report.layers[-1].second == 0
    assert report.layers[-1].empirical > 0


def test_tokens_share_a_sample() -> None:
    report = _report(
        model={"name": "byte_gpt", "args": {"layers": 1, "width": 8, "heads": 2, "context": 5, "vocabulary": 8}},
        data={"name": "tests.training.runs:ragged_text", "args": {}},
        loss={"name": "token_cross_entropy"},
    )
    assert report.columns == 8
    assert all(row.coordinates <= row.values for row in report.layers)
    for row in report.layers:
        assert row.first_drawn == pytest.approx(row.first, rel=0.3)


def test_what_cannot_be_differentiated_so_is_a_remark() -> None:
    config = small_config("/nowhere", kfac=True, model={"name": "tests.doctor.whole_models:Opaque", "args": {}})
    report = examine(config, fisher=FisherRequest(steps=0))
    assert report.fisher is None
    [remark] = [finding for finding in report.findings if finding.check == "fisher"]
    assert remark.severity is Severity.WARNING
    assert "forward mode, twice" in remark.text


def _on_a_rank() -> FisherReport | None:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    return examine(small_config("/nowhere", kfac=True), fisher=FisherRequest(steps=4)).fisher


def test_ranks_train_together_and_report_the_same() -> None:
    one, several = _report(steps=4), run_ranks(3, _on_a_rank)
    assert several[0] == several[1] == several[2]
    for mine, its in zip(one.trend, several[0].trend, strict=True):
        assert (mine.step, mine.layer) == (its.step, its.layer)
        assert its.first == pytest.approx(mine.first, rel=1e-3)


def test_the_command() -> None:
    arguments = ["doctor", str(CONFIG), "train.batch_size=16", "--fisher", "--steps", "3", "--deviation", "0.05"]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert shown.exit_code == 0
    for words in ("linear3 (last)", "linear2 (penultimate)", "0 (exact)", "resampling labels", "N·Var after steps"):
        assert words in shown.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).output)["fisher"]
    assert [row["layer"] for row in found["layers"]] == ["linear1", "linear2", "linear3"]
    assert found["deviation"] == 0.05
    assert found["layers"][-1]["second"] == 0
    assert {row["step"] for row in found["trend"]} == {0, 1, 2, 3}
