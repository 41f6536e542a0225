"""One sequence as a table with a row a token. No Streamlit here."""

from __future__ import annotations

from typing import Any

import pandas as pd

LOST = "✕"
"""Stands behind an expert that had no room for the token: the choice was dropped."""


def token_table(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    """A row a token, its experts by layer.

    Args:
        rows: Answer of `request_tokens`.
        most: Tokens, from the first position on.

    Returns:
        position, token_id, loss, dropped (choices in all layers), then `layer N`: its experts, in
        the order of the trace. A position that was routed again has a row for each time.
    """
    again = rows.groupby(["position", "layer"]).cumcount()
    seen = list(zip(rows["position"], again, strict=True))
    kept = set(sorted(set(seen))[:most])
    no_layer = {f"layer {layer}": "" for layer in sorted(set(rows["layer"]))}
    tokens: dict[tuple[int, int], dict[str, Any]] = {}
    for key, row in zip(seen, rows.to_dict("records"), strict=True):
        if key not in kept:
            continue
        said = {name: row[name] for name in ("position", "token_id", "loss")}
        token = tokens.setdefault(key, said | {"dropped": 0} | no_layer)
        lost = set() if row["dropped"] is None else set(row["dropped"])
        token["dropped"] += len(lost)
        token[f"layer {row['layer']}"] = ", ".join(
            f"{expert}{LOST}" if slot in lost else str(expert)
            for slot, expert in enumerate(row["expert_ids"])
        )
    return pd.DataFrame([tokens[key] for key in sorted(tokens)])
