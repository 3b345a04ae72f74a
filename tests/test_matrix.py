"""The matrix of versions asks for what pyproject.toml promises, and its page shows its results."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from benchmarks import matrix
from benchmarks.reporting import RESULTS

ROOT = Path(__file__).parents[1]


def test_releases_come_from_the_project() -> None:
    assert matrix.requirement("torch", "oldest") == "torch==2.6"
    assert matrix.requirement("deepspeed", "oldest") == "deepspeed==0.19.8"
    assert matrix.requirement("transformers", "newest") == "transformers"
    assert matrix.requirement("torch", "2.7.1") == "torch==2.7.1"
    assert matrix.requirement("accelerate", "constraints").startswith("accelerate==1.")


def test_every_python_that_is_promised_has_a_cell() -> None:
    classifiers = matrix.tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    promised = {entry.rpartition(" ")[2] for entry in classifiers if entry.startswith("Programming Language :: Python")}
    assert {cell.python for cell in matrix.CELLS} == promised


@pytest.mark.parametrize("name", matrix.TORCH_TESTS + matrix.COMPANION_TESTS)
def test_the_chosen_tests_are_there(name: str) -> None:
    path, _, function = name.partition("::")
    names = {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert not function or function in names


def test_a_report_is_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite><testcase classname='tests.a' name='good'/>"
        "<testcase classname='tests.a' name='bad'><failure message='no such name&#10;more'/></testcase>"
        "<testcase classname='tests.a' name='worse'><error message='gone'/></testcase>"
        "<testcase classname='tests.a' name='left'><skipped message='needs root'/></testcase></testsuite></testsuites>"
    )
    outcome = matrix.Outcome("oldest", {"python": "3.11.2", "torch": "2.6.0"}, "the system's", False, "failed")
    matrix.count(report, outcome)
    assert (outcome.passed, outcome.state) == (1, "failed")
    assert outcome.failed == {"tests.a.bad": "no such name", "tests.a.worse": "gone"}
    assert outcome.skipped == {"needs root": 1}
    row = matrix.table([matrix.asdict(outcome)]).splitlines()[-1]
    assert row == (
        "| oldest | 3.11.2 (the system's, not root) | 2.6.0 |  |  |  | 1 passed, 2 failed, 1 skipped | failed |"
    )


def test_an_interpreter_has_the_version_that_was_asked_for() -> None:
    for version in ("3.11", "3.12", "3.13"):
        found = matrix.interpreter(version)
        if found is not None:
            assert matrix.said(found[0], "import sys; print('%d.%d' % sys.version_info[:2])") == version
    assert matrix.interpreter("3.1") is None


def test_the_page_shows_the_results() -> None:
    results = json.loads((RESULTS / "matrix.json").read_text())["results"]
    shown = [result["cell"] for result in results]
    assert shown == [cell.name for cell in matrix.CELLS if cell.name in shown]
    assert matrix.PAGE.read_text() == matrix.write_page(results)
