"""The dashboard as a process, and a browser's page that tells what went wrong in it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

MAP = ".st-key-experts-map .js-plotly-plot"
_WHERE = f"""([layer, expert]) => {{
  const plot = document.querySelector("{MAP}"), layout = plot._fullLayout;
  const box = plot.getBoundingClientRect();
  return [
    box.x + layout._size.l + layout.xaxis.c2p(expert),
    box.y + layout._size.t + layout.yaxis.c2p(layer),
  ];
}}"""
_FRAMED = f"""([layer, expert]) => {{
  const plot = document.querySelector("{MAP}"), frame = plot?.querySelector(".moe-lens-chosen");
  if (!frame || !plot._fullLayout) return false;
  const box = plot.getBoundingClientRect(), at = frame.getBoundingClientRect();
  const {{ xaxis, yaxis, _size: size }} = plot._fullLayout;
  const x = xaxis.p2c((at.left + at.right) / 2 - box.x - size.l);
  const y = yaxis.p2c((at.top + at.bottom) / 2 - box.y - size.t);
  return Math.round(y) === layer && Math.round(x) === expert;
}}"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(*words: str | Path, cwd: Path | None = None) -> Iterator[str]:
    """The address of `moe-lens dashboard WORDS`, once it answers; it is ended afterwards."""
    port = free_port()
    argv = [sys.executable, "-m", "moe_lens", "dashboard", *map(str, words), "--port", str(port)]
    server = subprocess.Popen(argv, stdout=subprocess.DEVNULL, cwd=cwd)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while not _healthy(address):
            assert server.poll() is None, "the dashboard ended by itself"
            assert time.monotonic() < deadline, "the dashboard did not come up"
            time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


def _healthy(address: str) -> bool:
    try:
        with urlopen(f"{address}/_stcore/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


@contextmanager
def browser() -> Iterator[Any]:
    """Debian's Chromium under Playwright."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=program,
            args=["--no-sandbox"] if os.geteuid() == 0 else [],
        )
        try:
            yield launched
        finally:
            launched.close()


class Watch:
    """What a page asked for, and what it complained about."""

    def __init__(self, page: Any) -> None:
        self.outside: list[str] = []
        self.errors: list[str] = []
        page.on("request", self._request)
        page.on("websocket", lambda socket: self._went(socket.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _request(self, request: Any) -> None:
        self._went(request.url)

    def _went(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob", "about") and parts.hostname != "127.0.0.1":
            self.outside.append(url)


def settled(page: Any) -> None:
    """Wait until the script of the page has run through and its charts are drawn."""
    page.wait_for_selector('[data-testid="stHeading"]')
    page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]')
    page.wait_for_function(
        "() => !document.querySelector('[data-testid=\"stSkeleton\"]') && "
        "[...document.querySelectorAll('.js-plotly-plot')].every(p => p.querySelector('.main-svg'))"
    )


def click_cell(page: Any, layer: int, expert: int) -> Callable[[], None]:
    """Point at a cell of the experts' map, wait for what it says, and return what clicks there."""
    x, y = page.evaluate(_WHERE, [layer, expert])
    page.mouse.move(x - 2, y)
    page.mouse.move(x, y)
    hover = page.locator(
        f"{MAP} .hoverlayer .hovertext", has_text=f"layer {layer}, expert {expert}"
    )
    hover.wait_for()

    def click() -> None:
        page.mouse.down()
        page.mouse.up()

    return click


def expert_opened(page: Any, layer: int, expert: int) -> None:
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
    page.wait_for_function(_FRAMED, arg=[layer, expert])


def tile(page: Any, label: str) -> str:
    """What a tile of the page says."""
    metric = page.get_by_test_id("stMetric").filter(has_text=label)
    return str(metric.get_by_test_id("stMetricValue").inner_text())


def tracebacks(page: Any) -> list[str]:
    """Texts of the exceptions that the page shows."""
    return [str(text) for text in page.locator('[data-testid="stException"]').all_inner_texts()]
