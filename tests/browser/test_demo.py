"""The dashboard on the demo's trace: every page, and the Overview's numbers counted apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.dashboard import click_cell, expert_opened, served, settled, tile
from support.demo_counted import EXPERTS, Counted, record_demo

from moe_lens_dashboards.pages import VIEWS

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.xdist_group("browser")]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    return record_demo(tmp_path_factory.mktemp("demo") / "demo")


@pytest.fixture(scope="module")
def demo(counted: Counted) -> Iterator[str]:
    with served(counted.path) as url:
        yield url


@pytest.mark.parametrize("view", VIEWS, ids=lambda v: v.name)
def test_every_page_opens(page: Any, demo: str, view: Any) -> None:
    page.goto(f"{demo}/{view.path}")
    settled(page)
    page.get_by_role("heading", name=view.title, exact=True).wait_for()
    assert page.get_by_test_id("stAlertContentError").count() == 0
    assert page.get_by_text("Page not found").count() == 0


def test_the_overview_says_what_was_counted_apart(page: Any, demo: str, counted: Counted) -> None:
    page.goto(demo)
    settled(page)
    assert tile(page, "Tokens") == f"{counted.tokens.total():,}"
    dropped = counted.dropped.total() / counted.routed.total()
    assert 0.001 < dropped < 1
    for label in ("Dropped-token rate", "Overflow rate"):
        assert float(tile(page, label).removesuffix(" %")) == pytest.approx(
            100 * dropped, abs=0.0051 if dropped < 0.1 else 0.051
        )
    entropy = sum(counted.entropies) / len(counted.entropies)
    assert float(tile(page, "Router entropy")) == pytest.approx(entropy, abs=0.0051)
    assert tile(page, "Lost rows") == tile(page, "Breaches") == "0"


def test_a_filter_narrows_to_what_was_counted_apart(page: Any, demo: str, counted: Counted) -> None:
    page.goto(f"{demo}/?phase=eval")
    settled(page)
    assert tile(page, "Tokens") == f"{counted.tokens['eval']:,}"
    assert counted.dropped["eval", 0] == 0
    assert tile(page, "Dropped-token rate") == "0"


def test_a_chosen_expert_has_the_choices_counted_apart(
    page: Any, demo: str, counted: Counted
) -> None:
    page.goto(f"{demo}/experts")
    settled(page)
    for layer, expert in ((2, 5), (0, EXPERTS - 1)):
        click_cell(page, layer, expert)()
        expert_opened(page, layer, expert)
        chosen = sum(counted.routed[phase, layer, expert] for phase in ("train", "eval"))
        assert tile(page, "Choices") == f"{chosen:,}"
