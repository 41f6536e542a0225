"""The laboratory's figures as one HTML file that opens without a network."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from plotly.graph_objects import Figure

from moe_lens.figures.granularity_gap import granularity_gap
from moe_lens.figures.granularity_sweeps import granularity_sweeps
from moe_lens.figures.input_regions import input_regions
from moe_lens.figures.realised_sets import realised_sets
from moe_lens.trace.whole import written_whole


def save_figures(path: Path, tables: dict[str, list[dict[str, Any]]]) -> Path:
    """Write the figures of what was found.

    Args:
        path: The file; it is replaced.
        tables: `gap`, `sweeps`, `pictures`, `configurations`.

    Returns:
        The path.
    """
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=not number)
        for number, figure in enumerate(drawn(tables))
    ]
    body = "\n".join(parts)
    with written_whole(path) as part:
        part.write_text(
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>Granularity · moe_lens</title></head><body>\n{body}\n</body></html>\n",
            encoding="utf-8",
        )
    return path


def drawn(tables: dict[str, list[dict[str, Any]]]) -> list[Figure]:
    """All figures, in order."""
    found = [granularity_gap(pd.DataFrame(tables["gap"]))]
    if tables["sweeps"]:
        found.append(granularity_sweeps(pd.DataFrame(tables["sweeps"])))
    for _, points in groupby(tables["pictures"], key=lambda point: point["picture"]):
        found.append(input_regions(pd.DataFrame(points)))
    found.append(realised_sets(pd.DataFrame(tables["configurations"])))
    return found
