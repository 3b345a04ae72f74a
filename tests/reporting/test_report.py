"""The report of runs: complete, offline, and alive in a browser."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kfac_dist.cli import app
from kfac_dist.config.load import load_config, resolve
from kfac_dist.reporting.report import read_run, write_report
from kfac_dist.training import train

pytest.importorskip("plotly", reason="plotly is not installed: pip install 'kfac_dist[report]'")
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
    for heading in ("Loss", "Where a step", "Who inverted what: mine", "Factors: mine", "Damping, clip"):
        assert heading in body
    assert "early_refresh: 10" in body  # the resolved configuration


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_lives_in_a_browser(run_directory: Path, tmp_path: Path, scheme: str) -> None:
    browsers = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: CI installs one")
    ended = CliRunner().invoke(app, ["report", str(run_directory), "--out", str(tmp_path / "page.html")])
    assert ended.exit_code == 0, ended.output
    complaints: list[str] = []
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1240, "height": 1000}, offline=True)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_selector(".js-plotly-plot .main-svg")
        charts = page.locator(".js-plotly-plot")
        assert charts.count() >= 11
        ink = page.evaluate("document.querySelector('.js-plotly-plot').layout.font.color")
        assert ink == page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()")
        charts.first.locator(".nsewdrag").first.hover()
        charts.first.locator(".scatterlayer .point").first.hover(force=True)
        page.wait_for_selector(".hoverlayer .hovertext")
        cards = "[...document.querySelectorAll('.card')]"
        too_wide = page.evaluate(f"{cards}.filter(card => card.scrollWidth > card.clientWidth).length")
        browser.close()
    assert complaints == []
    assert not too_wide
