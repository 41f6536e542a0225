"""The dashboard in a real browser, on a run whose routing was counted apart from moe_lens."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from support.dashboard import settled, tile
from support.models import EXPERTS, LAYERS

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.xdist_group("browser")]


def go(page: Any, address: str, place: str = "") -> None:
    page.goto(f"{address}/{place}")
    settled(page)


def wait_tile(page: Any, label: str, value: str) -> None:
    metric = page.get_by_test_id("stMetric").filter(has_text=label)
    metric.get_by_test_id("stMetricValue").get_by_text(value, exact=True).wait_for()


def parameters(page: Any) -> dict[str, list[str]]:
    return parse_qs(urlsplit(page.url).query)


def test_the_overview_says_what_was_counted_apart(page: Any, address: str, recorded: Any) -> None:
    go(page, address)
    assert tile(page, "Tokens") == f"{recorded.tokens:,}"
    assert tile(page, "Lost rows") == "0"
    assert tile(page, "Breaches") == "0"
    assert tile(page, "Dropped-token rate") == "0"
    worst = max(max(row) * EXPERTS / sum(row) for row in recorded.routed.values())
    assert tile(page, "Worst balance") == f"{worst:.1f}×"


def test_filters_are_the_link(page: Any, address: str, recorded: Any) -> None:
    go(page, address)
    page.get_by_label("From step").fill("1")
    page.get_by_label("to step").fill("3")
    page.get_by_label("to step").press("Enter")
    narrowed = f"{recorded.tokens // 2:,}"
    wait_tile(page, "Tokens", narrowed)
    expected = {"run": [recorded.path.name], "first_step": ["1"], "last_step": ["3"]}
    assert parameters(page) == expected
    # They outlive a change of the page, and a reload.
    page.get_by_role("link", name="Router").click()
    page.get_by_role("heading", name="Router", exact=True).wait_for()
    settled(page)
    page.wait_for_url(re.compile(r"/router\?.*first_step=1"))
    assert parameters(page) == expected
    page.get_by_role("link", name="Overview").click()
    wait_tile(page, "Tokens", narrowed)
    page.reload()
    wait_tile(page, "Tokens", narrowed)
    assert page.get_by_label("From step").input_value() == "1"
    page.get_by_role("button", name="Reset filters").click()
    wait_tile(page, "Tokens", f"{recorded.tokens:,}")
    assert parameters(page) == {"run": [recorded.path.name]}
    page.go_back()
    wait_tile(page, "Tokens", narrowed)


def test_bad_values_in_a_link_are_left_out_and_said(page: Any, address: str, recorded: Any) -> None:
    go(page, address, "?first_layer=99&last_step=x&tag=nope&rank=-1&run=gone&first_step=1")
    notices = "\n".join(page.get_by_test_id("stAlert").all_inner_texts())
    for bad in ("first_layer=99", "last_step=x", "tag=nope", "rank=-1", "no run gone"):
        assert bad in notices
    assert parameters(page) == {"run": [recorded.path.name], "first_step": ["1"]}


def test_a_query_runs_and_its_numbers_are_those_counted_apart(
    page: Any, address: str, recorded: Any
) -> None:
    go(page, address, "sql")
    query = "select layer, expert, sum(routed)::bigint as n from load group by all order by all"
    page.get_by_label("Query").fill(query)
    page.get_by_label("Query").press("Control+Enter")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text(re.compile(r"\d+ rows in")).wait_for()
    with page.expect_download() as found:
        page.get_by_role("button", name="CSV", exact=True).click()
    lines = found.value.path().read_text().splitlines()
    assert lines[0] == "layer,expert,n"
    rows = [tuple(map(int, line.split(","))) for line in lines[1:]]
    expected = [
        (layer, expert, n)
        for layer, row in recorded.routed.items()
        for expert, n in enumerate(row)
        if n
    ]
    assert rows == expected
    page.get_by_role("tab", name="Chart").click()
    page.locator(".js-plotly-plot .bars").first.wait_for()


def test_what_writes_is_refused_on_the_page(page: Any, address: str) -> None:
    go(page, address, "sql")
    page.get_by_label("Query").fill("copy load to '/tmp/moe_lens_never.csv'")
    page.get_by_label("Query").press("Control+Enter")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("The query could not be run.").wait_for()
    page.get_by_text("this is COPY").wait_for()


def test_a_chart_shows_its_sql_and_hands_it_over(page: Any, address: str) -> None:
    go(page, address, "?first_layer=1")
    page.get_by_test_id("stExpander").first.click()
    code = page.get_by_test_id("stCode").first
    code.get_by_text("layer >= 1").first.wait_for()
    page.get_by_role("button", name="Open on the SQL page").first.click()
    page.get_by_role("heading", name="SQL", exact=True).wait_for()
    settled(page)
    assert "layer >= 1" in page.get_by_label("Query").input_value()
    assert parameters(page)["first_layer"] == ["1"]


def test_a_finding_leads_to_its_page(page: Any, address: str) -> None:
    go(page, address)
    buttons = page.get_by_test_id("stMain").get_by_role("button", name="Experts")
    if buttons.count() == 0:
        pytest.skip("the page that findings of this run lead to is not there")
    buttons.first.click()
    page.get_by_role("heading", name="Experts", exact=True).wait_for()
    settled(page)
    layer = parameters(page)["first_layer"][0]
    assert 0 <= int(layer) < LAYERS
    assert page.get_by_label("From layer").input_value() == layer


def test_markup_in_tags_is_text(page: Any, address: str) -> None:
    # The page's watch fails the test if a picture is fetched.
    for place in ("", "live", "sql"):
        go(page, address, place)
        assert page.locator("b", has_text="bold").count() == 0
        assert page.locator("img[src*='198.51.100.1']").count() == 0
    go(page, address)
    page.get_by_label("Tag").click()
    page.get_by_role("option", name="<b>bold</b>").click()
    page.get_by_text("tag <b>bold</b> & \"q\" $x$ 'y'").wait_for()
    assert parameters(page)["tag"] == ["<b>bold</b> & \"q\" $x$ 'y'"]
