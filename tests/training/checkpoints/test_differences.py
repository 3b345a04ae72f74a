"""What a run does otherwise than its checkpoint, or than its configuration makes one expect, is said in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kfac_dist.errors import CheckpointError
from kfac_dist.training import train
from kfac_dist.training.checkpoints.differences import differences, divides_work_alike, misfit
from kfac_dist.training.checkpoints.manifest import FileFacts, read_manifest, write_manifest
from tests.training.runs import losses, saved_tensors, small_config


def test_every_key_that_matters_is_listed_with_both_values() -> None:
    before = {
        "run": {"name": "a", "seed": 1},
        "model": {"name": "mlp", "args": {"dims": [6, 5], "bias": True}},
        "optimizer": {"lr": {"value": 0.1}},
        "kfac": {"enabled": True},
        "checkpoint": {"every": 5},
        "gone": 1,
    }
    now = {
        "run": {"name": "b", "seed": 2},
        "model": {"name": "mlp", "args": {"dims": [6, 7], "depth": 2}},
        "optimizer": {"lr": {"value": 0.2}, "new": 3},
        "kfac": {"enabled": False},
        "checkpoint": {"every": 9},
        "engine": {"name": "ddp"},
    }
    assert [str(difference) for difference in differences(before, now)] == [
        "run.seed: 1 → 2",
        "model.args.dims: [6, 5] → [6, 7]",
        "model.args.bias: true → null",
        "model.args.depth: null → 2",
        "optimizer.lr.value: 0.1 → 0.2",
        "kfac.enabled: true → false",
    ]
    assert differences(now, now) == []
    [long] = differences({"data": {"path": "x" * 99}}, {"data": {"path": "y"}})
    assert str(long) == f"data.path: {'x' * 59}… → y"


def test_only_keys_that_form_the_state_explain_a_misfit() -> None:
    damping = {"kfac": {"inversion": {"damping": 1, "solver": "cholesky"}}}
    assert misfit("c", "shape", differences(damping, {"kfac": {"inversion": {"damping": 2}}})) == "shape"
    found = differences(damping, {"kfac": {"inversion": {"damping": 2, "solver": "eigen"}}})
    assert misfit("c", "shape", found) == (
        "c: K-FAC's state has another form here: kfac.inversion.solver: cholesky → eigen; set kfac.inversion.solver = "
        "cholesky again, or begin K-FAC's statistics afresh with checkpoint.kfac=fresh"
    )


def _said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def _begun(directory: Path, **sections: Any) -> None:
    settings: dict[str, Any] = {"kfac": True, "train": {"steps": 6}, "checkpoint": {"every": 3}} | sections
    train(small_config(directory, **settings), quiet=True)


def _resume(directory: Path, **sections: Any) -> None:
    checkpoint = {"every": 3, "resume": "auto", **sections.pop("checkpoint", {})}
    settings: dict[str, Any] = {"kfac": True, "train": {"steps": 9}} | sections
    train(small_config(directory, checkpoint=checkpoint, **settings), quiet=True)


def test_a_resumed_run_says_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _begun(tmp_path)
    assert _said(capsys) == []
    _resume(tmp_path, optimizer={"lr": 0.01}, train={"steps": 9, "batch_size": 8})
    assert _said(capsys) == [
        "differs from the checkpoint: optimizer.lr.value: 0.05 → 0.01, train.batch_size: 7 → 8, train.steps: 6 → 9"
    ]
    _resume(tmp_path, optimizer={"lr": 0.01}, train={"steps": 12, "batch_size": 8, "log_every": 1})
    assert _said(capsys) == ["differs from the checkpoint: train.steps: 9 → 12"]


def test_a_run_that_is_past_its_end_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _begun(tmp_path)
    _resume(tmp_path, train={"steps": 4})
    path = tmp_path / "small/checkpoints/step-00000006"
    past = f"{path} has done 6 steps, and train.steps is 4: nothing is left to train"
    assert _said(capsys) == ["differs from the checkpoint: train.steps: 6 → 4", past]
    assert sorted(losses(tmp_path / "small")) == [1, 2, 3, 4, 5, 6]


def test_a_batch_beyond_the_data_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    growth = {"final": 80, "steps": 2}
    _begun(tmp_path, train={"steps": 2, "batch_size": 53, "batch_growth": growth})
    assert _said(capsys) == [
        "train.batch_size 53 is more than the training data has: a step takes all 52",
        "train.batch_growth.final 80 is more than the training data has: batches grow to 52",
    ]
    _begun(tmp_path, run={"name": "fits"}, train={"steps": 2, "batch_size": 52})
    assert _said(capsys) == []


@pytest.mark.parametrize(
    ("inversion", "difference"),
    [
        ({"solver": "eigen"}, "kfac.inversion.solver: cholesky → eigen; set kfac.inversion.solver = cholesky again"),
        ({"max_factor_dim": 3}, "kfac.inversion.max_factor_dim: null → 3; set kfac.inversion.max_factor_dim = null"),
        ({"inverse_lag": 2}, "kfac.inversion.inverse_lag: 0 → 2; set kfac.inversion.inverse_lag = 0 again"),
    ],
)
def test_a_state_of_another_form_is_refused_by_its_key_and_may_be_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inversion: dict[str, Any], difference: str
) -> None:
    _begun(tmp_path)
    other = {"inversion": {"inverse_every": 4, "damping": 0.1, **inversion}}
    with pytest.raises(CheckpointError) as refused:
        _resume(tmp_path, kfac=other)
    assert difference in str(refused.value)
    assert "checkpoint.kfac=fresh" in str(refused.value)
    assert "\n" not in str(refused.value)
    _resume(tmp_path, kfac=other, checkpoint={"kfac": "fresh"})
    assert sorted(losses(tmp_path / "small")) == list(range(1, 10))
    assert saved_tensors(tmp_path / "small", "kfac.step")["kfac.step"] == 3
    capsys.readouterr()


def test_k_fac_may_be_left_out_and_taken_up_again(tmp_path: Path) -> None:
    _begun(tmp_path)
    _resume(tmp_path, kfac=False)
    assert saved_tensors(tmp_path / "small", "kfac.") == {}
    _resume(tmp_path, train={"steps": 12})
    assert sorted(losses(tmp_path / "small")) == list(range(1, 13))
    assert saved_tensors(tmp_path / "small", "kfac.step")["kfac.step"] == 3


def test_a_checkpoint_without_a_configuration_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As those of an earlier version may be."""
    _begun(tmp_path)
    path = tmp_path / "small/checkpoints/step-00000006"
    facts = json.loads((path / "manifest.json").read_text())
    files = {name: FileFacts(**file) for name, file in facts.pop("files").items()}
    for key in ("format", "sha256", "config"):
        del facts[key]
    write_manifest(path, facts, files)
    assert "config" not in read_manifest(path).facts
    _resume(tmp_path)
    assert _said(capsys) == []
    assert sorted(losses(tmp_path / "small")) == list(range(1, 10))


def test_a_checkpoint_whose_configuration_has_keys_that_are_gone_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _begun(tmp_path)
    path = tmp_path / "small/checkpoints/step-00000006"
    facts = json.loads((path / "manifest.json").read_text())
    files = {name: FileFacts(**file) for name, file in facts.pop("files").items()}
    facts["config"]["kfac"]["update"]["graft_scope"] = "global"
    facts["config"]["kfac"]["distribution"]["cost_model"] = "cubic"
    write_manifest(path, {key: value for key, value in facts.items() if key not in ("format", "sha256")}, files)
    assert read_manifest(path).facts["config"]["kfac"]["update"]["graft_scope"] == "global"
    _resume(tmp_path)
    assert _said(capsys) == ["differs from the checkpoint: train.steps: 6 → 9"]
    assert sorted(losses(tmp_path / "small")) == list(range(1, 10))


def test_an_earlier_versions_configuration_divides_the_work_alike(tmp_path: Path) -> None:
    now = small_config(tmp_path, kfac=True).model_dump(mode="json")
    kfac = now["kfac"]
    without = {**now, "kfac": {**kfac, "update": {key: kfac["update"][key] for key in ("kl_clip", "graft")}}}
    gone = {**now, "kfac": {**kfac, "update": {**kfac["update"], "graft_scope": "layer"}}}
    assert divides_work_alike(now, now)
    assert divides_work_alike(without, now), "a key that it lacks has its default"
    assert divides_work_alike(gone, now), "a key that is gone had the value of today"

    other = {**now, "kfac": {**kfac, "update": {**kfac["update"], "graft_scope": "model"}}}
    batches = {**now, "train": {**now["train"], "batch_size": 8}}
    assert not any(divides_work_alike(before, now) for before in (other, batches, {}))
    assert divides_work_alike({**now, "run": {**now["run"], "name": "other"}}, now)
