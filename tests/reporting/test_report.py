"""The report of runs: complete, offline, and alive in a browser."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kfac_dist.cli import app
from kfac_dist.config.yaml.load import load_config, resolve
from kfac_dist.errors import KFACError
from kfac_dist.reporting.report import read_run, read_runs, write_report
from kfac_dist.training import train

pytest.importorskip("plotly", reason="plotly is not installed: pip install 'kfac_dist[report]'")
from kfac_dist.reporting.report import charts, factors, inversions  # need plotly

CONFIG = Path(__file__).parents[2] / "configs/digits_autoencoder.yaml"
OVERRIDES = ("train.epochs=null", "train.steps=8", "train.log_every=2", "kfac.curvature.factor_every=2")
INTERVALS = ("kfac.inversion.inverse_every=2", "metrics.spectra=4", "train.evaluate_every=4")


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    overrides = (f"run.directory={directory}", "run.name=mine", *OVERRIDES, *INTERVALS)
    return train(resolve(load_config(CONFIG, overrides)), compare=True, quiet=True).directory


def test_a_run_is_read_with_those_that_it_was_compared_with(run_directory: Path) -> None:
    runs = read_run(run_directory)
    assert [run.name for run in runs] == ["mine", "mine: adamw", "mine: sgd"]
    assert [record["step"] for record in runs[0].records] == [2, 4, 6, 8]
    assert [record["step"] for record in runs[0].evaluations] == [4]
    assert {factor["unit"] for reading in runs[0].readings for factor in reading["factors"]} >= {"linear1/A/0"}
    assert not runs[1].readings
    assert runs[0].result is not None
    assert runs[0].result["name"] == "kfac"


def test_the_page_has_everything_inside(run_directory: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_report(read_run(run_directory), page)
    text = page.read_text()
    body = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r'(?:src|href)="(?:https?:)?//', body)
    for heading in ("Loss", "Time of a step", "Owners of inverses: mine", "Factors: mine", "Damping, clip"):
        assert heading in body
    for drawn in ("inversions that failed", "factors inverted with more damping", "statistics dropped"):
        assert f"{drawn}, so far" in text
    assert "early_refresh: 10" in body  # the resolved configuration


def test_an_infinite_condition_is_a_gap(run_directory: Path) -> None:
    run = read_run(run_directory)[0]
    run.readings[0]["factors"][0]["condition"] = None  # as `curvature.jsonl` has it
    figure = json.loads(factors.conditions(run).to_json())
    values = [value for trace in figure["data"] for value in trace["y"]]  # the worst, so it is drawn
    assert values.count(None) == 1
    assert all(value >= 1 for value in values if value is not None)


def test_a_page_appears_complete_or_not_at_all(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    page.write_text("the last one")
    (tmp_path / "link.html").symlink_to(page)

    def torn(path: Path, text: str, encoding: str = "") -> None:
        with path.open("w") as stream:
            stream.write(text[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", torn)
        with pytest.raises(KFACError, match="No space left on device"):
            write_report(read_run(run_directory), page)
    assert page.read_text() == "the last one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "page.html"]

    write_report(read_run(run_directory), tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink()
    assert page.read_text().endswith("</html>\n")


@pytest.mark.parametrize("name", ["metrics.jsonl", "state.json", "checkpoints/step-00000008/kfac.pt"])
def test_no_page_goes_over_a_file_of_a_run(run_directory: Path, name: str) -> None:
    before = (run_directory / name).read_bytes() if (run_directory / name).exists() else b""
    for out in (run_directory / name, run_directory.parent / "other" / ".." / run_directory.name / name):
        ended = CliRunner().invoke(app, ["report", str(run_directory), "--out", str(out)])

        said = f"--out: {out} may be a file of the run {run_directory}: give a name that ends in .html"
        assert (ended.exit_code, said in ended.output + (ended.stderr or "")) == (2, True), ended.output
    assert not before or (run_directory / name).read_bytes() == before


def test_what_is_no_run_is_told(run_directory: Path, tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert ended.exit_code == 2
    assert "holds no run: it has no config.yaml" in ended.output + (ended.stderr or "")
    torn = tmp_path / "torn"
    shutil.copytree(run_directory, torn)
    with (torn / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 10, "lo')  # as a kill leaves it
    assert len(read_run(torn)[0].records) == 4
    (torn / "curvature.jsonl").write_text("nonsense\n")
    ended = CliRunner().invoke(app, ["report", str(torn)])
    assert ended.exit_code == 2
    assert "curvature.jsonl:1: no JSON" in ended.output + (ended.stderr or "")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.jsonl", b'{"loss": \xff}\n', "metrics.jsonl: can't be read: 'utf-8' codec"),
        ("metrics.jsonl", b"3\n", "metrics.jsonl:1: expected a JSON object, found 3"),
        ("config.yaml", b"\xff", "config.yaml: can't be read"),
        ("metrics.jsonl", b"[" * 200_000 + b"\n", "metrics.jsonl:1: no JSON"),
        ("config.yaml", b"[" * 200_000, "config.yaml is no YAML"),
        ("curvature.jsonl", None, "curvature.jsonl: is no regular file: move it away"),
        ("result.json", b"[]", "result.json: expected a JSON object"),
        ("result.json", b'[{"name": "kf', "result.json: no JSON"),
    ],
)
def test_damaged_files_are_told(tmp_path: Path, file: str, content: bytes | None, said: str) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: mine}\n")
    if content is None:
        os.mkfifo(tmp_path / file)
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(KFACError, match=re.escape(said)):
        read_run(tmp_path)


def test_runs_with_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = tmp_path / "a/mine", tmp_path / "b/mine"
    for directory in (mine, other):
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text("run: {name: mine}\n")
    assert [run.name for run in read_runs([mine, other, mine / "../mine"])] == [str(mine), str(other)]
    monkeypatch.chdir(mine)
    assert [run.name for run in read_runs([Path()])] == ["mine"]


def test_a_long_run_is_drawn_by_few_points_that_lose_no_skip(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: mine}\n")
    taken = [{"step": step, "loss": float(step % 2), "skipped": 0} for step in range(1, 9002)]
    lines = [json.dumps({"step": 778, "skipped": 1} if record["step"] == 778 else record) for record in taken]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    [run] = read_run(tmp_path)
    assert len(run.records) == 1801
    assert run.records[-1]["step"] == 9001
    assert [record["step"] for record in run.records if record["skipped"]] == [780]
    assert {round(record["loss"], 1) for record in run.records[:-1]} == {0.4, 0.5, 0.6}  # 0.5: of four


def test_steps_that_were_all_skipped_are_missing_from_the_loss_alone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: mine}\n")
    logged = [{"step": step, "loss": 1.0, "seconds": 0.1 * step, "skipped": 0} for step in range(1, 11)]
    for record in logged[7:]:
        record["skipped"] = 1
        del record["loss"]  # as a window without a step is written
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in logged))
    runs = read_run(tmp_path)
    assert sum(charts.over_steps(runs, "skipped", "skipped").data[0].y) == 3
    assert list(charts.losses(runs, "step", "step").data[0].x) == [1, 2, 3, 4, 5, 6, 7]
    write_report(runs, tmp_path / "page.html")
    assert "<td>10</td>" in (tmp_path / "page.html").read_text(encoding="utf-8")  # steps


def test_a_game_shows_what_its_evaluations_are(tmp_path: Path) -> None:
    """Its players are inverted one after the other, and what stands for a test loss is a distance of samples."""
    (tmp_path / "config.yaml").write_text("game: {adjustment: 0.3}\n")
    logged = [{"step": 2, "loss": 1.4, "seconds": 0.5}, {"step": 2, "test_loss": 900.0, "test_metric": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in logged))
    row = {"evaluated": "Fréchet distance", "test_loss": 900.0, "train_loss": 950.0, "metric": "m", "metric_value": 1.5}
    (tmp_path / "result.json").write_text(json.dumps(row))
    factor = {"step": 0, "side": "A", "rank": 0, "damping": 0.1, "spectrum": [1.0] * 33, "condition": 1.0, "dim": 2}
    with (tmp_path / "curvature.jsonl").open("w") as stream:
        for player, seconds, costs in (("one", 0.03, (2, 1)), ("two", 0.01, (5,))):
            factors = [factor | {"block": player, "unit": f"{player}/{cost}", "cost": cost} for cost in costs]
            stream.write(json.dumps({"step": 0, "rank": 0, "seconds": seconds, "factors": factors}) + "\n")
    [run] = read_run(tmp_path)
    assert [trace.name for trace in charts.losses([run], "step", "step").data] == [run.name]
    assert charts.samples([run], "test_loss", "distance").data[0].y == (900.0,)
    parts = {bar.text[0]: round(bar.x[0]) for bar in inversions.bars(run).data}
    assert parts == {"one/2": 20, "one/1": 10, "two/5": 10}
    assert [list(trace.y) for trace in inversions.times(run).data] == [[40.0]]
    write_report([run], tmp_path / "page.html")
    assert "Fréchet distance 950" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_names_are_no_markup(run_directory: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange"
    shutil.copytree(run_directory, strange)
    readings = (strange / "curvature.jsonl").read_text()
    (strange / "curvature.jsonl").write_text(readings.replace("linear1", "<b>x"))
    write_report(read_run(strange), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;x" in text.replace("\\u0026", "&")
    assert "<b>x" not in text
    assert "\\u003cb\\u003ex" not in text  # plotly reads some tags in its texts, too


def test_a_report_that_cannot_be_written_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise KFACError("can't write report.html: No space left on device")

    monkeypatch.setattr("kfac_dist.reporting.report.write_report", full)
    options = (f"run.directory={tmp_path}", "train.epochs=null", "train.steps=1")

    ended = CliRunner().invoke(app, ["train", str(CONFIG), *options])

    assert ended.exit_code == 0, ended.output
    assert "no report: can't write report.html: No space left on device" in ended.output
