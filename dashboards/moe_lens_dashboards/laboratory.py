"""What a granularity laboratory's students say, as the tables of its figures. No Streamlit here.

The rules are those of `moe_lens.granularity.findings`, which needs torch: a test compares them.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from moe_lens.granularity import published
from moe_lens.numbers import count
from moe_lens.queries.laboratory import Laboratory

_SAID = [
    "teacher", "teacher_top_k", "student", "experts", "top_k", "width", "nmse", "fvu",
    "affine_nmse", "affine_fvu", "zero_fvu", "sets_used", "sets_tokens", "possible",
    "learning_rate", "seconds",
]  # fmt: skip


def gap(found: Laboratory) -> pd.DataFrame:
    """Students of equal active parameters, by teacher, the largest k first.

    Those with more or fewer than 2k experts stand in `sweeps`, where one with 2k is beside them. Of
    several learning rates the better one counts. `published`: the author's number, of the preset
    `paper` alone.
    """
    rows = _judged(found)
    equal = rows[(rows["width_factor"] == 1) & ~rows["gate_bias"]]
    plain = equal["experts_factor"] == 1
    best = _best(equal[plain | ~equal["top_k"].isin(equal.loc[plain, "top_k"])])
    is_paper = _paper(found) & (best["teacher_experts"] == 2 * best["teacher_top_k"])
    best["published"] = [
        published.of_grid(student, teacher) if known else None
        for student, teacher, known in zip(
            best["top_k"], best["teacher_top_k"], is_paper, strict=True
        )
    ]
    best = best.assign(order=-best["top_k"]).sort_values(["teacher_top_k", "order"], kind="stable")
    return best[[*_SAID, "published"]].reset_index(drop=True)


def sweeps(found: Laboratory) -> pd.DataFrame:
    """Students of the same k, wider or with more experts, `factor` times; nothing: none were."""
    rows = _judged(found)
    if _paper(found):
        rows = rows[rows["gate_bias"]]
    parts = []
    for swept, factor, other in (
        ("width", "width_factor", "experts_factor"),
        ("experts", "experts_factor", "width_factor"),
    ):
        of = rows[rows[other] == 1]
        scaled = set(of.loc[of[factor] != 1, "top_k"]) & set(of.loc[of[factor] == 1, "top_k"])
        part = _best(of[of["top_k"].isin(scaled)])
        part = part.assign(swept=swept, factor=part[factor])
        part["published"] = [
            published.of_sweep(top_k, times) if _paper(found) else None
            for top_k, times in zip(part["top_k"], part["factor"], strict=True)
        ]
        parts.append(part.sort_values(["top_k", "factor"], kind="stable"))
    return pd.concat(parts)[[*_SAID, "swept", "factor", "published"]].reset_index(drop=True)


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


def _paper(found: Laboratory) -> bool:
    return bool(found.about["preset"] == "paper")


def _judged(found: Laboratory) -> pd.DataFrame:
    """The rows in the order of the plan; `nmse` as the preset reports it, of any that diverged inf.

    The paper reports the least error after an epoch.
    """
    order = {name: place for place, name in enumerate(found.about["students"])}
    rows = found.students[found.students["name"].isin(order)]
    rows = rows.sort_values("name", key=lambda names: names.map(order))
    error = rows["nmse_min" if _paper(found) else "nmse"]
    return rows.assign(
        nmse=error.where(np.isfinite(error), math.inf), possible=2.0 ** rows["sets_bits"]
    )


def _best(rows: pd.DataFrame) -> pd.DataFrame:
    """The row of the learning rate with the least error, of each teacher and student."""
    ordered = rows.sort_values("nmse", kind="stable")
    return ordered.drop_duplicates(["teacher", "student", "width", "gate_bias"])
