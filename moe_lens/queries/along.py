"""The answer of `sequence_choices` as arrays: what a router chose along whole sequences.

Legend: N tokens, K choices of a token; T the same tokens, or those with logits where some have
some; E experts, V outputs of the router.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.metrics.bias import ranking
from moe_lens.metrics.confidence import probabilities

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from moe_lens.trace.meta import LayerInfo

_NO_LOGITS = "no router logits of single tokens: record with tokens=1.0 and logits=True"

FIELDS = (
    "chosen_TV", "weight_TV", "dropped_TV", "sequence_T", "logits_TV", "prob_TV",
    "ids_NK", "weights_NK", "ranked", "sequence_N", "position_N", "tag_N", "tags", "token_id_N",
    "margin_N", "dropped_N", "loss_N", "ranking", "pairs", "sequences",
)  # fmt: skip
"""Of `Evidence`."""


def fields(rows: pd.DataFrame, info: LayerInfo) -> dict[str, Any]:
    """What is known of these tokens, as fields of `Evidence`; those that are not are left out."""
    ids_NK, weights_NK = choices(rows, info.experts)
    out: dict[str, Any] = {
        **_dense(rows, info),
        "ids_NK": ids_NK,
        "ranked": True if ranked(rows) else None,
        "sequence_N": _sequences(rows),
        "position_N": rows["position"].to_numpy(np.int64),
        "ranking": ranking(info.selection, info.groups, info.top_groups),
    }
    if weights_NK is not None:
        out["weights_NK"] = weights_NK
    tags, tag_N = np.unique(rows["tag"].to_numpy(str), return_inverse=True)
    if len(tags) > 1:
        out |= {"tags": tuple(tags.tolist()), "tag_N": tag_N.astype(np.int64)}
    if rows["token_id"].notna().all():
        out["token_id_N"] = rows["token_id"].to_numpy(np.int64)
    if rows["margin"].notna().all():
        out["margin_N"] = rows["margin"].to_numpy(float)
    if rows["dropped"].notna().any():
        out["dropped_N"] = np.array([0 if x is None else len(x) for x in _lists(rows["dropped"])])
    if rows["loss"].notna().any():
        out["loss_N"] = rows["loss"].to_numpy(float, na_value=np.nan)
    return out


def _dense(rows: pd.DataFrame, info: LayerInfo) -> dict[str, Any]:
    """What is said of every output of the router; where there are logits, of tokens with these."""
    outputs = info.experts + info.zero_experts
    out: dict[str, Any] = {}
    why = dict.fromkeys(("logits_TV", "prob_TV"), _NO_LOGITS)
    if rows["logits"].notna().any():
        rows, logits_TV = _finite(rows)
        why = {"prob_TV": "the router's score is unknown: logits have no probabilities"}
        if len(rows):
            out["logits_TV"] = logits_TV
            if info.score is not None:
                out["prob_TV"] = probabilities(logits_TV, info.score)
                why = {}
    out["chosen_TV"] = _marked(_router_ids(rows), outputs) > 0
    if rows["weights"].notna().all():
        out["weight_TV"] = _marked(rows["expert_ids"], outputs, rows["weights"])
    dropped_TV = _dropped(rows, outputs)
    if dropped_TV.any():
        out["dropped_TV"] = dropped_TV
    else:
        why["dropped_TV"] = "no dropped choice in the kept rows"
    out["sequence_T"] = _sequences(rows)
    return out | {"why": why}


def _finite(rows: pd.DataFrame) -> tuple[pd.DataFrame, NDArray[np.float64]]:
    """The tokens with logits, and these; -inf masks an expert out, NaN and +inf mean nothing."""
    with_logits = rows[rows["logits"].notna()]
    logits_TV = np.stack(with_logits["logits"].to_list()).astype(float)
    usable_T = ~np.isnan(logits_TV).any(1) & np.isfinite(logits_TV.max(1))
    return with_logits[usable_T], logits_TV[usable_T]


def _marked(
    ids: pd.Series[Any], outputs: int, weights: pd.Series[Any] | None = None
) -> NDArray[np.float64]:
    """`[T, V]`: 1, or the weight, where an output was chosen."""
    out_TV = np.zeros((len(ids), outputs))
    at = np.repeat(np.arange(len(ids)), [len(x) for x in ids])
    flat = 1.0 if weights is None else np.concatenate([*weights, []])
    np.add.at(out_TV, (at, np.concatenate([*ids, []]).astype(np.int64)), flat)
    return out_TV


def _dropped(rows: pd.DataFrame, outputs: int) -> NDArray[np.bool_]:
    lost = rows[rows["dropped"].notna()]
    out_TV = np.zeros((len(rows), outputs), bool)
    places = np.flatnonzero(rows["dropped"].notna())
    for at, ids, slots in zip(places, lost["expert_ids"], lost["dropped"], strict=True):
        out_TV[at, np.asarray(ids)[np.asarray(slots, np.int64)]] = True
    return out_TV


def _router_ids(rows: pd.DataFrame) -> pd.Series[Any]:
    return rows["router_ids"].where(rows["router_ids"].notna(), rows["expert_ids"])


def _sequences(rows: pd.DataFrame) -> NDArray[np.int64]:
    return np.asarray(rows.groupby(["rank", "sequence"], sort=False).ngroup(), np.int64)


def by_tag(rows: pd.DataFrame, experts: int) -> dict[str, Any]:
    """The answer of `tag_load` for one layer as fields; nothing where there is one tag."""
    tags = len(rows) // experts
    if tags < 2:
        return {}
    counts_GE = rows["routed"].to_numpy(np.int64).reshape(tags, experts)
    return {"counts_GE": counts_GE, "tokens_G": rows["tokens"].to_numpy(np.int64)[::experts]}


def before(rows: pd.DataFrame, previous: pd.DataFrame, experts: int) -> dict[str, Any]:
    """The choices in the layer before, of the same tokens; nothing where rows are lacking."""
    if previous.empty or not np.isin(rows["nth"], previous["nth"]).all():
        return {}
    ids_NK, _ = choices(previous, experts)
    at_N = np.searchsorted(previous["nth"].to_numpy(), rows["nth"].to_numpy())
    return {"before_NK": ids_NK[at_N]}


def choices(
    rows: pd.DataFrame, experts: int
) -> tuple[NDArray[np.int64], NDArray[np.float64] | None]:
    """Experts and weights, largest weight first; zero-compute experts are none: -1.

    Without weights, or with those of other experts, they stay in the order of the trace.
    """
    chosen = _router_ids(rows)
    sizes_N = np.array([len(x) for x in chosen], np.int64)
    ids_NK = padded(chosen, sizes_N, -1).astype(np.int64)
    ids_NK[ids_NK >= experts] = -1
    if rows["router_ids"].notna().any() or rows["weights"].isna().any():
        return ids_NK, None
    weights_NK = np.where(ids_NK < 0, -np.inf, padded(rows["weights"], sizes_N, 0.0))
    order_NK = np.argsort(-weights_NK, axis=1, kind="stable")
    ids_NK = np.take_along_axis(ids_NK, order_NK, 1)
    weights_NK = np.take_along_axis(weights_NK, order_NK, 1)
    return ids_NK, np.where(ids_NK < 0, 0.0, weights_NK)


def ranked(rows: pd.DataFrame) -> bool:
    """Whether the first of `choices` is the router's first: nothing tells without weights."""
    return bool(rows["weights"].notna().all() or rows["router_ids"].notna().any())


def padded(
    lists: pd.Series[Any], sizes_N: NDArray[np.int64], filling: float
) -> NDArray[np.float64]:
    """Lists of unlike lengths as rows, each filled up at its end."""
    out_NK = np.full((len(sizes_N), int(sizes_N.max(initial=0))), filling, float)
    out_NK[np.arange(out_NK.shape[1]) < sizes_N[:, None]] = np.concatenate([*lists, []])
    return out_NK


def _lists(column: pd.Series[Any]) -> list[Any]:
    return [x if isinstance(x, np.ndarray) else None for x in column]
