"""Every file of a shipped run, and what runs saved of it, is read as the version before the sorted folders read it.

`earlier.json.xz` was written by that version, commit 18b35e0: file → its text, and its resolved configuration.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from kfac_dist.config.yaml.load import load_config, resolve

with lzma.open(Path(__file__).parent / "earlier.json.xz") as _archive:
    EARLIER: dict[str, dict[str, Any]] = json.load(_archive)
RUNS = sorted(EARLIER.keys() - {"base.yaml"})
# Key → the value that it always had; without it, that is what is done.
GONE = {"kfac.update.graft_scope": "layer", "kfac.distribution.cost_model": "cubic", "kfac.cg.compare_iterations": 500}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= _leaves(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def _differing(expected: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of a saved configuration that have another value now, or none."""
    before, now = _leaves(expected), _leaves(found)
    return {name: (value, now.get(name, "missing")) for name, value in before.items() if now.get(name, ...) != value}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the files as they were shipped."""
    folder = tmp_path_factory.mktemp("configs")
    for name, file in EARLIER.items():
        (folder / name).write_text(file["written"])
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_shipped_file_says_what_it_said(name: str, written: Path) -> None:
    found = resolve(load_config(written / name)).model_dump(mode="json")
    saved = EARLIER[name]["resolved"]
    gone = {key: (value, "missing") for key, value in GONE.items() if key in _leaves(saved)}
    assert len(gone) >= 2
    assert _differing(saved, found) == gone


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_saved_of_it_is_read(name: str, tmp_path: Path) -> None:
    saved = EARLIER[name]["resolved"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    found = load_config(tmp_path / "config.yaml").model_dump(mode="json")
    assert _differing(saved, found).keys() == GONE.keys() & _leaves(saved).keys()
