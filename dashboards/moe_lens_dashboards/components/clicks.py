"""Clicks on the cells of a heat map, which `st.plotly_chart` does not report.

A component without a look of its own listens where the chart stands, asks Plotly's axes which cell
lies under the pointer, and hands that over. The chart stays the one that Streamlit draws: nothing
is painted twice, and no points lie over the cells. (Plotly's own click event is lost while a chart
is being replaced, as it is by every choice.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

_JS = """
const CLICK = 5;  // pixels that a pointer may move between down and up
const ends = new WeakMap();  // place -> what stops listening there

export default function ({ data, setTriggerValue }) {
  const place = document.querySelector(".st-key-" + CSS.escape(data.place));
  if (!place) return;
  ends.get(place)?.abort();
  const end = new AbortController(), how = { capture: true, signal: end.signal };
  ends.set(place, end);
  place.classList.add("moe-lens-clickable");
  let down = null;
  place.addEventListener("pointerdown", (event) => {
    down = event.target.classList.contains("nsewdrag") && event.button === 0 ? event : null;
  }, how);
  window.addEventListener("pointerup", (event) => {
    const from = down;
    down = null;
    if (!from || Math.hypot(event.x - from.x, event.y - from.y) > CLICK) return;
    const plot = place.querySelector(".js-plotly-plot"), layout = plot?._fullLayout;
    if (!layout) return;
    const box = plot.getBoundingClientRect(), { xaxis, yaxis, _size: size } = layout;
    const x = Math.round(xaxis.p2c(from.x - box.x - size.l));
    const y = Math.round(yaxis.p2c(from.y - box.y - size.t));
    setTriggerValue("clicked", [y, x]);
  }, how);
  return () => end.abort();
}
"""
_CSS = ".moe-lens-clickable .nsewdrag { cursor: pointer !important; }"

_listener = st.components.v2.component(
    "moe_lens.heat_map_clicks", js=_JS, css=_CSS, isolate_styles=False
)


def on_cell(place: str, taken: Callable[[int, int], None]) -> None:
    """Call `taken(y, x)` when a cell of the heat map in a container is clicked.

    Args:
        place: Key of the container (letters and hyphens) that holds one chart of whole-number axes.
        taken: Called before the script runs again, so that the page is drawn with what it chose.
    """
    key = f"clicks {place}"

    def clicked() -> None:
        found = cell(st.session_state[key].get("clicked"))
        if found is not None:
            taken(*found)

    _listener(key=key, data={"place": place}, on_clicked_change=clicked)


def cell(sent: Any) -> tuple[int, int] | None:
    """What a browser sent, if it is a cell: two whole numbers."""
    if not isinstance(sent, list) or len(sent) != 2:
        return None
    if any(isinstance(n, bool) or not isinstance(n, int | float) or n != n // 1 for n in sent):
        return None
    return int(sent[0]), int(sent[1])
