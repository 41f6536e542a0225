"""Which expert of a heat map is the chosen one. No Streamlit here."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Chosen:
    """One expert, and its place in the table."""

    layer: int
    expert: int
    row: int
    """Of the ranked table, from 0."""
    place: int
    """In its layer by choices, from 1; ties share the better place."""
    of: int
    """Experts of its layer."""
    routed: int
    """Choices."""
    ratio: float | None
    """Load over the mean expert of the layer; None: nobody chose any."""
    problem: str = ""
    """What of the link was left out, and what is shown instead; empty: nothing."""


def ranked(load_map: pd.DataFrame) -> pd.DataFrame:
    """Experts from the hottest down, by load over the mean of their layer.

    Args:
        load_map: Answer of the stored question.

    Returns:
        Columns layer, expert, ratio, routed; rows numbered from 0.
    """
    columns = ["layer", "expert", "ratio", "routed"]
    order = load_map.sort_values("ratio", ascending=False, kind="stable", na_position="last")
    return order[columns].reset_index(drop=True)


def chosen(experts: pd.DataFrame, layer: str | None, expert: str | None) -> Chosen:
    """The expert that a link names, or the hottest.

    Args:
        experts: As `ranked` gives them, at least one.
        layer: From the link, as text; None: it has none.
        expert: As layer.
    """
    row, problem = 0, ""
    if layer is not None or expert is not None:
        named = (experts["layer"].astype(str) == layer) & (experts["expert"].astype(str) == expert)
        if named.any():
            row = int(named.to_numpy().argmax())
        else:
            problem = f"layer={layer}, expert={expert} in the link is not in this view: "
            problem += "the hottest expert is shown."
    at = experts.iloc[row]
    of_layer = experts[experts["layer"] == at["layer"]]
    place = 1 + int((of_layer["routed"] > at["routed"]).sum())
    return Chosen(
        layer=int(at["layer"]),
        expert=int(at["expert"]),
        row=row,
        place=place,
        of=len(of_layer),
        routed=int(at["routed"]),
        ratio=None if pd.isna(at["ratio"]) else float(at["ratio"]),
        problem=problem,
    )
