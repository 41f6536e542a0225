"""Made-up routing for tests of importers, and a format that reads it: no file behind it.

L layers, T tokens, K choices, E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import moe_lens
from moe_lens.importers.source import Given, Item, Rank, Sequence, Source
from moe_lens.trace.meta import LayerInfo

E, K, L = 12, 3, 4


def choices(T: int, seed: int, *, layers: int = L, experts: int = E, top_k: int = K) -> Any:
    """`[T, L, K]`: distinct experts of each token in each layer."""
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((T, layers, experts)), axis=2)[:, :, :top_k].astype(np.uint8)


def requests(n: int, seed: int = 0, most: int = 9) -> list[Sequence]:
    """Sequences with prompts, tags, token ids and request ids."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        T = int(rng.integers(1, most + 1))
        out.append(
            Sequence(
                f"request {i}",
                choices(T, 100 * seed + i),
                first_position=int(rng.integers(0, 3)),
                prompt_tokens=int(rng.integers(0, T + 1)),
                weights_TLK=rng.random((T, L, K)).astype(np.float32),
                token_id_T=rng.integers(0, 999, T),
                request=f"r{i}",
                tag=("code", "chat")[i % 2],
            )
        )
    return out


def layers(n: int = L, experts: int = E, top_k: int | None = K) -> list[LayerInfo]:
    """Layers of one kind, in every second block."""
    return [
        LayerInfo(i, f"model.layers.{2 * i + 1}.mlp", experts, top_k, block=2 * i + 1)
        for i in range(n)
    ]


class MadeUp:
    """A format whose files hold nothing: what is read is given here."""

    SAYS = "for tests"

    def __init__(self, *ranks: list[Item], infos: list[LayerInfo] | None = None) -> None:
        self.ranks = ranks
        self.infos = infos or layers()

    def recognises(self, path: Path, head: bytes) -> bool:
        return head.startswith(b"made up")

    def open_source(self, path: Path, given: Given) -> Source:
        def of(items: list[Item]) -> Iterator[Item]:
            yield from items

        return Source(
            self.infos,
            [Rank(i, lambda x=x: of(x), path) for i, x in enumerate(self.ranks)],  # type: ignore[misc]
            {"entropy": "nobody recorded it"},
            model="MadeUp",
        )


def counted(run: Path) -> Counter[tuple[int, int]]:
    """`load` in SQL: choices by (layer, expert)."""
    with moe_lens.open(run) as trace:
        rows: Any = trace.sql(
            "select layer, expert, cast(sum(routed) as bigint) as n from load group by all"
        ).rows()
    return Counter({(r["layer"], r["expert"]): r["n"] for r in rows})


def routed(run: Path) -> dict[tuple[int, int], NDArray[Any]]:
    """Routing in SQL, by (sequence, position): ids `[L, K]`."""
    with moe_lens.open(run) as trace:
        rows: Any = trace.sql(
            "select t.sequence, t.position, r.layer, r.expert_ids from routing r join tokens t "
            "using (rank, step, forward, token) order by all"
        ).rows()
    found: dict[tuple[int, int], list[Any]] = {}
    for r in rows:
        found.setdefault((r["sequence"], r["position"]), []).append((r["layer"], r["expert_ids"]))
    return {key: np.array([ids for _, ids in sorted(x)]) for key, x in found.items()}
