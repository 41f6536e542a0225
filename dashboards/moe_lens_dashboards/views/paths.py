"""Paths: which experts go together, in one layer, from layer to layer, from token to token."""

from __future__ import annotations

import dataclasses

import streamlit as st

from moe_lens.figures.co_activation import co_activation
from moe_lens.figures.repetition import repetition
from moe_lens.figures.transitions import transitions
from moe_lens_dashboards.components.choose import choose
from moe_lens_dashboards.components.notices import not_recorded
from moe_lens_dashboards.components.run import OpenRun
from moe_lens_dashboards.components.show import draw


def page(run: OpenRun) -> None:
    """Draw the page."""
    if run.info.token_rows == 0:
        not_recorded(run, "token rows")
        return
    layers = [x.layer for x in run.layers]
    if not layers:
        not_recorded(run, "rows in these steps")
        return
    layer = choose("layer", "Layer", layers, layers[0])
    # The layer was chosen within the filters of layers, which say nothing more about it.
    filters = dataclasses.replace(run.filters, first_layer=None, last_layer=None)
    here = dataclasses.replace(run, filters=filters)
    left, right = st.columns(2)
    with left:
        draw(here, co_activation, "co_activation", layer=layer)
    with right:
        if _goes_on(run, layer):
            draw(here, transitions, "layer_transitions", layer=layer)
        else:
            st.markdown("**From layer to layer**")
            st.info(
                f"No layer follows layer {layer} in its part of the model: choose an earlier one.",
                icon=":material/info:",
            )
    draw(run, repetition, "repetition")


def _goes_on(run: OpenRun, layer: int) -> bool:
    stream = {x.layer: x.stream for x in run.info.layers}
    return stream.get(layer + 1) == stream[layer]
