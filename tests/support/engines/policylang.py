"""Traces of moe-policylang 1.15.0, as integrations/trace_recorder.py writes them.

`save_jsonl` (lines 83-127): a header line, then a line a row under short names, those that are None
left out but for "s". `save_parquet` (180-254): int32 keys, list<int32> and list<float32> columns,
optional ones only where some row has a value, one `pq.write_table(…, compression="zstd")`. Rows in
the order of `_FullSoftmaxRecorder._make_hook` (411-446): by forward, layer, token.
tests/frameworks/other/policylang_checks.py holds that the package writes the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Row = dict[str, Any]

SHORT = {
    "prompt_id": "p",
    "token_idx": "t",
    "layer_idx": "l",
    "selected_experts": "e",
    "router_scores": "s",
    "router_softmax": "sm",
    "token_id": "ti",
    "phase": "ph",
    "language_tag": "lg",
    "domain_tag": "dm",
    "router_logits": "lg_l",
    "token_loss": "tl",
    "kv_shard_id": "kv",
}
TYPES = {
    "prompt_id": pa.int32(),
    "token_idx": pa.int32(),
    "layer_idx": pa.int32(),
    "selected_experts": pa.list_(pa.int32()),
    "router_scores": pa.list_(pa.float32()),
    "router_softmax": pa.list_(pa.float32()),
    "token_id": pa.int32(),
    "phase": pa.string(),
    "language_tag": pa.string(),
    "domain_tag": pa.string(),
    "router_logits": pa.list_(pa.float32()),
    "token_loss": pa.float32(),
    "kv_shard_id": pa.int32(),
}
ALWAYS = ("prompt_id", "token_idx", "layer_idx", "selected_experts")
EXTENSIONS = ("token_id", "phase", "language_tag", "domain_tag", "router_logits", "token_loss")


@dataclass
class Recorded:
    """Rows as its recorder would have them, and what they are of."""

    experts: int
    top_k: int
    layers: tuple[int, ...]
    forwards: list[tuple[int, int, int]]
    """Of each: prompt, first token, tokens."""
    rows: list[Row]
    logits: dict[tuple[int, int, int], NDArray[np.float32]] = field(default_factory=dict)
    """`[E]`, by prompt, token, layer."""

    def header(self) -> dict[str, Any]:
        return {
            "model_name": "tiny",
            "num_layers": len(self.layers),
            "num_experts": self.experts,
            "top_k": self.top_k,
            "num_entries": len(self.rows),
            "records_full_softmax": any(r.get("router_softmax") for r in self.rows),
        }


def recorded(
    prompts: tuple[int, ...] = (5, 3),
    generated: int = 3,
    *,
    layers: tuple[int, ...] = (1, 2, 4),
    experts: int = 6,
    top_k: int = 2,
    full: bool = True,
    seed: int = 0,
) -> Recorded:
    """Prompts of so many tokens, and the forwards that generate so many (the last never runs).

    Args:
        full: With all that it can record; else the choices and their scores alone.
    """
    rng = np.random.default_rng(seed)
    made = Recorded(experts, top_k, layers, [], [])
    for prompt, length in enumerate(prompts):
        vocabulary = rng.integers(1, 60, length).tolist()
        forwards = [(0, length), *((length + i, 1) for i in range(generated - 1))]
        for first, T in forwards:
            made.forwards.append((prompt, first, T))
            for layer in layers:
                for token in range(first, first + T):
                    z_E = rng.normal(size=experts).astype(np.float32)
                    made.logits[prompt, token, layer] = z_E
                    prob_E = (np.exp(z_E) / np.exp(z_E).sum()).astype(np.float32)
                    chosen = np.argsort(-prob_E)[:top_k]
                    row = {
                        "prompt_id": prompt,
                        "token_idx": token,
                        "layer_idx": layer,
                        "selected_experts": chosen.tolist(),
                        "router_scores": prob_E[chosen].tolist(),
                    }
                    if full:
                        row |= {
                            "router_softmax": prob_E.tolist(),
                            "router_logits": z_E.tolist(),
                            "token_id": vocabulary[token] if token < length else None,
                            "phase": "prefill" if token < length else "decode",
                            "language_tag": ("en", "de")[prompt % 2],
                            "domain_tag": ("code", "chat")[prompt % 2],
                            "token_loss": float(np.float32(rng.random())) if token else None,
                        }
                    made.rows.append(row)
    return made


def write_jsonl(path: Path, of: Recorded, header: dict[str, Any] | None = None) -> Path:
    """As `save_jsonl`."""
    lines: list[dict[str, Any]] = [of.header() if header is None else header]
    for row in of.rows:
        said = {SHORT[k]: v for k, v in row.items() if v is not None or k in ALWAYS}
        said["s"] = row.get("router_scores")
        order = [short for short in SHORT.values() if short in said]
        lines.append({short: said[short] for short in order})
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


def write_parquet(path: Path, of: Recorded, **more: Any) -> Path:
    """As `save_parquet`; `more` for `pq.write_table`."""
    columns = {}
    for name, kind in TYPES.items():
        values = [row.get(name) for row in of.rows]
        if name in ALWAYS or any(x is not None for x in values):
            columns[name] = pa.array(values, kind)
    pq.write_table(pa.table(columns), path, compression="zstd", **more)
    return path


def write(path: Path, of: Recorded) -> Path:
    """By the name's ending, as `save` does."""
    return (write_parquet if path.suffix == ".parquet" else write_jsonl)(path, of)
