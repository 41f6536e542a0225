"""Choosing an expert in a real browser: by a click on the map, and in the table."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from support.dashboard import MAP, click_cell, expert_opened, settled, tile
from support.models import EXPERTS, LAYERS

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.xdist_group("browser")]


@pytest.fixture
def experts(page: Any, address: str) -> Any:
    page.goto(f"{address}/experts")
    settled(page)
    page.wait_for_selector(f"{MAP} .main-svg")
    return page


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
    expert_opened(experts, *hottest)
    for label, value in numbers(recorded, *hottest).items():
        assert tile(experts, label) == value


def test_a_click_on_the_map_opens_the_expert(experts: Any, recorded: Any) -> None:
    for layer, expert in ((LAYERS - 1, 2), (0, EXPERTS - 1), (0, 1)):
        click_cell(experts, layer, expert)()
        expert_opened(experts, layer, expert)
        for label, value in numbers(recorded, layer, expert).items():
            assert tile(experts, label) == value
        assert parameters(experts)["layer"] == [str(layer)]
        assert parameters(experts)["expert"] == [str(expert)]
    # The address is the view: it comes back as it was.
    experts.reload()
    expert_opened(experts, 0, 1)


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
    expert_opened(experts, *third)
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
