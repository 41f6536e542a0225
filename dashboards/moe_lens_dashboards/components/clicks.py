"""Choosing a cell of a heat map: its clicks, which `st.plotly_chart` does not report, and a frame.

A component without a look of its own listens where the chart stands, asks Plotly's axes which cell
lies under the pointer, and hands that over. The chart stays the one that Streamlit draws: nothing
is painted twice, and no points lie over the cells. (Plotly's own click event is lost while a chart
is being replaced.) The frame around the chosen cell lies over the chart and moves by itself, so
that choosing another cell does not draw a map of thousands of cells again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

_JS = """
const CLICK = 5;   // pixels that a pointer may move between down and up
const LEAST = 16;  // pixels of the frame, so that it is found where cells are small
const ends = new WeakMap();  // place -> what stops listening there

// Where a cell lies in the plot's box, in pixels: its middle, and its half width and height.
function around(layout, [row, column]) {
  const { xaxis, yaxis, _size: size } = layout;
  const half = (axis) => Math.max(LEAST, Math.abs(axis.c2p(1) - axis.c2p(0))) / 2;
  return {
    x: size.l + xaxis.c2p(column), y: size.t + yaxis.c2p(row), w: half(xaxis), h: half(yaxis),
    inside: xaxis.c2p(column) >= 0 && xaxis.c2p(column) <= xaxis._length
      && yaxis.c2p(row) >= 0 && yaxis.c2p(row) <= yaxis._length,
  };
}

export default function ({ data, setTriggerValue }) {
  const place = document.querySelector(".st-key-" + CSS.escape(data.place));
  if (!place) return;
  ends.get(place)?.();
  const end = new AbortController(), how = { capture: true, signal: end.signal };
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

  const frame = document.createElement("div");
  frame.className = "moe-lens-chosen";
  frame.dataset.cell = JSON.stringify(data.chosen);
  let known = null;
  function draw() {
    const plot = place.querySelector(".js-plotly-plot"), layout = plot?._fullLayout;
    if (end.signal.aborted || !layout?.xaxis?._length) return;
    if (plot !== known) {
      known?.removeListener("plotly_afterplot", draw);
      plot.on("plotly_afterplot", draw);
      known = plot;
    }
    const { x, y, w, h, inside } = around(layout, data.chosen);
    const style = `left:${x - w}px; top:${y - h}px; width:${2 * w}px; height:${2 * h}px;`
      + (inside ? "" : "display:none");
    if (frame.parentNode !== plot) plot.append(frame);
    if (frame.getAttribute("style") !== style) frame.setAttribute("style", style);
  }
  // The chart may come later than this, and be replaced by another.
  const seen = new MutationObserver(draw);
  seen.observe(place, { childList: true, subtree: true });
  draw();

  const stop = () => {
    end.abort();
    seen.disconnect();
    known?.removeListener("plotly_afterplot", draw);
    frame.remove();
  };
  ends.set(place, stop);
  return stop;
}
"""
_CSS = """
.moe-lens-clickable .nsewdrag { cursor: pointer !important; }
.moe-lens-clickable .js-plotly-plot { position: relative; }
/* A colour of no colour axis, seen on every cell. */
.moe-lens-chosen { position: absolute; box-sizing: border-box; pointer-events: none;
  border: 3px solid #d6006c; }
"""

_listener = st.components.v2.component(
    "moe_lens.heat_map_clicks", js=_JS, css=_CSS, isolate_styles=False
)


def on_cell(place: str, chosen: tuple[int, int], taken: Callable[[int, int], None]) -> None:
    """Frame a cell of a heat map, and call `taken(y, x)` when one is clicked.

    Args:
        place: Key of the container (letters and hyphens) that holds one chart of whole-number axes.
        chosen: The cell (y, x) that gets the frame.
        taken: Called before the script runs again, so that the page is drawn with what it chose.
    """
    key = f"clicks {place}"

    def clicked() -> None:
        found = cell(st.session_state[key].get("clicked"))
        if found is not None:
            taken(*found)

    data = {"place": place, "chosen": list(chosen)}
    _listener(key=key, data=data, on_clicked_change=clicked)


def cell(sent: Any) -> tuple[int, int] | None:
    """What a browser sent, if it is a cell: two whole numbers."""
    if not isinstance(sent, list) or len(sent) != 2:
        return None
    if any(isinstance(n, bool) or not isinstance(n, int | float) or n != n // 1 for n in sent):
        return None
    return int(sent[0]), int(sent[1])
