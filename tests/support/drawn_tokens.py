"""The kept tokens of a generated trace that a question looks at, in order, by a plain loop."""

from __future__ import annotations

from typing import Any

from support.token_rows import STREAM_OF, World
from support.traces import Rows


def place(t: dict[str, Any]) -> tuple[int, ...]:
    return t["rank"], t["step"], t["forward"], t["sequence"], t["position"]


def valid_tokens(world: World, asked: dict[str, Any]) -> Rows:
    """Kept tokens of the layer's stream."""
    phases = {(r["rank"], r["step"], r["forward"]): r["phase"] for r in world.visible("steps")}
    rejected = {place(o) for o in world.visible("outcomes")
                if o.get("kept") is False and o.get("position") is not None}  # fmt: skip
    stream = STREAM_OF[asked["layer"]]
    return [
        t
        for t in world.visible("tokens")
        if t["stream"] == stream
        and not t["padding"]
        and (stream == "encoder" or place(t) not in rejected)
        and asked.get("first_step", -1) <= t["step"] <= asked.get("last_step", 99)
        and all(asked.get(k, t[k]) == t[k] for k in ("tag", "rank"))
        and asked.get("phase", p := phases[t["rank"], t["step"], t["forward"]]) == p
    ]


def drawn(tokens: Rows, by: str, most: int | None) -> Rows:
    """Whole sequences by lot, or forwards in order, until there are so many tokens.

    Of a position that was routed more than once the last routing, in the order of the answer.
    """

    def group(t: dict[str, Any]) -> tuple[int, ...]:
        if by == "forward":
            return t["rank"], t["step"], t["forward"]
        lot = (t["sequence"] * 15485863 + t["rank"] * 7919) % 2147483647 % 10007
        return lot, t["rank"], t["sequence"]

    def fits(t: dict[str, Any]) -> bool:
        return most is None or sum(group(other) < group(t) for other in tokens) < most

    def order(t: dict[str, Any]) -> tuple[int, ...]:
        when = (t["step"], t["forward"]) if by == "forward" else ()
        return (t["rank"], *when, t["sequence"], t["position"])

    newest: dict[tuple[int, int, int], dict[str, Any]] = {}
    for t in sorted(filter(fits, tokens), key=lambda t: (t["step"], t["forward"], t["token"])):
        newest[t["rank"], t["sequence"], t["position"]] = t
    return sorted(newest.values(), key=order)
