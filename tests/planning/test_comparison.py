"""`kfac-dist plan` with strategies: every shipped run, and a recommendation that can be pasted."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from kfac_dist.cli import app

CONFIGS = Path(__file__).parents[2] / "configs"
# base.yaml is no run; gpt_1.3b.yaml has a test of its own; the data of mnist5k takes seconds to read.
APART = {"base.yaml", "gpt_1.3b.yaml", "mnist5k_autoencoder.yaml"}
SHIPPED = sorted(file.name for file in CONFIGS.glob("*.yaml") if file.name not in APART)


def planned(*arguments: str) -> str:
    ended = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.output


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_run_is_compared(name: str) -> None:
    output = planned(str(CONFIGS / name), "--strategies", "--world-size", "4", "--hardware", "cpu-gloo")
    assert "4 ranks, 4 a node" in output
    assert "as configured" in output
    assert "statistics are not in the times" not in output
    rows = [line for line in output.splitlines() if line.lstrip().startswith(("→", "*"))]
    assert 1 <= len(rows) <= 2


def test_a_gpt_of_13_billion_is_compared_in_seconds() -> None:
    began = time.process_time()
    output = planned(str(CONFIGS / "gpt_1.3b.yaml"), "--world-size", "8,64", "--hardware", "h100-ib400")
    assert time.process_time() - began < 60
    assert [line.split()[0] for line in output.splitlines() if " ranks, 8 a node" in line] == ["8", "64"]
    assert "datasheet figures with assumed efficiencies, not measured" in output


def test_what_is_recommended_can_be_pasted(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"include: {CONFIGS / 'byte_gpt.yaml'}\n")
    hardware = ("--world-size", "64", "--hardware", "a100-ethernet100", "--strategies")
    first = planned(str(run), *hardware)
    pasted = first[first.index("\nkfac:\n") :].split("\n\n")[0]
    assert yaml.safe_load(pasted)["kfac"]["distribution"]
    run.write_text(run.read_text() + pasted + "\n")
    again = planned(str(run), *hardware)
    assert "Recommended: as configured" in again
    table = planned(str(run), "--world-size", "64", "--node-size", "8")
    assert "64 ranks. Inversion load" in table


def test_rows_name_what_they_differ_by() -> None:
    arguments = (str(CONFIGS / "byte_gpt.yaml"), "--world-size", "64", "--hardware", "h100-ib400")
    output = planned(*arguments)
    rows = table_rows(output)

    assert len(rows) == len(set(rows))
    shared = re.findall(r"^Every row but \* has (.*); the rows name what else they change", output, flags=re.MULTILINE)
    assert len(shared) == 1
    for change in shared[0].split(", "):
        assert not any(change in row for row in rows)
    assert "as configured" in rows
    assert len(rows) <= 9

    whole = planned(*arguments, "--all")
    assert len(table_rows(whole)) == len(set(table_rows(whole))) > len(rows)
    assert "--all shows them" in output
    assert "--all shows them" not in whole


def table_rows(output: str) -> list[str]:
    """The names in the column `strategy`, each in one line."""
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if set(line.strip()) == {"─"}) + 1
    names: list[str] = []
    for line in lines[start:]:
        if not line.strip():
            return names
        name, _, numbers = line[5:].partition("   ")
        if numbers.strip():
            names.append(name.strip())
        else:
            names[-1] += f" {name.strip()}"
    raise AssertionError("the table has no end")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size", "8,x"], "error: --world-size: found '8,x', expected numbers of ranks from 1 on"),
        (["--world-size", "0"], "error: --world-size: found '0'"),
        (["--hardware", "h10"], "error: --hardware: found 'h10'"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str) -> None:
    ended = CliRunner().invoke(app, ["plan", str(CONFIGS / "digits_classifier.yaml"), *arguments])
    assert ended.exit_code == 2
    assert ended.output.startswith(message)
