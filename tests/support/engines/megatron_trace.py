"""A Megatron router trace of given choices, as megatron-core 0.19.0 writes it.

megatron/core/transformer/moe/router_trace.py: keys and their order are those of
`_make_index_record` (lines 291-305) and of `_record` (logit_offset, logit_bytes, logit_shape, lines
384-403); `_flush_records_to_disk` (lines 465-475) puts `top_indices` last and ends a record with a
newline; logits are bfloat16, one tensor behind the other.

`test_megatron` holds that this writes, byte by byte, what the tracer's own code wrote into
`tests/data/engines/megatron`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class Fired:
    """One router's pass: where, what it chose, and its logits where they are captured."""

    step: int
    layer: int
    ids_TK: NDArray[Any]
    logits_TE: NDArray[np.float32] | None = None
    block: str = "decoder"
    mtp_idx: int | None = None


def write_rank(folder: Path, fired: Sequence[Fired], *, rank: int = 0) -> Path:
    """Write a rank's files; the path of its trace."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"router_trace_rank{rank}.jsonl"
    offset = 0
    with path.open("w") as f:
        for x in fired:
            record: dict[str, Any] = {
                "step": x.step,
                "stage": "pre_dispatch",
                "block": x.block,
                "layer": x.layer,
                "rank": rank,
                "num_tokens": x.ids_TK.shape[0],
                "topk": x.ids_TK.shape[1],
            }
            if x.mtp_idx is not None:
                record["mtp_idx"] = x.mtp_idx
            if x.logits_TE is not None:
                data = to_bfloat16(x.logits_TE).tobytes()
                with (folder / f"logits_rank{rank}.bin").open("ab" if offset else "wb") as sidecar:
                    sidecar.write(data)
                record["logit_offset"] = offset
                record["logit_bytes"] = len(data)
                record["logit_shape"] = list(x.logits_TE.shape)
                offset += len(data)
            record["top_indices"] = x.ids_TK.tolist()
            f.write(json.dumps(record) + "\n")
    return path


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves: of numbers that bfloat16 has, as here, without rounding."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any(), "not a bfloat16 number"
    return (bits >> 16).astype("<u2")
