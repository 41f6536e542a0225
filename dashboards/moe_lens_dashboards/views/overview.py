"""Overview: health at a glance, with what to look at first."""

from __future__ import annotations

from typing import Any

import streamlit as st

from moe_lens.figures.load_heatmap import load_heatmap
from moe_lens.figures.load_over_time import load_over_time
from moe_lens.figures.quality_by_tag import quality_by_tag
from moe_lens.numbers import NONE, count, decimal, percent, times
from moe_lens_dashboards.components import link
from moe_lens_dashboards.components.notices import not_recorded
from moe_lens_dashboards.components.run import OpenRun
from moe_lens_dashboards.components.show import draw
from moe_lens_dashboards.components.words import plain
from moe_lens_dashboards.findings import DATA, MODEL, Answers, Finding, look_first
from moe_lens_dashboards.pages import VIEWS
from moe_lens_dashboards.tiles import Tiles, tiles

_SHOWN = 8
"""Findings that are shown at most."""

_ICONS = {DATA: ":red[:material/error:]", MODEL: ":orange[:material/warning:]"}


def page(run: OpenRun) -> None:
    """Draw the page."""
    answers = Answers(
        layer_balance=_rows(run, "layer_balance"),
        dropped_tokens=_rows(run, "dropped_tokens", by_tag=False),
        router_confidence=_rows(run, "router_confidence", by_tag=False),
        dead_experts=_rows(run, "dead_experts"),
        quality_by_tag=_rows(run, "quality_by_tag"),
        capture_health=_rows(run, "capture_health"),
    )
    every = run.every()
    numbers = tiles(answers, _rows(run, "all_to_all", every=every))
    _tiles(numbers, imported=bool(run.info.imported))
    if numbers.tokens == 0:
        not_recorded(run, "rows in these steps")
        return
    _findings(look_first(run.info, answers))
    draw(run, load_heatmap, "load_map")
    draw(run, load_over_time, "load_over_time", every=every)
    draw(run, quality_by_tag, "quality_by_tag")


def _tiles(numbers: Tiles, *, imported: bool) -> None:
    worst = NONE if numbers.worst_layer is None else f"layer {numbers.worst_layer}"
    a2a = numbers.all_to_all_ms
    unseen = "not known" if imported else "not seen"
    shown = [
        ("Tokens", count(numbers.tokens), "Valid tokens: no padding, each once."),
        ("Overflow rate", percent(numbers.overflow_rate), "Choices that found their expert full."),
        ("Dropped-token rate", percent(numbers.dropped_rate), "Choices that no expert computed."),
        (
            "Router entropy",
            decimal(numbers.entropy_norm),
            "Over its maximum: 0 is certain, 1 undecided. Mean over layers and tokens.",
        ),
        (
            "Worst balance",
            times(numbers.max_over_mean),
            f"Hottest expert over the mean, in {worst}. "
            f"An unbiased router gives {decimal(numbers.floor)}× there by chance.",
        ),
        (
            "All-to-all",
            unseen if a2a is None else f"{decimal(a2a)} ms",
            "Dispatch and combine of one layer in one forward, mean.",
        ),
    ]
    if not imported:  # nobody watched the recorder of an imported trace
        shown += [
            ("Lost rows", count(numbers.lost_rows), "Rows of single tokens that were not written."),
            ("Breaches", count(numbers.breaches), "Invariants of the capture that failed."),
        ]
    for start in range(0, len(shown), 4):
        # The last row may have fewer.
        for column, (label, value, help) in zip(
            st.columns(4), shown[start : start + 4], strict=False
        ):
            column.metric(label, value, help=help, border=True)


def _findings(found: list[Finding]) -> None:
    st.subheader("Look at first", anchor=False)
    if not found:
        st.success("Nothing stands out.", icon=":material/check_circle:")
    titles = {view.name: view.title for view in VIEWS}
    for i, finding in enumerate(found[:_SHOWN]):
        text, button = st.columns([6, 1], vertical_alignment="center")
        icon = _ICONS.get(finding.kind, ":blue[:material/info:]")
        text.markdown(f"{icon} {plain(finding.sentence)}")
        if finding.page in titles:
            label = titles[finding.page]
            if button.button(label, key=f"finding {i}", icon=":material/arrow_forward:"):
                link.go(finding.page, **finding.link)
    if len(found) > _SHOWN:
        st.caption(f"and {len(found) - _SHOWN} more")


def _rows(run: OpenRun, question: str, **parameters: Any) -> list[dict[str, Any]]:
    table = run.ask(question, **parameters).table
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]
