"""Regions that a granularity laboratory counted, as a table. No Streamlit here."""

from __future__ import annotations

import pandas as pd

from moe_lens.numbers import count


def region_table(regions: pd.DataFrame) -> pd.DataFrame:
    """Regions by place and router: where several were drawn, from the least to the most."""
    rows = []
    keys = ["where", "router", "experts", "top_k"]
    for (where, router, experts, top_k), of in regions.groupby(keys, sort=False):
        least, most = of["regions"].min(), of["regions"].max()
        rows.append(
            {
                "where": where,
                "router": f"{len(of)} {router}" if len(of) > 1 else router,
                "layer": f"{experts}e{top_k}a",
                "regions": count(least) if least == most else f"{count(least)}–{count(most)}",
                "median": of["regions"].median(),
                "possible": 2.0 ** of["possible_bits"].iloc[0],
            }
        )
    return pd.DataFrame(rows, columns=["where", "router", "layer", "regions", "median", "possible"])
