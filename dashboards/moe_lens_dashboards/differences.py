"""What differs between two sides, each a run or a window of steps. No Streamlit here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from moe_lens.queries.info import RunInfo

MEASURES = ("balance", "dropped", "entropy")
"""Load of the hottest expert over the mean, share of choices dropped, router entropy over ln E."""


@dataclass(frozen=True)
class Answers:
    """Answers of the stored questions of these names about one side, all tags together."""

    layer_balance: pd.DataFrame
    dropped_tokens: pd.DataFrame
    router_confidence: pd.DataFrame


def by_layer(a: Answers, b: Answers, order: str) -> pd.DataFrame:
    """A row a layer that both have, the largest change of a measure first.

    Args:
        a: One side.
        b: The other.
        order: One of `MEASURES`.

    Returns:
        layer, floor (what chance alone gives the balance, the larger of the two sides), and of each
        measure `<measure>_a`, `<measure>_b` and `<measure>_change` (b minus a); NaN: not known.
    """
    both = _measures(a).merge(_measures(b), on="layer", suffixes=("_a", "_b"))
    for name in MEASURES:
        both[f"{name}_change"] = both[f"{name}_b"] - both[f"{name}_a"]
    both["floor"] = both[["floor_a", "floor_b"]].max(axis=1)
    most = both[f"{order}_change"].abs().sort_values(ascending=False, kind="stable").index
    wanted = ["layer"]
    for name in MEASURES:
        wanted += [f"{name}_a", f"{name}_b", f"{name}_change"]
        wanted += ["floor"] * (name == "balance")
    return both.loc[most, wanted].reset_index(drop=True)


def hottest(here: pd.DataFrame, there: pd.DataFrame, most: int) -> pd.DataFrame:
    """The experts with the highest load over the mean of their layer.

    Args:
        here: Answer of `load_map` of the side that they are the hottest of.
        there: The same of the other side.
        most: How many.

    Returns:
        layer, expert, ratio, other: `ratio` on the other side, NaN where it has no such expert.
    """
    first = here.sort_values("ratio", ascending=False, kind="stable").head(most)
    other = there[["layer", "expert", "ratio"]].rename(columns={"ratio": "other"})
    found = first[["layer", "expert", "ratio"]].merge(other, on=["layer", "expert"], how="left")
    return found.astype({"ratio": float, "other": float})


def shapes(a: RunInfo, b: RunInfo) -> list[str]:
    """How the layers of two runs differ, in sentences; empty: they do not."""
    of_a, of_b = ({x.layer: (x.experts, x.top_k) for x in info.layers} for info in (a, b))
    said = []
    for one, other, name, where in ((of_a, of_b, "B", "A"), (of_b, of_a, "A", "B")):
        if alone := sorted(set(one) - set(other)):
            it = "it" if len(alone) == 1 else "them"
            said.append(f"{_layers(alone)} of {where} {_has(alone)} none beside {it} in {name}.")
    common = sorted(set(of_a) & set(of_b))
    for i, what, meaning in (
        (0, "experts", "an expert's number then does not mean the same expert"),
        (1, "choices per token (top-k)", "loads over the mean then have another range"),
    ):
        kinds: dict[tuple[int | None, int | None], list[int]] = {}
        for layer in common:
            pair = of_a[layer][i], of_b[layer][i]
            if pair[0] != pair[1]:
                kinds.setdefault(pair, []).append(layer)
        for (first, second), layers in kinds.items():
            said.append(
                f"{_layers(layers)} {_has(layers)} {_k(first)} {what} in A and {_k(second)} in B: "
                f"{meaning}."
            )
    return said


def _measures(side: Answers) -> pd.DataFrame:
    balance = side.layer_balance[["layer", "max_over_mean", "max_over_mean_floor"]]
    dropped = side.dropped_tokens[["layer", "dropped_rate"]]
    router = side.router_confidence[["layer", "entropy_norm"]]
    table = balance.merge(dropped, on="layer", how="outer").merge(router, on="layer", how="outer")
    table.columns = pd.Index(["layer", "balance", "floor", "dropped", "entropy"])
    return table.astype(dict.fromkeys(("floor", *MEASURES), float))


def _layers(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"Layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"Layers {layers[0]} to {layers[-1]}"
    shown = ", ".join(map(str, layers[:8]))
    return f"Layers {shown}{' and more' if len(layers) > 8 else ''}"


def _has(layers: Sequence[int]) -> str:
    return "has" if len(layers) == 1 else "have"


def _k(value: int | None) -> str:
    return "no fixed number of" if value is None else str(value)
