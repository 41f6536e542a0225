"""The HTML report in a real browser that reaches nothing but the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Route
from support.traces import Written, write_run

from moe_lens.queries.session import open_trace
from moe_lens.report.contents import SECTIONS
from moe_lens.report.page import save_page

pytestmark = pytest.mark.browser

EVIL = "<img src=x onerror='window.hacked=1'> & \"<b>bold</b>\" </script>"
FIGURES = [s.name for figures in SECTIONS.values() for s in figures if not s.needs_rows]
ROUTED = """() => {
  const cells = document.querySelector("[data-name=load_heatmap]")._fullData[0].customdata;
  return Array.from(cells, (row) => Array.from(row));
}"""
WHERE = """([layer, expert]) => {
  const plot = document.querySelector("[data-name=load_heatmap]");
  plot.scrollIntoView();
  const { xaxis, yaxis } = plot._fullLayout;
  const box = plot.getBoundingClientRect();
  return [box.x + xaxis._offset + xaxis.l2p(expert), box.y + yaxis._offset + yaxis.l2p(layer)];
}"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("traces")
    return write_run(folder / "run & <i>1", steps=6, tokens=300, tags=(EVIL, "code"))


@pytest.fixture(scope="module")
def report(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("reports") / "report.html"
    with open_trace(written.path) as trace:
        save_page(trace, file)
    return file


@contextmanager
def shown(chromium: Browser, file: Path) -> Iterator[Page]:
    """A file, drawn, without a network; afterwards: nothing was asked for, and no complaint."""
    problems: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            problems.append(message.text)

    def only_files(route: Route, request: Request) -> None:
        if request.url.startswith("file:"):
            route.continue_()
        else:
            problems.append(f"asked for {request.url}")
            route.abort()

    context = chromium.new_context(
        viewport={"width": 1400, "height": 900}, color_scheme="light", offline=True
    )
    try:
        page = context.new_page()
        page.route("**/*", only_files)
        page.on("console", heard)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(file.as_uri())
        page.wait_for_selector("body[data-drawn=light]", timeout=60_000)
        yield page
        assert problems == []
    finally:
        context.close()


@pytest.fixture
def opened(chromium: Browser, report: Path) -> Iterator[Page]:
    with shown(chromium, report) as page:
        yield page


def routed(written: Written, layer: int, expert: int) -> int:
    load = written.rows["load"]
    return sum(r["routed"] for r in load if (r["layer"], r["expert"]) == (layer, expert))


def test_every_figure_is_drawn(opened: Page) -> None:
    plots = opened.locator(".js-plotly-plot")
    assert [p.get_attribute("data-name") for p in plots.all()] == FIGURES
    assert opened.locator(".js-plotly-plot:has(.main-svg)").count() == len(FIGURES)
    assert opened.locator("#problem").inner_text() == ""


def test_the_numbers_are_those_written(opened: Page, written: Written) -> None:
    cells = opened.evaluate(ROUTED)
    assert [len(row) for row in cells] == [8, 8]
    for layer in range(2):
        for expert in range(8):
            assert cells[layer][expert] == routed(written, layer, expert)
    train = [r for r in written.rows["load"] if r["phase"] == "train"]
    rate = sum(r["dropped"] for r in train) / sum(r["routed"] for r in train)
    assert f"train {100 * rate:.1f} %" in opened.locator("dl").inner_text()


def test_the_numbers_are_those_that_the_experts_were_given(
    chromium: Browser, recorded: Any, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    with open_trace(recorded.path) as trace:
        save_page(trace, file)
    with shown(chromium, file) as page:
        cells = page.evaluate(ROUTED)
        assert cells == [recorded.routed[layer] for layer in sorted(recorded.routed)]
        tokens = page.locator("dt:text-is('tokens') + dd").inner_text()
        assert tokens.startswith(f"{recorded.tokens:,} valid")


def test_hovering_tells_exact_numbers(opened: Page, written: Written) -> None:
    x, y = opened.evaluate(WHERE, [1, 2])
    opened.mouse.move(x, y)
    text = opened.locator(".hoverlayer .hovertext").text_content(timeout=10_000)
    assert text is not None
    assert "layer 1, expert 2" in text
    assert f"{routed(written, 1, 2):,} choices" in text


def test_text_from_the_trace_is_text(opened: Page) -> None:
    assert opened.locator("h1").inner_text() == "run & <i>1"
    assert opened.locator("h1 i").count() == 0
    shown = opened.locator("[data-name=loss_by_tag] .ytick text").all_text_contents()
    assert any(text.startswith("<img src=x onerror") for text in shown)
    assert opened.evaluate("window.hacked") is None
    assert opened.locator("body img").count() == 0


def test_dark_follows_the_reader(opened: Page) -> None:
    def colours() -> list[Any]:
        return opened.evaluate(  # type: ignore[no-any-return]
            """() => {
              const layout = document.querySelector("[data-name=load_heatmap]")._fullLayout;
              const paper = getComputedStyle(document.body).backgroundColor;
              return [paper, layout.paper_bgcolor, layout.coloraxis2.colorscale[0][1]];
            }"""
        )

    assert colours() == ["rgb(255, 255, 255)", "#ffffff", "#000000"]
    opened.emulate_media(color_scheme="dark")
    opened.wait_for_selector("body[data-drawn=dark]")
    assert colours() == ["rgb(14, 17, 23)", "#0e1117", "#ffffff"]


def test_the_sql_stands_below_its_figure(opened: Page) -> None:
    figure = opened.locator("figure:has([data-name=load_heatmap])")
    assert not figure.locator("pre").is_visible()
    figure.locator("summary").click()
    assert "sum(routed) as routed" in figure.locator("pre").inner_text()
