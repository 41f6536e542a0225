"""`make screenshots`: a picture of every page of the dashboard on a run."""

from __future__ import annotations

import sys
from pathlib import Path

from support.dashboard import browser, served, settled

from moe_lens_dashboards.pages import VIEWS

WIDTH, HEIGHT, LONGEST = 1400, 900, 2400


def main(run: Path, out: Path, *beside: Path) -> None:
    """Write `dashboard-<page>.png` for every page.

    Args:
        run: Folder of a trace.
        out: Folder of the pictures.
        beside: Folders that the dashboard is started on, too, as of a laboratory.
    """
    with served(run, *beside) as address, browser() as chromium:
        page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.set_default_timeout(90_000)
        for view in (v for v in VIEWS if v.only_with is None or v.only_with(str(run))):
            page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
            page.goto(f"{address}/{view.path}")
            page.get_by_role("heading", name=view.title, exact=True).wait_for()
            settled(page)
            if view.name == "sql":
                page.get_by_role("button", name="Run", exact=True).click()
                page.get_by_text("rows in").wait_for()
            # The page scrolls inside the window: a window of its height shows all of it.
            inside = page.get_by_test_id("stMain")
            height = inside.evaluate("e => e.firstElementChild.scrollHeight")
            page.set_viewport_size({"width": WIDTH, "height": max(HEIGHT, min(height, LONGEST))})
            settled(page)
            page.wait_for_timeout(500)  # charts follow a new size after a moment
            page.screenshot(path=out / f"dashboard-{view.name}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
