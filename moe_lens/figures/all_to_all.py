"""Time in the all-to-alls of expert parallelism."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.layered import line, steps
from moe_lens.figures.theme import figure

BLANK = "No all-to-all was seen: one rank, or a library whose dispatch the hooks do not time."


def all_to_all(table: pd.DataFrame) -> go.Figure:
    """Dispatch and combine, summed over layers, per forward.

    Args:
        table: Answer of `all_to_all`.
    """
    table = one_run(table)
    ways = [way for way in ("dispatch", "combine") if known(table, f"{way}_ms")]
    if not ways:
        return blank("All-to-all time", BLANK, "No times of all-to-alls", lacks=("times",))
    columns = {way: numbers(table, f"{way}_ms") for way in ways}
    sums = pd.DataFrame(columns).groupby(table["step"].to_numpy()).sum(min_count=1)
    words = ", ".join(f"{way} {sums[way].mean():,.3g} ms" for way in ways)
    made = figure(f"All-to-all per forward: {words}", "Summed over layers, mean of the forwards")
    for way in ways:
        line(made, sums[way].index, sums[way], way, ",.4~r")
    made.update_traces(hovertemplate="%{y:,.4~r} ms")
    steps(made)
    made.update_yaxes(title_text="ms per forward", rangemode="tozero")
    return made
