"""Memory: what a layer's experts would need on a device that does not hold them all."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from moe_lens.figures.grouping import grouping
from moe_lens.figures.hit_rates import hit_rates
from moe_lens.figures.prefetch import prefetch
from moe_lens.figures.prefix_recall import prefix_recall
from moe_lens.figures.working_set import working_set
from moe_lens.metrics.constellation import by_beginning, foretold
from moe_lens.metrics.memory import Memory, measure
from moe_lens.metrics.stall import PCIE4_GB_PER_S, expert_bytes, stall_seconds
from moe_lens.metrics.tokens import Tokens, tokens_of
from moe_lens.numbers import NONE, count, decimal, percent
from moe_lens.queries.memory import is_chosen_by_token, previous_layer
from moe_lens_dashboards.components import columns, traces
from moe_lens_dashboards.components.choose import choose
from moe_lens_dashboards.components.notices import made_up_note, not_recorded
from moe_lens_dashboards.components.phase import first_with_rows
from moe_lens_dashboards.components.run import Asked, OpenRun
from moe_lens_dashboards.components.show import show
from moe_lens_dashboards.components.words import plain

_MOST = 8_192
"""Tokens that a page is made of, so that it stays quick with hundreds of experts."""
_BEGINNINGS = (4, 8, 16, 32, 64, 128, 256)
_BATCHES = (2, 4, 8, 16, 32, 64)
_UNITS = {"token": "a token (batch 1)", "forward": "a forward, with all its kept tokens"}


def page(run: OpenRun) -> None:
    """Draw the page."""
    if run.info.token_rows == 0:
        not_recorded(run, "token rows")
        return
    layers = _layers(run)
    if not layers:
        st.info(
            "In these layers experts choose tokens: every expert computes in every forward, so "
            "that none can be left off the device.",
            icon=":material/info:",
        )
        return
    left, middle, right = st.columns(3)
    with left:
        layer = choose("layer", "Layer", layers, layers[0])
    with middle:
        unit = choose("unit", "What needs its experts at once", list(_UNITS), "token",
                      words=lambda name: _UNITS[name])  # fmt: skip
    with right:
        batch = choose("batch", "Sequences in a batch", _BATCHES, 8)
    found = first_with_rows(run, lambda phase: _ask(run, layer, phase))
    if found is None:
        not_recorded(run, "rows in these steps")
        return
    phase, asked = found
    before = _before(run, layer, phase)
    forwards = _ask(run, layer, phase, "forward") if unit == "forward" else None
    memory = _measure(run, layer, batch, asked, before, forwards)
    st.caption(plain(_source(memory, phase, run.filters.phase)))
    if unit == "forward":
        made_up_note(run)
    _tiles(run, layer, memory)
    left, right = st.columns(2)
    with left:
        show(hit_rates(memory.hit_rates), forwards or asked, key="hit_rates")
        show(working_set(memory.growth), asked, key="working_set")
    with right:
        show(prefetch(memory.recall), asked, *([before] if before else []), key="prefetch")
        show(grouping(memory.groups), asked, key="grouping")
    _conversations(memory.conversations)
    _beginnings(run, layer, asked, memory)


def _layers(run: OpenRun) -> list[int]:
    first, last = run.filters.first_layer, run.filters.last_layer
    return [
        x.layer
        for x in run.info.layers
        if is_chosen_by_token(x)
        and (first is None or x.layer >= first)
        and (last is None or x.layer <= last)
    ]


def _ask(run: OpenRun, layer: int, phase: str, by: str = "sequence") -> Asked:
    # The layer was chosen within the filters of layers, which say nothing more about it.
    filters = dataclasses.replace(run.filters, first_layer=None, last_layer=None)
    here = dataclasses.replace(run, filters=filters)
    return here.ask("token_experts", layer=layer, phase=phase, by=by, most=_MOST)


def _before(run: OpenRun, layer: int, phase: str) -> Asked | None:
    (info,) = (x for x in run.info.layers if x.layer == layer)
    previous = previous_layer(run.info, info)
    return None if previous is None else _ask(run, previous.layer, phase)


def _measure(
    run: OpenRun, layer: int, batch: int, asked: Asked, before: Asked | None, forwards: Asked | None
) -> Memory:
    experts = {x.layer: x.experts for x in run.info.layers}
    tables = [
        None if each is None else (each.table, experts[each.parameters["layer"]])
        for each in (asked, before, forwards)
    ]
    given = tuple(sorted((k, str(v)) for k, v in asked.parameters.items()))
    return _measured(traces.current(run.path)[1], run.path, given, batch, bool(forwards), tables)


# Streamlit leaves arguments that begin with an underscore out of the key.
@st.cache_data(max_entries=50, show_spinner=False)
def _measured(
    now: str, path: str, given: tuple[tuple[str, str], ...], batch: int, forward: bool,
    _tables: list[Any],
) -> Memory:  # fmt: skip
    tokens, before, forwards = (None if each is None else tokens_of(*each) for each in _tables)
    assert tokens is not None
    return measure(tokens, before, forwards, batch=batch)


def _source(memory: Memory, phase: str, chosen: str | None) -> str:
    text = (
        f"Phase {phase}{'' if chosen else ' (the sidebar chooses another)'}: "
        f"{count(memory.tokens)} tokens of {count(memory.sequences)} sequences. The first "
        f"{count(memory.fitted)} {memory.unit}s fill the caches and are fitted on; the other "
        f"{count(memory.counted)} are counted."
    )
    if memory.unit == "forward" and memory.fitted == 0:
        text += " With one forward there is nothing to fill a cache."
    return text


def _tiles(run: OpenRun, layer: int, memory: Memory) -> None:
    (info,) = (x for x in run.info.layers if x.layer == layer)
    size = max(memory.largest, memory.experts // 2)
    misses = memory.misses("lru", size)
    wait = "not known"
    if info.hidden_size is not None and info.intermediate_size is not None:
        seconds = stall_seconds(misses, expert_bytes(info.hidden_size, info.intermediate_size))
        wait = NONE if math.isnan(seconds) else f"{decimal(seconds * 1e6, 1)} µs"
    shown = (
        ("Resident", f"{size} of {memory.experts}", "Half, or what the largest access needs."),
        ("LRU hits", percent(memory.rate("lru", size)), "The least recently used leaves first."),
        ("Optimum", percent(memory.rate("optimum", size)), "Belady's: it knows the future."),
        (
            f"Loads a {memory.unit}",
            decimal(misses),
            f"Experts that LRU does not find, of {decimal(memory.requests, 1)}.",
        ),
        (
            f"Waits a {memory.unit}",
            wait,
            f"For those loads, at {PCIE4_GB_PER_S:g} GB/s and two bytes a weight, this layer.",
        ),
    )
    for column, (label, value, help) in zip(st.columns(len(shown)), shown, strict=True):
        column.metric(label, value, help=help, border=True)


def _conversations(table: pd.DataFrame) -> None:
    st.subheader("Experts that a conversation needs, by tag", anchor=False)
    numbers = ["tokens", "touched", "chance", "needed_90", "needed_95", "needed_99"]
    means = table.groupby("tag")[numbers].mean().reset_index()
    means.insert(1, "sequences", table.groupby("tag").size().to_numpy())
    shown = {
        "tag": columns.text("tag"),
        "sequences": columns.whole("sequences"),
        "tokens": columns.number("tokens", 0, help="Mean of the sequences."),
        "touched": columns.number("touched", 1, help="Distinct experts of a sequence, mean."),
        "chance": columns.number("by chance", 1, help="Of as many uniform choices."),
        "needed_90": columns.number("for 90 %", 1, help="The fewest that take 90 % of choices."),
        "needed_95": columns.number("for 95 %", 1),
        "needed_99": columns.number("for 99 %", 1),
    }
    st.dataframe(means[list(shown)], hide_index=True, column_config=shown)


def _beginnings(run: OpenRun, layer: int, asked: Asked, memory: Memory) -> None:
    (info,) = (x for x in run.info.layers if x.layer == layer)
    size = max(memory.largest, memory.experts // 2)
    tokens: Tokens = tokens_of(asked.table, info.experts)
    every_T = np.ones(len(tokens), bool)
    text_S = traces.texts(run.path, asked.table)
    table = by_beginning((foretold(tokens, every_T, n, text_S=text_S) for n in _BEGINNINGS), size)
    st.subheader("What a conversation's beginning foretells", anchor=False)
    show(prefix_recall(table), asked, key="prefix_recall")
    st.caption(
        "A beginning is the first of a sequence's tokens in this phase. moe-lens context also says "
        "which loads having those experts there would save, and takes a prompt as the beginning of "
        "what is decoded."
    )
