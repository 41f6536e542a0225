"""Files as SGLang 0.5.23 writes them, for tests that need other ones than `tests/data/engines`.

Keys, dtypes and shapes are those of srt/eplb/expert_distribution.py (lines 460 to 555 and 896 to
1020) and of srt/managers/tokenizer_manager.py (line 2602); `test_sglang.py` checks them against
what SGLang's own code wrote.

B decoder blocks, T tokens, K choices, P physical and E logical experts.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

EXTEND, DECODE, MIXED, IDLE, TARGET_VERIFY = 1, 2, 3, 4, 5


@dataclass
class Ran:
    """One pass.

    Attributes:
        physical_BTK: What the recorder's hook was given; blocks of -1 are dense.
        mode: ForwardMode.
        lengths: `extend_seq_lens`.
        positions, token_ids: By default 0, 1, … and 100, 101, ….
    """

    physical_BTK: NDArray[np.int64]
    mode: int = EXTEND
    lengths: list[int] | None = None
    positions: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        T = self.physical_BTK.shape[1]
        self.positions = self.positions or list(range(T))
        self.token_ids = self.token_ids or list(range(100, 100 + T))


def drawn(seed: int, B: int, T: int, K: int, E: int, dense: tuple[int, ...] = ()) -> Any:
    """Random distinct choices, -1 in dense blocks."""
    ids_BTK = np.argsort(np.random.default_rng(seed).random((B, T, E)), axis=2)[:, :, :K]
    ids_BTK[list(dense)] = -1
    return ids_BTK


def trivial(B: int, P: int, E: int | None = None) -> NDArray[np.int64]:
    """The map of physical to logical experts that a server starts with."""
    return np.tile(np.arange(P) % (E or P), (B, 1))


def dump(
    passes: list[Ran],
    map_BP: NDArray[np.int64],
    *,
    rank: int = 0,
    first: int = 7,
    per_token: bool = True,
) -> dict[str, Any]:
    """What a rank dumps in mode per_token or per_pass."""
    records = [_record(x, first + i, rank, map_BP, per_token) for i, x in enumerate(passes)]
    return {"records": records, "last_physical_to_logical_map": torch.tensor(map_BP)}


def _record(
    x: Ran, number: int, rank: int, map_BP: NDArray[np.int64], per_token: bool
) -> dict[str, Any]:
    B, T, K = x.physical_BTK.shape
    count_BP = np.zeros(map_BP.shape, np.int32)
    for b in range(B):
        for e in x.physical_BTK[b].ravel().tolist():
            if e >= 0:
                count_BP[b, e] += 1
    slots_BTS = np.full((B, T, 8), -1, np.int32)
    slots_BTS[:, :, :K] = x.physical_BTK
    tokens = {
        "input_ids": list(x.token_ids),
        "positions": list(x.positions),
        "extend_seq_lens": x.lengths,
        "forward_mode": x.mode,
        "topk_ids_of_layer": torch.tensor(slots_BTS),
        "misc_objects": [],
    }
    return {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": "primary",
        **(tokens if per_token else {}),
        "global_physical_count": torch.tensor(count_BP),
    }


def save(path: Path, data: Any) -> Path:
    """A `.pt` file."""
    torch.save(data, path)
    return path


def stat(count_NBE: Any) -> dict[str, Any]:
    """What rank 0 dumps in mode stat."""
    return {
        "rank": 0,
        "logical_count": torch.tensor(np.asarray(count_NBE, np.int32)),
        "average_utilization_rate_over_window": None,
    }


def response(
    ids_TBK: NDArray[Any], prompt: int, completion: int, rid: str = "request", **more: Any
) -> dict[str, Any]:
    """What `/generate` returns."""
    rows = np.ascontiguousarray(ids_TBK, "<i4")
    return {
        "text": "…",
        "output_ids": list(range(100, 100 + completion)),
        "meta_info": {
            "id": rid,
            "finish_reason": {"type": "length", "length": completion},
            "prompt_tokens": prompt,
            "weight_version": "default",
            "num_retractions": 0,
            "reasoning_tokens": 0,
            "completion_tokens": completion,
            "cached_tokens": 0,
            "routed_experts": base64.b64encode(rows.tobytes()).decode(),
        },
        **more,
    }
