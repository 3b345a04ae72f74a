"""Runs import their extensions and know the registered names; an example is short."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.extensions import communicator, engine, solver
from kfac_dist.cli.configuration import check_targets
from kfac_dist.config.yaml.load import dump_yaml, load_config
from kfac_dist.errors import ConfigError
from tests.extensions.parts import run_file

assert all((communicator.CountedCommunicator, engine.OneAllReduce, solver.conjugate_gradients))  # by their imports

EXAMPLES = sorted((Path(__file__).parents[2] / "examples/extensions").glob("*.py"))


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
