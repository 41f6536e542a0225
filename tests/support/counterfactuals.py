"""Results of `moe-lens counterfactual`, made up: every kind of change of a few layers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.trace.schema import COUNTERFACTUAL

Rows = list[dict[str, Any]]


def made_up(
    seed: int = 0, layers: tuple[int, ...] = (0, 3), experts: int = 8, sequences: int = 3
) -> Rows:
    """Rows of all changes: five tokens a sequence, two experts a token, up to four other routes.

    Expert 0 has no token, so that it can be dormant; of the last layer no entropy is known.
    """
    rng = np.random.default_rng(seed)
    found: Rows = []
    for layer in layers:
        for sequence in range(sequences):
            for position in range(5):
                own = set((1 + rng.permutation(experts - 1)[:2]).tolist())
                key = {
                    "layer": layer,
                    "sequence": sequence,
                    "position": position,
                    "tag": ("code", "it's <b>prose")[sequence % 2],
                    "base_loss": float(rng.normal(3)),
                    "margin": float(np.float32(rng.random())),
                    "entropy": None if layer == layers[-1] else float(np.float32(rng.random())),
                }
                changes = [("knock_out", e, e in own) for e in range(experts)]
                changes += [("force_in", e, e not in own) for e in range(experts)]
                changes += [("runner_up", 0, True)]
                changes += [("top_k", k, k != 2) for k in range(1, 5)]
                changes += [("other_route", a, True) for a in range(1 + position % 4)]
                for intervention, number, affected in changes:
                    moved = float(rng.normal()) if affected and rng.random() > 0.1 else 0.0
                    found.append(
                        key
                        | {"intervention": intervention, "number": number, "affected": affected}
                        | {"loss": key["base_loss"] + moved, "expert_ids": None}
                    )
    return found


def said(rows: Rows, *, experts: int = 8, interrupted: bool = False) -> dict[str, Any]:
    """What such a result says of itself."""
    return {
        "model": "TinyMoE",
        "measured_tokens": len({(r["sequence"], r["position"]) for r in rows}),
        "sequences": len({r["sequence"] for r in rows}),
        "refused": {},
        "interrupted": interrupted,
        "moe_layers": [
            {"layer": n, "experts": experts, "zero_experts": 0, "top_k": 2}
            for n in sorted({r["layer"] for r in rows})
        ],
    }


def write(run: Path, name: str, rows: Rows, about: object) -> Path:
    """Write a result into a run; about None: it says nothing of itself."""
    path = run / "counterfactual" / f"{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    metadata = {} if about is None else {"moe_lens": json.dumps(about)}
    table = pa.Table.from_pylist(rows, COUNTERFACTUAL.schema.with_metadata(metadata))
    pq.write_table(table, path)
    return path


def columns(rows: Rows) -> dict[str, Any]:
    """As `Counterfactual.columns` gives them."""
    out = {}
    for name in COUNTERFACTUAL.schema.names:
        if name != "expert_ids":
            values = [math.nan if r[name] is None else r[name] for r in rows]
            out[name] = np.array(values)
    return out
