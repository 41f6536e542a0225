"""Where two runs (or two windows of one) load their experts differently."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import matrix, numbers, one_run
from moe_lens.figures.heat import heat, octaves, scale
from moe_lens.figures.text import shown
from moe_lens.figures.theme import RATIO, figure

_HOVER = (
    "layer %{y}, expert %{x}<br>load / mean: <b>%{customdata[0]:.3~f}</b> before, "
    "<b>%{customdata[1]:.3~f}</b> after"
)


def load_difference(
    before: pd.DataFrame, after: pd.DataFrame, names: tuple[str, str] | None = None
) -> go.Figure:
    """Load of each expert after over that before, both over the mean of their layer.

    Args:
        before: Answer of `load_map`.
        after: The same of the other run or window.
        names: What to call them; default: the names of the runs.
    """
    before, after = one_run(before), one_run(after)
    both = before.merge(after, on=["layer", "expert"], suffixes=("_a", "_b"))
    a, b = numbers(both, "ratio_a"), numbers(both, "ratio_b")
    if not (np.isfinite(a) & np.isfinite(b)).any():
        return blank("Difference of loads", "The two have no layer in common that routed a token.")
    with np.errstate(divide="ignore", invalid="ignore"):
        both["change"] = np.where((a == 0) & (b == 0), 1.0, b / a)
    change = matrix(both, "layer", "expert", "change")
    cells = [matrix(both, "layer", "expert", name) for name in ("ratio_a", "ratio_b")]
    first, second = names or (str(before["run"].iloc[0]), str(after["run"].iloc[0]))
    if first == second:
        first, second = "before", "after"
    made = figure(_title(both), f"Load over the mean: {shown(second)} over {shown(first)}")
    heat(
        made,
        pd.DataFrame(octaves(change.to_numpy()), change.index, change.columns),
        RATIO,
        hovertemplate=_HOVER,
        customdata=np.dstack(cells).astype(np.float32),
    )
    made.update_xaxes(title_text="expert")
    made.update_yaxes(title_text="layer")
    made.update_layout({RATIO: scale("after / before", never="no longer")})
    return made


def _title(both: pd.DataFrame) -> str:
    change = numbers(both, "change")
    with np.errstate(divide="ignore"):
        distance = np.where(np.isfinite(change) & (change > 0), np.abs(np.log2(change)), -1.0)
    row = both.iloc[int(distance.argmax())]
    return (
        f"Layer {row['layer']}, expert {row['expert']} changes most: "
        f"{row['ratio_a']:.2g} to {row['ratio_b']:.2g} of the mean"
    )
