from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kfac_dist.config.schema import (
    Config,
    Likelihood,
    LossTerms,
    ScheduleKind,
    Section,
    Sharing,
)
from kfac_dist.config.yaml.load import dump_yaml, load_config, resolve
from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.config.yaml.reference import explain_key
from kfac_dist.errors import ConfigError

# base.yaml holds what the others share; it is no run by itself.
SHIPPED = [file for file in sorted((Path(__file__).parents[3] / "configs").glob("*.yaml")) if file.name != "base.yaml"]

MINIMAL = """\
run: {name: minimal}
model: autoencoder
data: digits
loss: {name: mse}
optimizer: {lr: 1e-3}
train: {batch_size: 8, steps: 2}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path / "minimal.yaml", MINIMAL)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_shorthands_stand_for_mappings(minimal: Path) -> None:
    config = load_config(minimal)

    assert config.model.name == "autoencoder"
    assert config.model.args == {}
    assert config.optimizer.lr.value == 0.001
    assert config.optimizer.lr.kind is ScheduleKind.CONSTANT


def test_overrides_reach_into_shorthands_and_later_ones_win(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            "model.args.dims=[64, 8]",
            "optimizer.lr.kind=cosine",
            "optimizer.lr.final=0",
            "train.steps=5",
            "train.steps=7",
            "kfac.curvature.sharing_overrides={'blocks.*.attn': reduce}",
            "compare.adamw={name: adamw, lr: 1e-2}",
            "compare.adamw.weight_decay=.1",
        ],
    )

    assert config.model.name == "autoencoder"
    assert config.model.args == {"dims": [64, 8]}
    assert (config.optimizer.lr.value, config.optimizer.lr.kind) == (0.001, ScheduleKind.COSINE)
    assert config.train.steps == 7
    assert config.kfac.curvature.sharing_overrides == {"blocks.*.attn": Sharing.REDUCE}
    assert (config.compare["adamw"].lr.value, config.compare["adamw"].weight_decay) == (0.01, 0.1)


def test_overrides_count_into_lists(minimal: Path) -> None:
    write(
        minimal, MINIMAL.replace("model: autoencoder", "model: {name: autoencoder, args: {dims: [64, [1, {a: 2}], 8]}}")
    )

    config = load_config(
        minimal,
        [
            "model.args.dims.0=3",
            "model.args.dims.1.1.a=4",
            "model.args.dims.1.1.b=[5, 6]",
            "model.args.dims.1.1.b.1=7",
            "optimizer={lr: 1, name: adamw, betas: [0.8, 0.9]}",
            "optimizer.betas.1=0.99",
            "kfac.curvature.sharing_overrides.0=reduce",
        ],
    )

    assert config.model.args == {"dims": [3, [1, {"a": 4, "b": [5, 7]}], 8]}
    assert config.optimizer is not None
    assert config.optimizer.betas == (0.8, 0.99)
    assert config.kfac.curvature.sharing_overrides == {"0": Sharing.REDUCE}
    whole = load_config(minimal, ["model.args.dims={a: 3}"])
    assert whole.model.args == {"dims": {"a": 3}}


def test_a_scalar_replaces_a_mapping_and_null_takes_a_value_back(minimal: Path) -> None:
    write(minimal, MINIMAL.replace("lr: 1e-3", "lr: {value: 1, kind: linear, final: 0}"))

    config = load_config(minimal, ["optimizer.lr=0.5", "train.steps=null", "train.epochs=3"])

    assert (config.optimizer.lr.value, config.optimizer.lr.kind) == (0.5, ScheduleKind.CONSTANT)
    assert (config.train.steps, config.train.epochs) == (None, 3)


def test_includes_merge_in_order_relative_to_the_including_file(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", MINIMAL + "engine: {bucket_cap_mb: 3}\n")
    write(tmp_path / "parts" / "long.yaml", "train: {steps: 99, log_every: 4}\n")
    write(tmp_path / "parts" / "both.yaml", "include: [../base.yaml, long.yaml]\nrun: {seed: 5}\n")
    top = write(tmp_path / "top.yaml", "include: parts/both.yaml\ntrain: {log_every: 6}\n")

    config = load_config(top)

    assert (config.run.name, config.run.seed) == ("minimal", 5)
    assert (config.train.batch_size, config.train.steps, config.train.log_every) == (8, 99, 6)
    assert config.engine.bucket_cap_mb == 3


def test_one_file_may_be_included_along_two_ways(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", MINIMAL)
    write(tmp_path / "a.yaml", "include: base.yaml\n")
    write(tmp_path / "b.yaml", "include: base.yaml\n")

    assert load_config(write(tmp_path / "top.yaml", "include: [a.yaml, b.yaml]\n")).run.name == "minimal"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.e3", 1000.0),
        (".5", 0.5),
        ("-2E+2", -200.0),
        ("1_000", 1000),
        ("+7", 7),
        ("0", 0),
        ("007", "007"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("no", "no"),
        ("on", "on"),
        ("0x1f", "0x1f"),
        ("TRUE", True),
        ("false", False),
        ("~", None),
        ("", None),
        ("-.inf", float("-inf")),
        ("'1e-3'", "1e-3"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
        ("[1, two, {three: 3}]", [1, "two", {"three": 3}]),
    ],
)
def test_scalars_read_as_they_look(minimal: Path, text: str, value: object) -> None:
    found = load_config(minimal, [f"model.args.x={text}"]).model.args["x"]

    assert found == value
    assert type(found) is type(value)


def test_anchors_and_merge_keys(minimal: Path) -> None:
    write(
        minimal,
        MINIMAL + "compare:\n  a: &a {lr: 1, momentum: 0.5}\n  b: {<<: *a, lr: 2}\n  c: {<<: [{lr: 4}, *a]}\n",
    )

    compare = load_config(minimal).compare

    assert [compare[name].lr.value for name in "abc"] == [1, 2, 4]
    assert [compare[name].momentum for name in "abc"] == [0.5, 0.5, 0.5]


def test_a_byte_order_mark_is_no_key(minimal: Path) -> None:
    minimal.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())

    assert load_config(minimal).run.name == "minimal"


@pytest.mark.parametrize(
    ("loss", "likelihood", "terms"),
    [
        ("cross_entropy", Likelihood.CATEGORICAL, LossTerms.SAMPLE),
        ("token_cross_entropy", Likelihood.CATEGORICAL, LossTerms.TOKEN),
        ("sigmoid_cross_entropy", Likelihood.BERNOULLI, LossTerms.SAMPLE),
        ("mse", Likelihood.GAUSSIAN, LossTerms.SAMPLE),
    ],
)
def test_resolving_fills_in_the_likelihood_of_the_loss(
    minimal: Path, loss: str, likelihood: Likelihood, terms: LossTerms
) -> None:
    curvature = resolve(load_config(minimal, [f"loss.name={loss}"])).kfac.curvature

    assert (curvature.likelihood, curvature.loss_terms) == (likelihood, terms)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optimizer={name: adamw, betas: [0.8, 0.95]}", "train.steps=null", "train.epochs=1"],
        ["loss.name=token_cross_entropy", "kfac.curvature.fisher=mc", "kfac.update.kl_clip=null"],
        ["kfac.inversion.damping={value: 1, kind: exponential, final: 1e-7, warmup_steps: 3, warmup_from: 9.0}"],
        ["model.args={a: '1e-3', b: 'no', c: '012', d: 1e-30, e: null, f: [], g: {}, h: 'null', i: é, j: '<<'}"],
        ["kfac.distribution={placement: hybrid, grad_worker_fraction: 0.5}", "compare.sgd.lr=1"],
    ],
)
def test_a_resolved_configuration_survives_writing_and_reading(minimal: Path, overrides: list[str]) -> None:
    config = resolve(load_config(minimal, overrides))

    again = load_config(write(minimal.with_name("again.yaml"), dump_yaml(config)))

    assert again == config
    assert resolve(again) == config


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_a_shipped_configuration_loads(file: Path) -> None:
    assert isinstance(resolve(load_config(file)), Config)


def sections(config: Section, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Section]]:
    """Every section of a configuration, by its path."""
    yield path, config
    for name in type(config).model_fields:
        if isinstance(below := getattr(config, name), Section):
            yield from sections(below, (*path, name))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_what_a_run_saved_with_keys_that_are_gone_loads(file: Path, tmp_path: Path) -> None:
    """Saved files spell every default out: those of keys that are gone say what is done today."""
    config = resolve(load_config(file))
    values = yaml.safe_load(dump_yaml(config))
    added = []
    for path, section in sections(config):
        below = functools.reduce(operator.getitem, path, values)
        below |= {key: gone.default for key, gone in section.gone.items()}
        added += section.gone
    saved = write(tmp_path / "config.yaml", yaml.safe_dump(values, allow_unicode=True))

    assert {"graft_scope", "cost_model"} <= set(added)
    assert ("compare_iterations" in added) == (config.kfac.cg is not None)
    assert load_config(saved) == config


def test_keys_that_are_gone_say_what_to_write_instead(minimal: Path) -> None:
    message = "kfac.update.graft_scope is gone: leave it out; each layer gets its own length"
    with pytest.raises(ConfigError, match=re.escape(f"command line (kfac.update.graft_scope=global): {message}")):
        load_config(minimal, ["kfac.update.graft_scope=global"])
    file = write(minimal, MINIMAL + "kfac:\n  update:\n    graft: sign\n    graft_scope: global\n")
    with pytest.raises(ConfigError, match=re.escape(f"minimal.yaml:10: {message}")):
        load_config(file)
    with pytest.raises(ConfigError, match=re.escape("graft_scope is gone: leave it out; each layer")):
        parse_kfac({"update": {"graft": "sign", "graft_scope": "global"}})
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        explain_key("kfac.update.graft_scope")
    assert parse_kfac({"update": {"graft_scope": "layer"}}) == parse_kfac({})
