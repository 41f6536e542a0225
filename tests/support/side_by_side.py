"""A trace of sequences that were generated side by side, row by row, and what they chose.

Nothing here uses the writer of the package. T tokens of a sequence, L layers, K choices, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support.traces import layer_info, meta, segment

from moe_lens.trace.meta import LayerInfo, write_meta

L, K, E = 3, 2, 8


@dataclass
class Made:
    """A trace of some sequences, generated side by side: prompts in one forward, then decoding.

    Attributes:
        truth: `[T, L, K]` by sequence, in order of position.
        rows: What is written; change it before `write`.
    """

    run: Path
    rank: int = 0
    experts: int = E
    blocks: tuple[int | None, ...] = (1, 2, 4)
    truth: dict[int, NDArray[Any]] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = ("steps", "tokens", "routing", "sequences", "outcomes")
        self.rows = {name: [] for name in names}

    def draw(self, prompts: tuple[int, ...] = (4, 2, 5), decoded: int = 3, seed: int = 0) -> Made:
        rng = np.random.default_rng(seed)
        for number, prompt in enumerate(prompts):
            shape = (prompt + decoded, L, self.experts)
            self.truth[number] = np.argsort(rng.random(shape), axis=2)[:, :, :K]
            tag = ("code", "math")[number % 2]
            said = {"sequence": number, "tag": tag, "request": f"r/{number}"}
            self.rows["sequences"].append(said)
        self.forward(0, [(n, p) for n, P in enumerate(prompts) for p in range(P)], "prefill")
        for step in range(1, decoded + 1):
            tokens = [(n, P + step - 1) for n, P in enumerate(prompts)]
            self.forward(step, tokens[::-1], "decode")  # the batch in another order
        return self

    def forward(self, step: int, tokens: list[tuple[int, int]], phase: str) -> None:
        n = len(tokens)
        self.rows["steps"].append(
            {"step": step, "forward": 3, "phase": phase, "tokens": n, "window": step}
        )
        for t, (number, position) in enumerate(tokens):
            key = {"step": step, "forward": 3, "token": t}
            self.rows["tokens"].append({**key, "sequence": number, "position": position})
            for layer in range(L):
                ids = self.truth[number][position, layer].tolist()
                self.rows["routing"].append({**key, "layer": layer, "expert_ids": ids})

    def token(self, sequence: int, position: int) -> dict[str, Any]:
        return next(
            r for r in self.rows["tokens"] if (r["sequence"], r["position"]) == (sequence, position)
        )

    def routing(self, sequence: int, position: int, layer: int) -> dict[str, Any]:
        of = self.token(sequence, position)
        key = (of["step"], of["token"], layer)
        return next(r for r in self.rows["routing"] if (r["step"], r["token"], r["layer"]) == key)

    def infos(self) -> list[LayerInfo]:
        infos = [layer_info(i, self.experts, K) for i in range(L)]
        for info, block in zip(infos, self.blocks, strict=True):
            info.block = block
        return infos

    def write(self) -> Made:
        said = {"layers": self.infos(), "tags": ["code", "math"], **self.changes}
        write_meta(self.run, meta(self.rank, **said))
        for table, rows in self.rows.items():
            ordered = sorted(rows, key=lambda r: r.get("layer", 0))
            half = len(ordered) // 2
            for seq, some in enumerate((ordered[:half], ordered[half:])):
                if some:
                    segment(self.run, table, some, rank=self.rank, seq=seq)
        return self
