"""What batches of one tag touch, beside mixed ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.bars import labels
from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.dots import dots
from moe_lens.figures.theme import figure
from moe_lens.numbers import decimal

_HOVER = "%{x:.3~f} experts a batch<br>%{customdata:,} sequences"


def grouping(table: pd.DataFrame) -> go.Figure:
    """Experts touched by batches of each tag and by mixed batches of the same sequences.

    Args:
        table: Of `moe_lens.metrics.grouping.by_tag`: one layer.
    """
    table = one_run(table)
    if not known(table, "grouped"):
        return blank(
            "Batches grouped by tag",
            "It takes two tags that have a batch of sequences each: rec.step(tags=...), and more "
            "sequences or smaller batches.",
            "It takes two tags that have a batch of sequences each, and more sequences or smaller "
            "batches",
        )
    first = table.iloc[0]
    made = figure(
        f"Batches of one tag touch {decimal(first['ratio'], 3)} times the experts of mixed ones "
        f"(tags at random: {decimal(first['null_low'], 3)} to {decimal(first['null_high'], 3)})",
        "Distinct experts of the layer that a batch of sequences, a token of each, has to read",
    )
    names = table["tag"].tolist()
    places = list(range(len(names)))
    sequences = np.nan_to_num(numbers(table, "sequences")).astype(int)
    for column, kind in (("grouped", "of one tag"), ("mixed", "mixed"), ("chance", "by chance")):
        dots(made, places, numbers(table, column), names, kind, _HOVER, sequences)
    labels(made, names, per_label=2)
    made.update_xaxes(title_text="experts touched by a batch")
    return made
