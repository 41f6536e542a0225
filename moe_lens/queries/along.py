"""The answer of `sequence_choices` as arrays: what a router chose along whole sequences.

Legend: N tokens, K choices of a token, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

FIELDS = (
    "ids_NK", "weights_NK", "sequence_N", "position_N", "tag_N", "tags", "token_id_N", "margin_N",
    "dropped_N", "loss_N",
)  # fmt: skip
"""Of `Evidence`."""


def fields(rows: pd.DataFrame, experts: int) -> dict[str, Any]:
    """What is known of these tokens, as fields of `Evidence`; those that are not are left out."""
    ids_NK, weights_NK = _choices(rows, experts)
    out: dict[str, Any] = {
        "ids_NK": ids_NK,
        "sequence_N": rows.groupby(["rank", "sequence"], sort=False).ngroup().to_numpy(np.int64),
        "position_N": rows["position"].to_numpy(np.int64),
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


def before(rows: pd.DataFrame, previous: pd.DataFrame, experts: int) -> dict[str, Any]:
    """The choices in the layer before, of the same tokens; nothing where rows are lacking."""
    if previous.empty or not np.isin(rows["nth"], previous["nth"]).all():
        return {}
    ids_NK, _ = _choices(previous, experts)
    at_N = np.searchsorted(previous["nth"].to_numpy(), rows["nth"].to_numpy())
    return {"before_NK": ids_NK[at_N]}


def _choices(
    rows: pd.DataFrame, experts: int
) -> tuple[NDArray[np.int64], NDArray[np.float64] | None]:
    """Experts and weights, largest weight first; zero-compute experts are none: -1."""
    sizes_N = np.array([len(x) for x in rows["expert_ids"]], np.int64)
    ids_NK = _padded(rows["expert_ids"], sizes_N, -1).astype(np.int64)
    ids_NK[ids_NK >= experts] = -1
    if rows["weights"].isna().any():
        return ids_NK, None
    weights_NK = np.where(ids_NK < 0, -np.inf, _padded(rows["weights"], sizes_N, 0.0))
    order_NK = np.argsort(-weights_NK, axis=1, kind="stable")
    ids_NK = np.take_along_axis(ids_NK, order_NK, 1)
    weights_NK = np.take_along_axis(weights_NK, order_NK, 1)
    return ids_NK, np.where(ids_NK < 0, 0.0, weights_NK)


def _padded(
    lists: pd.Series[Any], sizes_N: NDArray[np.int64], filling: float
) -> NDArray[np.float64]:
    out_NK = np.full((len(sizes_N), int(sizes_N.max(initial=0))), filling, float)
    out_NK[np.arange(out_NK.shape[1]) < sizes_N[:, None]] = np.concatenate([*lists, []])
    return out_NK


def _lists(column: pd.Series[Any]) -> list[Any]:
    return [x if isinstance(x, np.ndarray) else None for x in column]
