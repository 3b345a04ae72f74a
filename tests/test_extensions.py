"""The examples of `examples/extensions/`, on one rank and on two, beside what the package has built in."""

from __future__ import annotations

import copy
import math
import os
import pickle
import sqlite3
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from examples.extensions import sink as sink_example
from examples.extensions import solver as solver_example
from examples.extensions.block import GainLinear, GainLinearBlock
from examples.extensions.communicator import COLLECTIVES, CountedCommunicator
from examples.extensions.engine import OneAllReduce
from examples.extensions.transform import HeavyBall
from kfac_dist import KFAC
from kfac_dist.cli.configuration import check_targets
from kfac_dist.config.schema import Solver
from kfac_dist.config.yaml.load import dump_yaml, load_config
from kfac_dist.curvature.factors import FactorKind, Side, Unit
from kfac_dist.curvature.inverses.solvers import Task, solve
from kfac_dist.errors import ConfigError, KFACError
from kfac_dist.extensions import (
    API_VERSION,
    Engine,
    ExtensionError,
    InputFirstLinearBlock,
    KroneckerBlock,
    LinearBlock,
    Sink,
    Transform,
    register_block,
    register_communicator,
    register_engine,
    register_sink,
    register_solver,
    register_transform,
)
from kfac_dist.training import train
from kfac_dist.training.records.metrics import MetricsWriter, read_metrics
from tests.harness import run_ranks
from tests.training.runs import final_model, launched, losses, small_config

EXAMPLES = sorted((Path(__file__).parents[1] / "examples/extensions").glob("*.py"))
RATE = 0.1
assert sink_example.SQLiteSink
assert solver_example.conjugate_gradients
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


@pytest.mark.parametrize("solver", ["cholesky", "conjugate_gradients"])
def test_registered_blocks_and_solvers_go_on_from_their_saved_state(solver: str) -> None:
    options = options_with("inversion", solver=solver)
    whole, _ = trained(gain_model(linear_model(), 0.5), options, steps=5)
    model = gain_model(linear_model(), 0.5)
    state = None
    for part in (batches(5)[:3], batches(5)[3:]):
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        kfac = KFAC(model, options)
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


class WrongLinear(GainLinear):
    """Has a block that doesn't know of its gain."""


class WrongBlock(InputFirstLinearBlock):
    """Forgets the gain."""

    parameter_names = ("kernel", "offset")


register_block(WrongLinear, WrongBlock, api_version=1)


def test_a_wrong_block_leaves_its_layer_the_plain_gradient() -> None:
    model = nn.Sequential(WrongLinear(5, 6, gain=0.5), nn.Tanh(), nn.Linear(6, 3)).double()
    kfac = KFAC(model, OPTIONS)
    (inputs, labels), *_ = batches(1)
    cross_entropy(model(inputs), labels).backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    kfac.step()
    assert set(kfac.coverage.mismatched) == {"0"}
    assert [block.name for block in kfac.coverage.blocks] == ["2"]
    equal = [torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), plain, strict=True) if p.grad is not None]
    assert equal == [True, True, False, False]
    kfac.remove()


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


def run_file(directory: Path, extension: str, model: str = "{name: mlp, args: {dims: [64, 10]}}") -> Path:
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


def options_with(section: str, **values: Any) -> dict[str, Any]:
    return {**OPTIONS, section: {**OPTIONS.get(section, {}), **values}}


def solved() -> tuple[list[Tensor], list[Tensor]]:
    wanted, _ = trained(linear_model(), OPTIONS)
    found, _ = trained(linear_model(), options_with("inversion", solver="conjugate_gradients"))
    return wanted, found


@ONE_AND_TWO
def test_the_solver_takes_the_step_of_cholesky(ranks: int) -> None:
    for wanted, found in run_ranks(ranks, solved):
        for theirs, ours in zip(wanted, found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
            assert not torch.equal(ours, theirs)


SEEN: list[tuple[Tensor, Tensor]] = []


def kept_and_cholesky(matrices: Tensor, previous: Tensor) -> Tensor:
    SEEN.append((matrices.clone(), previous.clone()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrices))
    matrices.zero_()
    return inverse


def wrong_shape(matrices: Tensor, previous: Tensor) -> Tensor:
    return matrices[0]


def negative(matrices: Tensor, previous: Tensor) -> Tensor:
    return -torch.linalg.inv(matrices)


def not_finite(matrices: Tensor, previous: Tensor) -> Tensor:
    return torch.linalg.inv(matrices) / 0


def raising(matrices: Tensor, previous: Tensor) -> Tensor:
    raise ZeroDivisionError("no")


register_solver("kept", kept_and_cholesky, api_version=1)
for bad in (wrong_shape, negative, not_finite, raising):
    register_solver(f"bad_{bad.__name__}", bad, api_version=1)


def test_a_solver_gets_damped_factors_and_its_last_inverses() -> None:
    SEEN.clear()
    found, _ = trained(linear_model(), options_with("inversion", solver="kept"), steps=3)
    wanted, _ = trained(linear_model(), OPTIONS, steps=3)
    for theirs, ours in zip(wanted, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    shapes = [tuple(matrices.shape) for matrices, _ in SEEN]
    assert sorted(set(shapes)) == [(1, 3, 3), (1, 7, 7), (2, 6, 6)]
    assert all(
        torch.equal(previous, torch.eye(previous.shape[-1]).double().expand_as(previous)) for _, previous in SEEN[:3]
    )
    for (matrices, _), (_, previous) in zip(SEEN[:3], SEEN[3:6], strict=True):
        assert torch.equal(matrices, matrices.mT)
        torch.testing.assert_close(previous @ matrices, torch.eye(matrices.shape[-1]).double().expand_as(matrices))


@pytest.mark.parametrize(
    ("solver", "said"),
    [
        ("bad_wrong_shape", "returned [3, 3] where [1, 3, 3] was due"),
        ("bad_negative", "returned no positive definite matrix"),
        ("bad_not_finite", "returned no positive definite matrix"),
        ("bad_raising", "raises ZeroDivisionError: no"),
    ],
)
def test_cholesky_inverts_and_says_why_where_a_solver_fails(solver: str, said: str) -> None:
    factor = torch.tensor([[4.0, 1, 0], [1, 3, 0], [0, 0, 2]]).double()
    unit = Unit("layer", Side.A, 0, 0, 3, 1, FactorKind.DENSE)
    raised: dict[str, str] = {}
    task = Task(unit, factor[None], 0.5, None, dtype=torch.float64)
    (payload,), failures = solve([task], Solver(solver), raised=raised)
    assert payload is not None
    torch.testing.assert_close(payload.view(3, 3), torch.linalg.inv(factor + 0.5 * torch.eye(3).double()))
    assert failures == 0
    assert raised == {"layer/A/0": f"inverted by cholesky, since {solver} {said}"}


ONE_REFRESH = {"inversion": {"inverse_every": 100, "early_refresh": 0, "damping": 0.05}}


def with_momentum(transforms: dict[str, Any], momentum: float) -> dict[str, Tensor]:
    """Parameters after five steps with the inverses of the first; what is fixed and linear commutes with momentum."""
    model = linear_model()
    wrapped = DistributedDataParallel(model) if dist.get_world_size() > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=momentum)
    distribution = {"placement": "owner"} if dist.get_world_size() > 1 else {}
    options = {**OPTIONS, **ONE_REFRESH, "distribution": distribution}
    kfac = KFAC(wrapped, {**options, "update": {"kl_clip": None, "transforms": transforms}})
    for inputs, labels in batches(5):
        cross_entropy(wrapped(inputs), labels).backward()
        kfac.step()
        optimizer.step()
        optimizer.zero_grad()
    momenta = kfac.state_dict().get("transforms", {})
    kfac.remove()
    return {**{name: p.detach() for name, p in model.named_parameters()}, **{k: v[M] for k, v in momenta.items()}}


M = "heavy_ball.momentum"


def both_momenta() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return with_momentum({}, 0.9), with_momentum({"heavy_ball": {"decay": 0.9}}, 0.0)


@ONE_AND_TWO
def test_the_transform_is_the_momentum_of_an_optimizer_behind_a_fixed_inverse(ranks: int) -> None:
    for wanted, found in run_ranks(ranks, both_momenta):
        for name, theirs in wanted.items():
            torch.testing.assert_close(found[name], theirs, rtol=1e-9, atol=1e-11)
        assert {name: tuple(found[name].shape) for name in ("0", "2")} == {"0": (1, 6, 6), "2": (1, 3, 7)}
        assert bool(found["0"].any())


class Stateless(Transform):
    """Lacks its method."""


@pytest.mark.parametrize(
    ("name", "transform", "said"),
    [
        ("heavy_ball", HeavyBall, "the name 'heavy_ball' is taken, as are "),
        ("inverse", HeavyBall, "the name 'inverse' is taken, as are "),
        ("Own", HeavyBall, "found the name 'Own'; expected lower-case letters, digits and '_'"),
        ("own", Stateless, "Stateless lacks methods: write apply"),
        ("own", dict, "dict must derive from kfac_dist.extensions.Transform"),
        ("own", 5, "found 5 for 'own'; expected a class that derives from Transform"),
    ],
)
def test_no_transform_is_refused(name: str, transform: Any, said: str) -> None:
    with pytest.raises(ExtensionError) as error:
        register_transform(name, transform, api_version=1)
    assert str(error.value).startswith(f"register_transform: {said}")
    assert "\n" not in str(error.value)
    with pytest.raises(ExtensionError, match="found api_version=2, this kfac_dist has 1"):
        register_transform("own", HeavyBall, api_version=2)


def test_a_transform_is_chosen_and_checked_in_a_run(tmp_path: Path) -> None:
    path = run_file(tmp_path, "examples.extensions.transform")
    config = load_config(path, ["kfac.update.transforms={heavy_ball: {decay: 0.5}}"])
    check_targets(config)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_yaml(config))
    assert load_config(resolved) == config
    for key, value, said in [
        ("heavy_bal", "{}", "found 'heavy_bal'; did you mean 'heavy_ball'?; registered by the modules under"),
        ("heavy_ball", "null", "kfac.update.transforms.heavy_ball: found null, expected a mapping"),
    ]:
        with pytest.raises(ConfigError) as error:
            load_config(path, [f"kfac.update.transforms={{{key}: {value}}}"])
        assert said in str(error.value)
    wrong = load_config(path, ["kfac.update.transforms={heavy_ball: {dcay: 0.5}}"])
    with pytest.raises(ConfigError, match=r"transforms\.heavy_ball: got an unexpected keyword argument 'dcay'"):
        check_targets(wrong)


def counted() -> tuple[list[Tensor], list[Tensor], dict[Any, int], dict[str, Any]]:
    wanted, _ = trained(linear_model(), OPTIONS)
    before = len(COLLECTIVES)
    assert before == 0
    model = linear_model()
    wrapped = DistributedDataParallel(model) if dist.get_world_size() > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    kfac = KFAC(wrapped, options_with("distribution", backend="counted"))
    for inputs, labels in batches(5):
        cross_entropy(wrapped(inputs), labels).backward()
        kfac.step()
        optimizer.step()
        optimizer.zero_grad()
    traffic = kfac.communicator.traffic.snapshot()
    counts = dict(COLLECTIVES)
    COLLECTIVES.clear()
    kfac.remove()
    return wanted, [p.detach() for p in model.parameters()], counts, traffic


@ONE_AND_TWO
def test_the_communicator_counts_the_collectives_of_an_equal_run(ranks: int) -> None:
    for wanted, found, counts, traffic in run_ranks(ranks, counted):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
        if ranks == 1:
            assert counts == {}  # one rank talks to nobody
            continue
        totals = Counter[str]()
        for (kind, label), count in counts.items():
            assert kind in ("all_reduce", "broadcast")
            totals[label] += count
        assert {"factors", "inverses"} <= set(totals)
        assert {label: traffic[label][0] for label in totals} == totals


def train_by(directory: str, engine: str) -> None:
    as_launched()
    train(small_config(directory, kfac=True, engine={"name": engine}, checkpoint={"every": 12}), quiet=True)


@ONE_AND_TWO
def test_the_engine_trains_as_ddp_does(ranks: int, tmp_path: Path) -> None:
    for name in ("ddp", "one_all_reduce"):
        run_ranks(ranks, train_by, str(tmp_path / name), name)
    wanted, found = (losses(tmp_path / name / "small") for name in ("ddp", "one_all_reduce"))
    assert len(found) == 12
    assert found == pytest.approx(wanted, rel=1e-5)
    end = final_model(tmp_path / "ddp/small")
    for name, value in final_model(tmp_path / "one_all_reduce/small").items():
        torch.testing.assert_close(value, end[name], rtol=1e-4, atol=1e-6)


class Silent(Engine):
    """Lacks methods."""


REGISTRATIONS = {
    "register_solver": (register_solver, kept_and_cholesky, "expected a function of (matrices, previous)"),
    "register_communicator": (register_communicator, CountedCommunicator.create, "expected a function of (group, "),
    "register_engine": (register_engine, OneAllReduce, "expected a class that derives from Engine"),
}
SHIPPED = {"register_solver": "cholesky", "register_communicator": "mpi", "register_engine": "ddp"}
OWN = {
    "register_solver": "conjugate_gradients",
    "register_communicator": "counted",
    "register_engine": "one_all_reduce",
}


@pytest.mark.parametrize("function", REGISTRATIONS)
def test_what_cannot_serve_is_refused(function: str) -> None:
    register, good, expected = REGISTRATIONS[function]
    for name, thing, version, said in [
        (SHIPPED[function], good, 1, f"the name {SHIPPED[function]!r} is taken, as are "),
        (OWN[function], good, 1, f"the name {OWN[function]!r} is taken, as are "),
        ("Own", good, 1, "found the name 'Own'; expected lower-case letters, digits and '_'"),
        ("own", good, 2, "found api_version=2, this kfac_dist has 1"),
        ("own", 5, 1, expected),
        ("own", lambda: None, 1, "too many positional arguments"),
    ]:
        with pytest.raises(ExtensionError) as error:
            register(name, thing, api_version=version)
        assert str(error.value).startswith(f"{function}: ")
        assert said in str(error.value)
        assert "\n" not in str(error.value)


def test_an_engine_without_methods_is_refused() -> None:
    with pytest.raises(ExtensionError, match="Silent lacks methods: write communicator, gradients, layout, parameters"):
        register_engine("silent", Silent, api_version=1)
    with pytest.raises(ExtensionError, match="OwnLayer must derive from kfac_dist"):
        register_engine("silent", OwnLayer, api_version=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "own", "wrong"),
    [
        ("kfac.inversion.solver", "conjugate_gradients", "conjugate_gradient"),
        ("kfac.distribution.backend", "counted", "count"),
        ("engine.name", "one_all_reduce", "one_allreduce"),
    ],
)
def test_registered_names_are_names_of_a_run(key: str, own: str, wrong: str, tmp_path: Path) -> None:
    """And go through its resolved YAML, copies and pickles unchanged."""
    path = run_file(tmp_path, "examples.extensions.solver")
    config = load_config(path, [f"{key}={own}"])
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    assert (value, type(value)(own) is value, value.added) == (own, True, True)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_yaml(config))
    assert load_config(resolved) == config
    with pytest.raises(ConfigError) as error:
        load_config(path, [f"{key}={wrong}"])
    assert f"{key}: found {wrong!r}, expected one of " in str(error.value)
    assert str(error.value).endswith(f"; did you mean {own!r}?")
    check_targets(config)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_at_most_60_lines(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 60
