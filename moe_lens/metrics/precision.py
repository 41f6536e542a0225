"""What rounding the weights of routers and experts does: to routes, to the loss, to the weights.

Made from the rows of `RUN/precision/<name>.parquet` by column (`moe_lens.precision` returns them).
S is the set of experts that a token's router chose, S' with rounded weights, k their number.
Agreement is |S and S'| / k; a token is flipped where S' is another set; kl is KL(p || p') of the
router's distributions, nats. Errors are of the mean over sequences.

Modes: alone, one layer rounded and all before it as it was: the error of that layer. free, all
layers rounded: errors add up over depth. forced, all rounded, each layer given the experts that it
chose before: what its router would have chosen is still seen. So loss(forced) - loss is what the
arithmetic costs, gate weights included, and loss(free) - loss(forced) what the other routes cost.

Legend: k choices per token, w weights, w' as rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_lens.metrics.clustered import clustered_mean

Columns = Mapping[str, NDArray[Any]]

_KEY = ["format", "part"]
_TOKEN = ["sequence", "position"]


def routing_agreement(columns: Columns) -> pd.DataFrame:
    """How far rounding changes what routers choose, by layer.

    Returns:
        format, part, mode, layer; tokens, agreement and its error, flipped (share of tokens), kl;
        NaN where choices, or distributions, are not known.
    """
    rows = []
    for keys, part in _tokens(columns).groupby([*_KEY, "mode", "layer"], sort=False):
        mean, error = clustered_mean(part.agreement, part.sequence)
        rows.append(
            [*keys, len(part), mean, error, _flipped(part.agreement).mean(), part.kl.mean()]
        )
    names = [*_KEY, "mode", "layer", "tokens", "agreement", "agreement_error", "flipped", "kl"]
    return pd.DataFrame(rows, columns=names)


def loss_split(columns: Columns) -> pd.DataFrame:
    """What rounding all layers costs, and how much of it is arithmetic, and how much routing.

    Returns:
        format, part; tokens, loss (nothing rounded); total (of the loss when routing is free),
        arithmetic (of the loss when routes are forced), routing (total - arithmetic), each with
        its error.
    """
    frame = _tokens(columns)
    one = frame[frame.layer == frame.layer.min()] if len(frame) else frame
    rows = []
    for keys, part in one.groupby(_KEY, sort=False):
        forced = part[part["mode"] == "forced"].set_index(_TOKEN)
        free = part[part["mode"] == "free"].set_index(_TOKEN)
        both = forced.index.intersection(free.index)  # Ctrl-C may have come between them
        if both.empty:
            continue
        forced, free = forced.loc[both], free.loc[both]
        sequence = pd.Series(both.get_level_values("sequence"), index=both)
        costs = {
            "total": free.loss - free.base_loss,
            "arithmetic": forced.loss - free.base_loss,
            "routing": free.loss - forced.loss,
        }
        found = {name: clustered_mean(cost, sequence) for name, cost in costs.items()}
        numbers = [x for name in costs for x in found[name]]
        rows.append([*keys, len(free), free.base_loss.mean(), *numbers])
    names = [f"{n}{e}" for n in ("total", "arithmetic", "routing") for e in ("", "_error")]
    return pd.DataFrame(rows, columns=[*_KEY, "tokens", "loss", *names])


def flips_by_margin(columns: Columns, *, buckets: int = 4, mode: str = "alone") -> pd.DataFrame:
    """Where routes flip: by quantiles of the router's margin, nothing rounded.

    A flip needs an error above the margin, so that sure tokens stay. Quantiles are of each layer's
    tokens: scores of layers are not comparable.

    Args:
        columns: The rows.
        buckets: How many quantiles, of equal numbers of tokens.
        mode: alone, forced or free.

    Returns:
        format, part, bucket (from 1, the least margins), tokens, least and most (margins), flipped
        (share of tokens), agreement. All layers together; tokens without a margin left out.
    """
    frame = _tokens(columns)
    frame = frame[(frame["mode"] == mode) & frame.margin.notna() & frame.agreement.notna()]
    by_layer = frame.groupby([*_KEY, "layer"]).margin
    place = by_layer.rank(method="first") * buckets / by_layer.transform("size")
    frame = frame.assign(bucket=np.ceil(place), flipped=_flipped(frame.agreement))
    rows = []
    for keys, of in frame.groupby(_KEY, sort=False):
        for bucket in range(1, buckets + 1):
            part = of[of.bucket == bucket]
            bounds = part.margin.min(), part.margin.max()
            shares = part.flipped.mean(), part.agreement.mean()
            rows.append([*keys, bucket, len(part), *bounds, *shares])
    names = [*_KEY, "bucket", "tokens", "least", "most", "flipped", "agreement"]
    return pd.DataFrame(rows, columns=names)


def weight_errors(columns: Columns) -> pd.DataFrame:
    """How far rounding moves the weights of each router and expert, and how many tokens meet that.

    Returns:
        format, part, layer, expert (NaN of a router); error (|w' - w|^2 / |w|^2), outlier (largest
        |w| by standard deviation, of the worst of its matrices), usage (share of tokens that choose
        the expert), weighted (error x usage: summed over a layer's experts and divided by k it is
        what a token's expert has on average).
    """
    frame = pd.DataFrame(dict(columns))
    frame = frame[frame["mode"] == "weights"]
    names = [*_KEY, "layer", "expert", "error", "outlier", "usage"]
    found = frame[names].reset_index(drop=True)
    return found.assign(weighted=found.error * found.usage)


def layer_errors(columns: Columns) -> pd.DataFrame:
    """The experts of each layer in one row.

    Returns:
        format, layer; error (mean over experts), used_error (mean over choices: by usage), worst
        (expert with the highest error x usage), outlier (the largest of any expert).
    """
    found = weight_errors(columns)
    rows = []
    of_experts = found[found.part == "experts"]
    for keys, part in of_experts.groupby(["format", "layer"], sort=False):
        used = part.weighted.sum() / part.usage.sum()
        worst = int(part.sort_values("weighted").expert.iloc[-1])
        rows.append([*keys, part.error.mean(), used, worst, part.outlier.max()])
    names = ["format", "layer", "error", "used_error", "worst", "outlier"]
    return pd.DataFrame(rows, columns=names)


def _tokens(columns: Columns) -> pd.DataFrame:
    frame = pd.DataFrame(dict(columns))
    return frame[frame["mode"] != "weights"]


def _flipped(agreement: pd.Series) -> pd.Series:
    """1 where a token has another set of experts, NaN where that is not known."""
    return (agreement < 1).astype(float).where(agreement.notna())
