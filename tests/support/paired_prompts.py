"""A trace of prompts in several orders, routed by a plain function of what a token may see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from support.traces import layer_info, meta, segment

from moe_lens.trace.meta import write_meta

EXPERTS = 8
Router = Callable[[Sequence[int], int], tuple[int, int]]
"""Of token ids and a position: two experts, the first one first."""


def by_id(ids: Sequence[int], at: int) -> tuple[int, int]:
    """The token id alone decides: a lookup table."""
    return ids[at] % EXPERTS, (ids[at] + 1 + ids[at] % 3) % EXPERTS


def by_last(ids: Sequence[int], at: int) -> tuple[int, int]:
    """The id before decides: the first token of a sequence has none."""
    last = ids[at - 1] if at else 0
    return last % EXPERTS, (last + 3) % EXPERTS


def by_position(ids: Sequence[int], at: int) -> tuple[int, int]:
    """Where a token stands decides."""
    return at % EXPERTS, (at + 1) % EXPERTS


def write_prompts(
    path: Path,
    prompts: Sequence[tuple[str | None, str | None, Sequence[int]]],
    routers: Sequence[Router],
    *,
    token_ids: bool = True,
    keys: tuple[str, ...] = ("pair", "variant"),
    phase: str = "eval",
    decoded: int = 0,
    requests: int = 1000,
    skipped: Sequence[tuple[int, int]] = (),
) -> None:
    """Write prompts (pair, variant, token ids), a forward each, a layer a router.

    Args:
        path: A new folder.
        prompts: Each a sequence; its request id is `r0`, `r1`, ….
        routers: Of each layer.
        token_ids: They are kept.
        keys: Columns of pair and variant; fewer: without them.
        phase: Of all forwards.
        decoded: Or the last so many tokens of each are of phase decode, in a forward of their own;
            what is before them, of prefill.
        requests: Ids of requests that there are; each further sequence has that of an earlier one.
        skipped: (sequence, position) without rows.
    """
    infos = [
        layer_info(n, EXPERTS, hidden_size=4, intermediate_size=2) for n in range(len(routers))
    ]
    write_meta(path, meta(layers=infos, keys=list(keys)))
    where = [{"step": n, "forward": 0, "sequence": n} for n in range(len(prompts))]
    phases = ["prefill", "decode"] if decoded else [phase]
    segment(path, "steps", [
        {**w, "forward": n, "phase": each, "tokens": decoded if n else len(p[2]) - decoded}
        for w, p in zip(where, prompts, strict=True) for n, each in enumerate(phases)])  # fmt: skip
    said = [
        {**w, "tag": "all", "request": f"r{n % requests}", **dict(zip(keys, p[:2], strict=False))}
        for n, (w, p) in enumerate(zip(where, prompts, strict=True))
    ]
    segment(path, "sequences", said, keys=keys)
    kept = [
        ({**w, "forward": int(at >= len(p[2]) - decoded)}, p[2], at)
        for w, p in zip(where, prompts, strict=True)
        for at in range(len(p[2]))
        if (w["sequence"], at) not in skipped
    ]
    segment(path, "tokens", [
        {**w, "token": at, "position": at, "tag": "all",
         "token_id": ids[at] if token_ids else None} for w, ids, at in kept])  # fmt: skip
    segment(path, "routing", [
        {**w, "layer": layer, "token": at, "expert_ids": list(router(ids, at)),
         "weights": [0.75, 0.25]}
        for layer, router in enumerate(routers) for w, ids, at in kept])  # fmt: skip
