"""What changes of a layer's routing did to the loss: of experts, of the router's choice, of top-k.

Made from the rows of `RUN/counterfactual/<name>.parquet` by column (a row a token and change;
`moe_lens.counterfactual` returns them). A change's cost is the loss under it minus the loss without
it, in the unit of the loss. Errors are of the mean over sequences, since tokens of one sequence
resemble each other.

A minimum over drawn routes flatters: even a router that drew its experts would be found to have
missed a better one. So regret stands beside what a drawn route would have, the mean route, the
router's rank, and how often it beats a single drawn one (arXiv 2605.07260 asks by confidence).

Legend: N rows, A other routes of one token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_lens.metrics.clustered import clustered_mean

DORMANT = 0.25
"""Of a fair share of tokens, K / E: an expert that fewer choose is dormant."""
HIGH = 2.0
"""Of the layer's median: a cost above it is high."""
BEYOND = 3.0
"""Standard errors beyond which a cost counts: a layer has many experts to be wrong about."""

Columns = Mapping[str, NDArray[Any]]
Slice = Literal["tag", "margin", "entropy"]


def expert_importance(columns: Columns, layers: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row for each expert that was knocked out or forced in: its load, and what it is worth.

    Args:
        columns: The rows.
        layers: `moe_layers` of what the result says about itself.

    Returns:
        layer, expert; load (share of tokens that chose it), fair (K / E); knock_out (mean cost over
        all tokens) and its error, knock_out_used (over the tokens that chose it; NaN: none) and its
        error; force_in (mean cost of putting it in the last place of all others) and its error;
        dormant (load below a quarter of fair); dormant_but_causal: dormant, and knock_out_used, or
        the size of force_in, is above twice the layer's median and beyond three errors.
    """
    frame = pd.DataFrame(dict(columns))
    fair = {x["layer"]: _fair(x) for x in layers}
    of_experts = frame[frame.intervention.isin(["knock_out", "force_in"])]
    rows = []
    for (layer, expert), part in of_experts.groupby(["layer", "number"]):
        out = part[part.intervention == "knock_out"]
        forced = part[part.intervention == "force_in"]
        used = out[out.affected.astype(bool)]
        load = out.affected.mean() if len(out) else 1 - forced.affected.mean()
        row = {"layer": layer, "expert": expert, "load": float(load), "fair": fair[layer]}
        for name, of in (("knock_out", out), ("knock_out_used", used), ("force_in", forced)):
            row[name], row[f"{name}_error"] = _mean(of)
        rows.append(row)
    names = ["knock_out", "knock_out_used", "force_in"]
    found = pd.DataFrame(
        rows,
        columns=["layer", "expert", "load", "fair", *(f"{n}{e}" for n in names for e in _TWO)],
    )
    found["dormant"] = found.load < DORMANT * found.fair
    causal = pd.Series(False, index=found.index)
    for name in ("knock_out_used", "force_in"):
        size = found.force_in.abs() if name == "force_in" else found.knock_out_used
        middle = size.groupby(found.layer).transform("median")
        causal |= (size > HIGH * middle) & (size > BEYOND * found[f"{name}_error"])
    found["dormant_but_causal"] = found.dormant & causal
    return found


_TWO = ("", "_error")
_TOKEN = ["layer", "sequence", "position"]


def route_changes(columns: Columns) -> pd.DataFrame:
    """The cost of the runner-up in the last place, and of every top-k.

    Returns:
        layer, intervention, number (k of top_k); tokens, loss (without the change), cost and its
        error, worse (share of tokens whose loss rose).
    """
    frame = pd.DataFrame(dict(columns))
    rows = []
    kinds = frame[frame.intervention.isin(["runner_up", "top_k"])]
    for (layer, kind, number), part in kinds.groupby(["layer", "intervention", "number"]):
        cost, error = _mean(part)
        rows.append(
            {
                "layer": layer,
                "intervention": kind,
                "number": number,
                "tokens": len(part),
                "loss": float(part.base_loss.mean()),
                "cost": cost,
                "cost_error": error,
                "worse": float((part.loss > part.base_loss).mean()),
            }
        )
    names = ["layer", "intervention", "number", "tokens", "loss", "cost", "cost_error", "worse"]
    return pd.DataFrame(rows, columns=names)


def token_regret(columns: Columns) -> pd.DataFrame:
    """A row for each layer and token of which other routes were measured.

    Returns:
        layer, sequence, position, tag, margin, entropy, loss; routes (A); regret (loss minus the
        least of the routes: below zero where none was better), mean_route (their mean minus loss),
        rank of the router's own among all A + 1 (1 is best, ties shared), beats (share of the
        routes that are worse, ties half), random_regret (of one of the routes against the others,
        mean over them; NaN for one).
    """
    frame = pd.DataFrame(dict(columns))
    frame = frame[frame.intervention == "other_route"].copy()
    frame["below"] = (frame.loss < frame.base_loss).astype(float)
    frame["tied"] = (frame.loss == frame.base_loss).astype(float)
    by = frame.groupby(_TOKEN, sort=True)
    found = by.agg(
        tag=("tag", "first"),
        margin=("margin", "first"),
        entropy=("entropy", "first"),
        own=("base_loss", "first"),
        routes=("loss", "size"),
        least=("loss", "min"),
        mean=("loss", "mean"),
        below=("below", "sum"),
        tied=("tied", "sum"),
    )
    second = frame.sort_values("loss").groupby(_TOKEN).loss.nth(1)
    second.index = pd.MultiIndex.from_frame(frame.loc[second.index, _TOKEN])
    found["second"] = second.reindex(found.index)
    found = found.reset_index()
    A = found.routes
    return pd.DataFrame(
        {
            **{n: found[n] for n in ("layer", "sequence", "position", "tag", "margin", "entropy")},
            "loss": found.own,
            "routes": A,
            "regret": found.own - found.least,
            "mean_route": found["mean"] - found.own,
            "rank": 1 + found.below + found.tied / 2,
            "beats": 1 - (found.below + found.tied / 2) / A,
            # all but the best have regret against it, the best against the second
            "random_regret": found["mean"] - ((A - 1) * found.least + found.second) / A,
        }
    )


def route_regret(
    columns: Columns, by: Slice | None = None, *, buckets: int = 4, together: bool = False
) -> pd.DataFrame:
    """Whether other routes of as many experts would have served better, by layer and slice.

    Args:
        columns: The rows.
        by: tag, or quantiles of the router's margin or entropy over its layer's tokens.
        buckets: How many quantiles.
        together: All layers in one; their quantiles stay their own.

    Returns:
        layer (-1: all), slice, and of by-values least and most (NaN of tags); tokens, loss, and of
        `token_regret` the means: routes, regret and its error, positive (share of tokens with
        regret above zero), mean_route, rank, middle_rank (of a router that drew), beats and its
        error, random_regret.
    """
    tokens = token_regret(columns)
    tokens["slice"] = "all"
    if by is not None:
        parts = [_slices(part, by, buckets) for _, part in tokens.groupby("layer")]
        tokens["slice"] = pd.concat(parts) if parts else tokens["slice"]
    if together:
        tokens["layer"] = -1
    rows = []
    for (layer, name), part in tokens.groupby(["layer", "slice"]):
        values = pd.Series(dtype=float) if by in (None, "tag") else part[by]
        bounds = {"least": values.min(), "most": values.max()}
        rows.append({"layer": layer, "slice": name, **bounds, **_summed(part)})
    names = ["layer", "slice", "least", "most", *_summed(tokens)]
    return pd.DataFrame(rows, columns=names)


def _summed(tokens: pd.DataFrame) -> dict[str, float]:
    regret, regret_error = clustered_mean(tokens.regret, tokens.sequence)
    beats, beats_error = clustered_mean(tokens.beats, tokens.sequence)
    return {
        "tokens": len(tokens),
        "loss": tokens.loss.mean(),
        "routes": tokens.routes.mean(),
        "regret": regret,
        "regret_error": regret_error,
        "positive": (tokens.regret > 0).mean(),
        "random_regret": tokens.random_regret.mean(),
        "mean_route": tokens.mean_route.mean(),
        "rank": tokens["rank"].mean(),
        "middle_rank": (tokens.routes.mean() + 2) / 2,
        "beats": beats,
        "beats_error": beats_error,
    }


def _slices(tokens: pd.DataFrame, by: Slice, buckets: int) -> pd.Series:
    """Name of each token's slice, of one layer's tokens."""
    if by == "tag":
        return tokens.tag.astype(str)
    values = tokens[by].astype(float)
    if not values.notna().any():
        return pd.Series(f"{by} unknown", index=tokens.index)
    inner = np.nanquantile(values, np.linspace(0, 1, buckets + 1))[1:-1]
    number = np.searchsorted(inner, values, side="right").clip(max=buckets - 1)
    names = np.array([f"{by} {i + 1} of {buckets}" for i in range(buckets)])[number]
    return pd.Series(names, index=tokens.index).where(values.notna(), f"{by} unknown")


def _fair(layer: Mapping[str, Any]) -> float:
    experts = layer["experts"] + layer["zero_experts"]
    return float(layer["top_k"] / experts) if layer["top_k"] else float("nan")


def _mean(part: pd.DataFrame) -> tuple[float, float]:
    """Mean cost, and its error."""
    return clustered_mean(part.loss - part.base_loss, part.sequence)
