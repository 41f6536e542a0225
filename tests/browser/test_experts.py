"""Choosing an expert in a real browser: by a click on the map, and in the table."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from support.dashboard import settled
from support.models import EXPERTS, LAYERS

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.xdist_group("browser")]

PLOT = ".st-key-experts-map .js-plotly-plot"
WHERE = f"""([layer, expert]) => {{
  const plot = document.querySelector("{PLOT}"), layout = plot._fullLayout;
  const box = plot.getBoundingClientRect();
  return [
    box.x + layout._size.l + layout.xaxis.c2p(expert),
    box.y + layout._size.t + layout.yaxis.c2p(layer),
  ];
}}"""
FRAME = f"""() => {{
  const [s] = document.querySelector("{PLOT}")._fullLayout.shapes;
  return [Math.round((s.y0 + s.y1) / 2), Math.round((s.x0 + s.x1) / 2)];
}}"""


@pytest.fixture
def experts(page: Any, address: str) -> Any:
    page.goto(f"{address}/experts")
    settled(page)
    page.wait_for_selector(f"{PLOT} .main-svg")
    return page


def click(page: Any, layer: int, expert: int) -> None:
    x, y = page.evaluate(WHERE, [layer, expert])
    page.mouse.move(x - 2, y)
    page.mouse.move(x, y)
    hover = page.locator(
        f"{PLOT} .hoverlayer .hovertext", has_text=f"layer {layer}, expert {expert}"
    )
    hover.wait_for()
    page.mouse.down()
    page.mouse.up()


def opened(page: Any, layer: int, expert: int) -> None:
    """Wait until this expert stands below the map with all its sections."""
    page.get_by_role("heading", name=f"Layer {layer}, expert {expert}", exact=True).wait_for()
    settled(page)
    for title in (
        "Load over the mean expert of the layer",
        "Share of the expert's choices",
        "Share of tokens that chose the expert",
        "Share of the expert's tokens",
        "Tokens it serves",
    ):
        page.get_by_text(title).first.wait_for()
    assert page.locator(".js-plotly-plot .main-svg").count() >= 5 * 2
    assert page.evaluate(FRAME) == [layer, expert]


def tile(page: Any, label: str) -> str:
    metric = page.get_by_test_id("stMetric").filter(has_text=label)
    return str(metric.get_by_test_id("stMetricValue").inner_text())


def parameters(page: Any) -> dict[str, list[str]]:
    return parse_qs(urlsplit(page.url).query)


def numbers(recorded: Any, layer: int, expert: int) -> dict[str, str]:
    row = recorded.routed[layer]
    return {
        "Choices": f"{row[expert]:,}",
        "Load": f"{row[expert] * EXPERTS / sum(row):.1f}×",
        "Place in its layer": f"{1 + sum(n > row[expert] for n in row)}/{EXPERTS}",
    }


def test_the_hottest_is_open_at_first(experts: Any, recorded: Any) -> None:
    ratio = {
        (layer, expert): n / sum(row)
        for layer, row in recorded.routed.items()
        for expert, n in enumerate(row)
    }
    hottest = max(ratio, key=lambda each: ratio[each])
    opened(experts, *hottest)
    for label, value in numbers(recorded, *hottest).items():
        assert tile(experts, label) == value


def test_a_click_on_the_map_opens_the_expert(experts: Any, recorded: Any) -> None:
    for layer, expert in ((LAYERS - 1, 2), (0, EXPERTS - 1), (0, 1)):
        click(experts, layer, expert)
        opened(experts, layer, expert)
        for label, value in numbers(recorded, layer, expert).items():
            assert tile(experts, label) == value
        assert parameters(experts)["layer"] == [str(layer)]
        assert parameters(experts)["expert"] == [str(expert)]
    # The address is the view: it comes back as it was.
    experts.reload()
    opened(experts, 0, 1)


def test_a_row_of_the_table_opens_the_expert(experts: Any, recorded: Any) -> None:
    ratio = {
        (layer, expert): n / sum(row)
        for layer, row in recorded.routed.items()
        for expert, n in enumerate(row)
    }
    third = sorted(ratio, key=lambda each: (-ratio[each], each))[2]
    table = experts.get_by_test_id("stDataFrame").first
    box = table.bounding_box()
    # A heading row, then rows of one height (35 px); the first column has the boxes to tick.
    experts.mouse.click(box["x"] + 15, box["y"] + 35 * 3 + 17)
    opened(experts, *third)
    for label, value in numbers(recorded, *third).items():
        assert tile(experts, label) == value


@pytest.mark.parametrize("place", ["experts", "router"])
def test_markup_in_tags_is_text(page: Any, address: str, place: str) -> None:
    # The page's watch fails the test if a picture is fetched.
    page.goto(f"{address}/{place}")
    settled(page)
    assert page.get_by_text("<b>bold</b>").count() > 0
    assert page.locator("b", has_text="bold").count() == 0
    assert page.locator("img[src*='198.51.100.1']").count() == 0


def test_the_routers_numbers_and_repetition_are_drawn(page: Any, address: str) -> None:
    page.goto(f"{address}/router")
    settled(page)
    for title in ("is the surest router", "Z-loss", "Margin", "repeat the token before"):
        page.get_by_text(title).first.wait_for()


def test_a_dropless_model_is_said_to_be_one(page: Any, address: str, recorded: Any) -> None:
    page.goto(f"{address}/capacity")
    settled(page)
    page.get_by_text(f"{LAYERS} layers: dropless").wait_for()
    choices = sum(sum(row) for row in recorded.routed.values())
    assert tile(page, "Choices") == f"{choices:,}"
    page.get_by_text("would drop").first.wait_for()
