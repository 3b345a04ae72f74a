"""The page in a browser: alive, and readable in light and dark, on a telephone, for a model of hundreds of factors."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.reporting.report import read_run, write_report
from tests.reporting.browser import DRAWN, contrast, opened
from tests.reporting.large_run import write_large_run

pytest.importorskip("plotly", reason="plotly is not installed: pip install 'kfac_dist[report]'")

LEGIBLE = 4.5  # WCAG 2.2, success criterion 1.4.3
STYLES = "element => [getComputedStyle(element).color, getComputedStyle(element).backgroundColor]"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_large_run(tmp_path_factory.mktemp("runs") / "large")
    write_report(read_run(directory), directory / "report.html")
    return directory / "report.html"


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1240)])
def test_it_lives_in_a_browser(path: Path, scheme: str, width: int) -> None:
    with opened(path, scheme=scheme, width=width) as page:
        assert page.evaluate(f"{DRAWN}.length") == 10
        variable = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
        ink, low, high = (page.evaluate(variable, name) for name in ("--ink", "--low", "--high"))
        assert page.evaluate(f"{DRAWN}.every(chart => chart.layout.font.color === '{ink}')")

        # Nothing makes the page wider than the screen, and no legend leaves its curves without room.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        too_wide = "[...document.querySelectorAll('.card')].filter(card => card.scrollWidth > card.clientWidth).length"
        assert page.evaluate(too_wide) == 0
        sizes = page.evaluate(f"{DRAWN}.map(chart => [chart._fullLayout._size.h, chart.data.length])")
        assert min(height for height, _ in sizes[:2] + sizes[3:]) >= 200  # the third has a bar a run
        assert sizes[2][0] >= 50
        assert max(traces for _, traces in sizes) <= 30

        # The ranks in the cells can be read on either end of the scale.
        cells = page.evaluate(f"(({{colorscale, textfont}}) => [colorscale, textfont.color])({DRAWN}[3].data[0])")
        assert cells == [[[0, low], [1, high]], ink]
        assert min(contrast(ink, low), contrast(ink, high)) >= LEGIBLE

        # Menus: legible at rest, under the pointer and open, and what they choose is drawn.
        menus = page.locator("select")
        assert [menu.locator("option").count() for menu in menus.all()] == [240, 231, 111]
        for menu in menus.all():
            assert contrast(*menu.evaluate(STYLES)) >= LEGIBLE
            for option in menu.locator("option").all()[:3]:  # the first is the chosen one
                assert contrast(*option.evaluate(STYLES)) >= LEGIBLE
            menu.hover()
            assert contrast(*menu.evaluate(STYLES)) >= LEGIBLE
        chart = f"{DRAWN}[{page.evaluate(f'{DRAWN}.findIndex(chart => chart.layout.meta)') + 1}]"
        assert page.evaluate(f"{chart}.data.at(-1).visible") is False
        menus.nth(1).select_option("layers.3.qkv/A/0")
        page.wait_for_function(f"{chart}.data.at(-1).visible === true")
        assert page.evaluate(f"[{chart}.data.at(-1).name, {chart}.data.at(-1).y[0]]") == ["layers.3.qkv/A/0", 34]

        first = page.locator(".js-plotly-plot").first
        first.locator(".scatterlayer .point").first.hover(force=True)
        page.wait_for_selector(".hoverlayer .hovertext")
