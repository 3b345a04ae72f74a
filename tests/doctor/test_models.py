"""The doctor names every parameter of whole models: each has a block, or a reason and what it gets instead."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from kfac_dist.config.schema import Config, Uncovered
from kfac_dist.doctor import Report, Severity, examine
from kfac_dist.doctor.scale import _ratio
from kfac_dist.tasks import build_model
from tests.preconditioner import transformer_models
from tests.training.runs import small_config

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'kfac_dist[hf]'")

TRANSFORMERS, OWN = f"{transformer_models.__name__}:", "tests.preconditioner.test_models:"
DATA = "tests.doctor.whole_models:"
TOKENS, IMAGES = {"length": 5, "vocabulary": 11, "classes": 11}, {"size": 6, "classes": 5}

# Model → data and its arguments; options of kfac.curvature.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    TRANSFORMERS + "gpt2": ("tokens", TOKENS),
    TRANSFORMERS + "bert": ("tokens", {**TOKENS, "classes": 5, "labels": "sample"}),
    TRANSFORMERS + "vit": ("images", {**IMAGES, "size": 8}),
    TRANSFORMERS + "t5": ("tokens", TOKENS),
    TRANSFORMERS + "llama": ("tokens", TOKENS),
    OWN + "UNet": ("images", {**IMAGES, "labels": "token"}),
    OWN + "ConvNeXt": ("images", IMAGES),
    OWN + "Recurrent": ("tokens", {"length": 4, "vocabulary": 7, "classes": 5}),
}
# What has no block, and why; everything else has one.
UNCOVERED = {
    TRANSFORMERS + "vit": {
        f"model.vit.embeddings.{key}": "ViTEmbeddings has no block; plain gradient"
        for key in ("cls_token", "position_embeddings")
    },
    OWN + "ConvNeXt": {"scale": "ConvNeXt has no block; plain gradient"},
    OWN + "Recurrent": {
        f"lstm.{kind}_{side}_l0": "LSTM has no block; plain gradient"
        for kind in ("weight", "bias")
        for side in ("ih", "hh")
    },
}


def config(model: str, data: tuple[str, dict[str, Any]] | None = None) -> Config:
    kind, arguments = data or MODELS[model]
    term = arguments.get("labels", "token" if kind == "tokens" else "sample")
    return small_config(
        "/nowhere",
        kfac=True,
        model={"name": model, "args": {}},
        data={"name": DATA + kind, "args": arguments},
        loss={"name": "token_cross_entropy" if term == "token" else "cross_entropy"},
        train={"batch_size": 9},
    )


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # T5's relative positions can't be measured, and say so
        return {model: examine(config(model)) for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_has_a_row(model: str, reports: dict[str, Report]) -> None:
    report = reports[model]
    parameters = dict(build_model(config(model).model).named_parameters())
    assert [(row.name, row.shape) for row in report.parameters] == [(k, tuple(p.shape)) for k, p in parameters.items()]
    assert {row.name: row.reason for row in report.parameters if row.block is None} == UNCOVERED.get(model, {})
    first = {row.block: row for row in reversed(report.parameters) if row.block is not None}
    for row in first.values():
        assert row.kind
        assert row.factors
        assert row.factor_bytes > 0
        assert row.inversion_cost > 0
        assert row.owners == (0,)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_ready(model: str, reports: dict[str, Report]) -> None:
    report = reports[model]
    assert report.ready, report.findings
    exact = [row.error for row in report.curvature if row.exact]
    assert exact or model.endswith(":UNet")  # whose layers all share their weights among positions
    assert all(error is not None and error < 1e-4 for error in exact)
    assert all(row.error is not None for row in report.curvature) or model.endswith(":t5")
    assert [f.check for f in report.findings if f.severity is Severity.WARNING] == {
        TRANSFORMERS + "t5": ["gradients"],
        OWN + "Recurrent": ["coverage"],
    }.get(model, [])


def test_what_all_samples_share_is_told_from_what_the_loss_ignores(reports: dict[str, Report]) -> None:
    """GPT-2's positions are measured from the second pass on; T5's relative ones never."""
    positions = [row for row in reports[TRANSFORMERS + "gpt2"].curvature if row.block == "model.transformer.wpe"]
    assert {row.samples for row in positions} > {1}
    [found] = [finding for finding in reports[TRANSFORMERS + "t5"].findings if finding.check == "gradients"]
    for stack in ("encoder", "decoder"):
        assert f"model.{stack}.block.0.layer.0.SelfAttention.relative_attention_bias" in found.text
    assert "all samples share its output" in found.text


@pytest.mark.parametrize(("model", "block"), [("gpt2", "model.transformer.wte"), ("t5", "model.shared")])
def test_a_tied_weight_is_divided_by_the_trace(model: str, block: str, reports: dict[str, Report]) -> None:
    """L ⊗ R / tr F has the trace of the exact block, so that it can't be far from it in norm."""
    rows = [row for row in reports[TRANSFORMERS + model].curvature if row.block == block]
    assert rows
    for row in rows:
        assert not row.exact
        assert "tr F" in row.expected
        assert row.error is not None
        assert row.error < 1


@pytest.mark.filterwarnings("error::UserWarning")
def test_weights_that_are_used_by_hand_are_found() -> None:
    report = examine(config(DATA + "UsedByHand", data=("tokens", TOKENS)))
    [found] = [finding for finding in report.findings if finding.check == "capture"]
    assert found.severity is Severity.WARNING
    assert found.text.startswith("embedding: what its hooks captured misses its gradient by ")
    assert "F.linear(x, layer.weight)" in found.text
    [idle] = [finding for finding in report.findings if finding.text.startswith("spare: ")]
    assert "its weight is used by hand" in idle.text


def test_a_diagonal_fisher_is_named_where_it_stands_in() -> None:
    plain = config(OWN + "Recurrent")
    curvature = plain.kfac.curvature.model_copy(update={"uncovered": Uncovered.DIAGONAL})
    report = examine(plain.model_copy(update={"kfac": plain.kfac.model_copy(update={"curvature": curvature})}))
    rows = {row.name: row for row in report.parameters if row.block is None}
    assert set(rows) == set(UNCOVERED[OWN + "Recurrent"])
    for row in rows.values():
        assert row.reason == "LSTM has no block; uncovered: diagonal"
        assert row.kind == "Diagonal"
        assert row.factor_bytes == 4 * torch.Size(row.shape).numel()
    [coverage] = [finding for finding in report.findings if finding.check == "coverage"]
    assert coverage.severity is Severity.FINE
    assert "divided by a diagonal Fisher" in coverage.text
    assert report.verdict == "ready"


def test_a_norm_with_several_uses_a_token_is_approximate() -> None:
    """Every head and every call counts as a term, which a token's gradient is the sum of: no error, and said so."""
    data = {"name": DATA + "tokens", "args": {"length": 3, "vocabulary": 7, "classes": 7}}
    report = examine(
        small_config(
            "/nowhere",
            kfac=True,
            model={"name": DATA + "SharedNorms", "args": {}},
            data=data,
            loss={"name": "token_cross_entropy"},
            train={"batch_size": 9},
        )
    )
    assert report.ready, report.findings
    rows = {row.block: row for row in report.curvature if row.exact}
    assert set(rows) == {"words", "norm", "heads", "head"}
    approximate = {row.block: row for row in report.curvature if row.block in ("head_norm", "twice")}
    assert [(row.exact, row.positions) for row in approximate.values()] == [(False, 6), (False, 6)]
    assert all(row.error is not None and row.error > 0.01 for row in approximate.values())


def test_a_gradient_of_rounding_alone_is_not_judged() -> None:
    report = examine(small_config("/nowhere", kfac=True, model={"name": DATA + "Routed", "args": {}}))
    [found] = [finding for finding in report.findings if finding.check == "curvature"]
    assert found.severity is Severity.FINE, found.text
    assert [row.block for row in report.curvature if row.exact] == ["first", "last"]
    [scale] = [finding for finding in report.findings if finding.check == "scale"]
    assert scale.severity is Severity.FINE, scale.text


def test_the_scale_of_a_gradient_next_to_nothing_is_not_judged() -> None:
    """A weight and a trace each, as a normalisation in MobileNetV2 has them for images of 32×32."""
    assert _ratio(torch.tensor([8.0, 8 * 4.4e-43]), torch.tensor([8.0, 8 * 5.6e-43])) is None
    assert _ratio(torch.tensor([8.0, 0.0]), torch.tensor([8.0, 8 * 1.4e-45])) is None
    assert _ratio(torch.tensor([8.0, 8e-20]), torch.tensor([4.0, 2e-20])) == pytest.approx(2.0)
    assert _ratio(torch.tensor([8.0, 8e-35]), torch.tensor([4.0, 4e-20])) == pytest.approx(1e-15), (
        "a loss of scale shows"
    )


def test_a_model_that_is_certain_is_not_judged() -> None:
    report = examine(config(DATA + "Certain", data=("images", IMAGES)))
    assert report.ready, report.findings
    said = {row.expected for row in report.curvature}
    assert said == {"anything: the model is so certain here that the loss's curvature is rounding"}


@pytest.mark.filterwarnings("ignore:the outputs of scale are shared")
def test_a_row_that_terms_share_is_approximate() -> None:
    """As the time's embedding of VoxtralRealtime: of one sample, one row, and five terms."""
    report = examine(config(DATA + "Conditioned", data=("tokens", TOKENS)))
    assert report.ready, report.findings
    [found] = [finding for finding in report.findings if finding.check == "curvature"]
    assert found.severity is Severity.FINE, found.text


def test_a_gradient_that_depends_on_the_batch_is_told_from_a_wrong_scale() -> None:
    report = examine(config(DATA + "OfItsBatch", data=("images", IMAGES)))
    [found] = [finding for finding in report.findings if finding.check == "scale"]
    assert found.severity is Severity.WARNING
    assert found.text.startswith("first: the model's gradient of 8 samples together, without K-FAC, isn't the sum")
