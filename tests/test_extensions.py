"""The examples of `examples/extensions/`, on one rank and on two, beside what the package has built in."""

from __future__ import annotations

import math
import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from examples.extensions import sink as sink_example
from examples.extensions.block import GainLinear, GainLinearBlock
from kfac_dist import KFAC
from kfac_dist.cli.configuration import check_targets
from kfac_dist.config.yaml.load import load_config
from kfac_dist.errors import ConfigError, KFACError
from kfac_dist.extensions import (
    API_VERSION,
    ExtensionError,
    KroneckerBlock,
    LinearBlock,
    Sink,
    register_block,
    register_sink,
)
from kfac_dist.training import train
from kfac_dist.training.records.metrics import MetricsWriter, read_metrics
from tests.harness import run_ranks
from tests.training.runs import launched, small_config

EXAMPLES = sorted((Path(__file__).parents[1] / "examples/extensions").glob("*.py"))
RATE = 0.1
assert sink_example.SQLiteSink
OPTIONS = {
    "curvature": {"likelihood": "categorical", "factor_dtype": "float64", "factor_every": 1},
    "inversion": {"inverse_every": 2, "damping": 0.05},
    "update": {"kl_clip": 0.01, "kl_clip_lr": RATE},
}
ONE_AND_TWO = pytest.mark.parametrize("ranks", [1, 2])


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's share of batches of 8."""
    generator = torch.Generator().manual_seed(1)
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return [
        (
            torch.randn(8, 5, generator=generator, dtype=torch.float64)[rank::size],
            torch.randint(0, 3, (8,), generator=generator)[rank::size],
        )
        for _ in range(count)
    ]


def linear_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def gain_model(like: nn.Sequential, gain: float) -> nn.Sequential:
    """The same function by layers of another type, the gain of the first made up for by its weight."""
    first, last = like[0], like[2]
    model = nn.Sequential(GainLinear(5, 6, gain), nn.Tanh(), GainLinear(6, 3)).double()
    with torch.no_grad():
        model[0].kernel.copy_(first.weight.T / gain)
        model[2].kernel.copy_(last.weight.T)
        for ours, theirs in ((model[0], first), (model[2], last)):
            ours.offset.copy_(theirs.bias)
    return model


def trained(model: nn.Module, options: dict[str, Any], steps: int = 5) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Parameters after some steps, and the factors by unit."""
    wrapped = DistributedDataParallel(model) if dist.is_initialized() and dist.get_world_size() > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    kfac = KFAC(wrapped, options)
    assert kfac.coverage.uncovered == {}
    for inputs, labels in batches(steps):
        cross_entropy(wrapped(inputs), labels).backward()
        kfac.step()
        optimizer.step()
        optimizer.zero_grad()
    units = kfac.state_dict()["units"]
    factors = {name.removesuffix("/0"): unit["sum"] for name, unit in units.items()}
    assert kfac.coverage.mismatched == {}
    kfac.remove()
    return [p.detach().clone() for p in model.parameters()], factors


def blocks(gain: float) -> tuple[Any, Any]:
    like = linear_model()
    own = gain_model(like, gain)
    return trained(like, OPTIONS), trained(own, OPTIONS)


@ONE_AND_TWO
def test_the_block_has_the_factors_of_an_equal_linear_layer(ranks: int) -> None:
    for (wanted, factors), (found, own) in run_ranks(ranks, blocks, 1.0):
        assert set(own) == set(factors) == {"0/A", "0/G", "2/A", "2/G"}
        for name, factor in factors.items():
            torch.testing.assert_close(own[name], factor, rtol=1e-10, atol=1e-12)
        for theirs, ours in zip(wanted, found, strict=True):
            torch.testing.assert_close(ours.T if ours.ndim == 2 else ours, theirs, rtol=1e-10, atol=1e-12)


def first_step(gain: float) -> tuple[Any, Any]:
    like = linear_model()
    own = gain_model(like, gain)
    return trained(like, OPTIONS, steps=1), trained(own, OPTIONS, steps=1)


@ONE_AND_TWO
def test_the_block_measures_its_own_inputs(ranks: int) -> None:
    gain = 0.5
    for (_, factors), (_, own) in run_ranks(ranks, first_step, gain):
        scale = torch.tensor([gain] * 5 + [1.0], dtype=torch.float64)
        torch.testing.assert_close(own["0/A"], factors["0/A"] * scale[:, None] * scale, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(own["0/G"], factors["0/G"], rtol=1e-10, atol=1e-12)


def test_a_registered_block_goes_on_from_its_saved_state() -> None:
    whole, _ = trained(gain_model(linear_model(), 0.5), OPTIONS, steps=5)
    model = gain_model(linear_model(), 0.5)
    state = None
    for part in (batches(5)[:3], batches(5)[3:]):
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        kfac = KFAC(model, OPTIONS)
        if state is not None:
            kfac.load_state_dict(state)
        for inputs, labels in part:
            cross_entropy(model(inputs), labels).backward()
            kfac.step()
            optimizer.step()
            optimizer.zero_grad()
        state = kfac.state_dict()
        kfac.remove()
    for ours, theirs in zip(model.parameters(), whole, strict=True):
        assert torch.equal(ours, theirs)


class Unfinished(KroneckerBlock):
    """Lacks methods."""


class Unmade(LinearBlock):
    """Is made of something else."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__("", module, None)  # type: ignore[arg-type]


class OwnLayer(nn.Module):
    """Has no block."""


@pytest.mark.parametrize(
    ("layer", "block", "said"),
    [
        (nn.Linear, LinearBlock, "torch.nn.modules.linear.Linear has LinearBlock already"),
        ("torch.nn.modules.linear.Linear", LinearBlock, "has LinearBlock already"),
        (GainLinear, GainLinearBlock, "has GainLinearBlock already"),
        ("GainLinear", LinearBlock, "expected a class that derives from torch.nn.Module, or its full name"),
        (int, LinearBlock, "found the layer type builtins.int; expected a class that derives from torch.nn.Module"),
        (OwnLayer, int, "expected a class that derives from kfac_dist.extensions.KroneckerBlock or Block"),
        (OwnLayer, Unfinished, "Unfinished lacks methods: write input_rows, output_rows, parameter_views"),
        (OwnLayer, Unmade, "Unmade can't be made of (name, module, sharing)"),
    ],
)
def test_no_block_is_refused(layer: Any, block: Any, said: str) -> None:
    with pytest.raises(ExtensionError) as error:
        register_block(layer, block, api_version=1)
    assert str(error.value).startswith("register_block: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(version: Any) -> None:
    with pytest.raises(ExtensionError) as error:
        register_block(OwnLayer, LinearBlock, api_version=version)
    assert f"found api_version={version!r}, this kfac_dist has {API_VERSION}" in str(error.value)
    assert "write api_version=1" in str(error.value)


RUN = """
extensions: [{extension}]
run: {{name: try}}
model: {model}
data: digits
loss: {{name: cross_entropy}}
optimizer: {{name: sgd, lr: 0.1}}
train: {{steps: 2, batch_size: 8}}
"""


def run_file(directory: Path, extension: str, model: str = "mlp") -> Path:
    path = directory / "run.yaml"
    path.write_text(RUN.format(extension=extension, model=model))
    return path


def test_a_run_imports_its_extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_by_yaml.py").write_text("seen = [1]\n")
    monkeypatch.chdir(tmp_path)
    config = load_config(run_file(tmp_path, "imported_by_yaml"))
    assert config.extensions == ("imported_by_yaml",)
    assert sys.modules["imported_by_yaml"].seen == [1]


@pytest.mark.parametrize(
    ("extension", "source", "said"),
    [
        ("no_such_extension", None, "found 'no_such_extension', but there is no module 'no_such_extension'"),
        ("failing_extension", "1 / 0", "importing failing_extension raises ZeroDivisionError: division by zero"),
        (
            "old_extension",
            "from kfac_dist.extensions import *\nregister_block('a.B', LinearBlock, api_version=0)",
            "importing old_extension raises ExtensionError: register_block: found api_version=0, this kfac_dist has 1",
        ),
        ("not-a-name", None, "extensions.0: found 'not-a-name', expected text that matches"),
    ],
)
def test_an_extension_that_cannot_be_imported_is_refused(
    extension: str, source: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source is not None:
        (tmp_path / f"{extension}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    path = run_file(tmp_path, extension)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def as_launched() -> None:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))


def train_with_sink(directory: str, steps: int, changes: dict[str, Any]) -> list[float]:
    """A run whose numbers go to the database."""
    as_launched()
    config = small_config(
        directory,
        kfac=True,
        train={"steps": steps, "evaluate_every": 4},
        metrics={"sinks": {"sqlite": {"file": "own.db"}}},
        **changes,
    )
    return [run.test_loss for run in train(config, quiet=True).runs]


def stored(path: Path) -> list[tuple[int, str, float]]:
    """The database's rows, in the order in which they came."""
    return sqlite3.connect(path).execute("SELECT step, name, value FROM numbers ORDER BY rowid").fetchall()


def rows(records: list[dict[str, Any]]) -> list[tuple[int, str, float]]:
    return [(record["step"], name, value) for record in records for name, value in record.items() if name != "step"]


@ONE_AND_TWO
def test_the_sink_receives_the_records_of_the_run(ranks: int, tmp_path: Path) -> None:
    """Also of one that goes on after an end: what it logs again isn't there twice."""
    run_ranks(ranks, train_with_sink, str(tmp_path), 8, {"checkpoint": {"every": 8}})
    written = read_metrics(tmp_path / "small/metrics.jsonl")
    assert len(written) >= 8
    assert stored(tmp_path / "small/own.db") == rows(written)
    again = {"checkpoint": {"every": 8, "resume": "auto"}}
    run_ranks(ranks, train_with_sink, str(tmp_path), 12, again)
    written = read_metrics(tmp_path / "small/metrics.jsonl")
    assert [record["step"] for record in written if "loss" in record] == list(range(1, 13))
    assert stored(tmp_path / "small/own.db") == rows(written)


class Full(Sink):
    """Takes some records."""

    def __init__(self, directory: Path, first_step: int, *, most: int, closes: bool = True) -> None:
        self.records: list[dict[str, Any]] = []
        self.most = most
        self.closes = closes

    def write(self, record: dict[str, Any]) -> None:
        if len(self.records) == self.most:
            raise ValueError("no room")
        self.records.append(record)

    def close(self) -> None:
        if not self.closes:
            raise TypeError("not open")


register_sink("full", Full, api_version=1)


def test_a_sink_that_fails_ends_the_run_on_every_rank(tmp_path: Path) -> None:
    """And the file has what came before."""
    said = run_ranks(2, fails, str(tmp_path))
    assert said[0] == "metrics.sinks.full: its write raises ValueError: no room"
    assert "rank 0: metrics.sinks.full: its write raises ValueError: no room" in said[1]
    assert len(read_metrics(tmp_path / "small/metrics.jsonl")) >= 3


def fails(directory: str) -> str:
    as_launched()
    with pytest.raises(KFACError) as error:
        train(small_config(directory, metrics={"sinks": {"full": {"most": 2}}}), quiet=True)
    return str(error.value)


def test_a_record_is_the_sinks_own_and_has_none_where_json_has_null(tmp_path: Path) -> None:
    sinks = {"one": Full(tmp_path, 0, most=9), "two": Full(tmp_path, 0, most=9, closes=False)}
    writer = MetricsWriter(tmp_path, 0, sinks)
    writer.write({"step": 1, "loss": math.inf, "rate": 2.0})
    assert sinks["one"].records == sinks["two"].records == [{"step": 1, "loss": None, "rate": 2.0}]
    sinks["one"].records[0].clear()
    assert sinks["two"].records[0]["step"] == 1
    with pytest.warns(UserWarning, match="metrics.sinks.two: its close raises TypeError: not open"):
        writer.close()


@pytest.mark.parametrize(
    ("sinks", "said"),
    [
        (
            "{sqllite: {}}",
            "metrics.sinks.sqllite: found 'sqllite'; did you mean 'sqlite'?; registered by the modules under",
        ),
        ("{sqlite: null}", "metrics.sinks.sqlite: found null, expected a mapping"),
    ],
)
def test_an_unknown_sink_is_refused(sinks: str, said: str, tmp_path: Path) -> None:
    path = run_file(tmp_path, "examples.extensions.sink")
    path.write_text(path.read_text() + f"metrics:\n  sinks: {sinks}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}:10: {said}")


@pytest.mark.parametrize(
    ("sinks", "said"),
    [
        ({"sqlite": {"fil": "x"}}, "metrics.sinks.sqlite: got an unexpected keyword argument 'fil'"),
        ({"full": {}}, "metrics.sinks.full: missing a required argument: 'most'"),
    ],
)
def test_a_check_compares_a_sinks_arguments_and_makes_none(sinks: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = small_config(tmp_path, metrics={"sinks": sinks})
    with pytest.raises(ConfigError) as error:
        check_targets(config)
    assert str(error.value) == said
    check_targets(small_config(tmp_path, metrics={"sinks": {"sqlite": {}, "full": {"most": 1}}}))
    assert list(tmp_path.iterdir()) == []


class Speechless(Sink):
    """Lacks its method."""


@pytest.mark.parametrize(
    ("name", "sink", "said"),
    [
        ("sqlite", Full, "the name 'sqlite' is taken, as are full, sqlite: choose another"),
        ("Own Sink", Full, "found the name 'Own Sink'; expected lower-case letters, digits and '_'"),
        (3, Full, "found the name 3; expected lower-case"),
        ("own", Speechless, "Speechless lacks methods: write write"),
        ("own", dict, "dict must derive from kfac_dist.extensions.Sink"),
        ("own", 5, "found 5 for 'own'; expected a class that derives from Sink"),
        ("own", lambda directory: None, "'own' can't be made of (directory, first_step): too many positional"),
    ],
)
def test_no_sink_is_refused(name: Any, sink: Any, said: str) -> None:
    with pytest.raises(ExtensionError) as error:
        register_sink(name, sink, api_version=1)
    assert str(error.value).startswith(f"register_sink: {said}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_at_most_60_lines(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 60
