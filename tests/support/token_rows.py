"""Generated traces of per-token rows, and the same rows joined by a plain loop.

Everything that a question over them has to get right is in here: two ranks, rows sealed and rows
in open streams, two streams, lists of different lengths (empty ones too), padding, dropped slots,
nulls, positions routed again, rejected drafts, losses by position and by sequence, and rows that a
later attempt overtook.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.traces import START_NS, Rows, layer_info, meta, segment, stream

from moe_lens.trace.meta import Attempt, write_meta

EXPERTS, ZERO = 5, 1
STREAM_OF = {0: "encoder", 1: "encoder", 2: "decoder", 3: "decoder"}
PHASES, TAGS = ("train", "eval"), ("code", "prose")
OVERTAKEN_FROM = 2
"""The second attempt resumes here: rows of the first from this step on count nowhere."""
MARGINS = [None, 0.0, 2.0**-30, 2.0**-9, 2.0**-7, 0.125, 0.25, 1.0, 10.0, 31.5, 1000.0, math.inf]


@dataclass(frozen=True)
class Knobs:
    """What a trace is made of; the same trace for the same knobs."""

    seed: int
    forwards: int
    """Forwards of each step, of each rank."""
    tokens: int
    """At most so many tokens of each sequence in a forward."""
    token_ids: bool
    losses: str
    """none, positions, sequences or both."""


@dataclass
class World:
    """The rows that were written, by table, each with its rank."""

    rows: dict[str, Rows] = field(
        default_factory=lambda: {
            t: [] for t in ("steps", "tokens", "routing", "outcomes", "sequences")
        }
    )

    def visible(self, table: str) -> Rows:
        """Rows that no later attempt overtook."""
        return [r for r in self.rows[table] if r["attempt"] == 1 or r["step"] < OVERTAKEN_FROM]

    def save(self, folder: Path) -> None:
        """Half of each rank's rows in a segment, half in an open stream."""
        layers = [
            layer_info(i, EXPERTS, None, zero_experts=ZERO, stream=s) for i, s in STREAM_OF.items()
        ]
        attempts = [
            Attempt(0, START_NS, first_step=0),
            Attempt(1, START_NS + 1, first_step=OVERTAKEN_FROM, ended_ns=START_NS + 2),
        ]
        for rank in (0, 1):
            write_meta(folder, meta(rank, world=2, layers=layers, attempts=attempts))
            for table, rows in self.rows.items():
                mine = [r for r in rows if r["rank"] == rank]
                half = len(mine) // 2
                if mine[:half]:
                    segment(folder, table, mine[:half], rank=rank)
                if mine[half:]:
                    stream(folder, table, mine[half:], rank=rank, seq=1, batches=2)


def generate(knobs: Knobs) -> World:
    """A trace of three steps, the last of them recorded twice."""
    rng = random.Random(knobs.seed)
    world = World()
    for rank in (0, 1):
        for attempt, step in ((0, 0), (0, 1), (0, 2), (1, 2), (1, 3)):
            for forward in range(knobs.forwards):
                where = {"rank": rank, "attempt": attempt, "step": step, "forward": forward}
                _forward(rng, world.rows, where, knobs)
    return world


def _forward(rng: random.Random, rows: dict[str, Rows], where: dict, knobs: Knobs) -> None:
    rows["steps"].append({**where, "phase": rng.choice(PHASES), "tokens": 1})
    routed: set[tuple[int, int]] = set()
    for name in ("encoder", "decoder"):
        numbers = iter(range(1000))
        for sequence in (0, 1):
            start = rng.randrange(3)
            for position in range(start, start + rng.randint(0, knobs.tokens)):
                padding = rng.random() < 0.15
                token = {
                    **where,
                    "stream": name,
                    "token": next(numbers),
                    "sequence": sequence,
                    "position": position,
                    "padding": padding,
                    "tag": rng.choice(TAGS),
                    "token_id": rng.randrange(3)
                    if knobs.token_ids and rng.random() < 0.8
                    else None,
                }
                rows["tokens"].append(token)
                routed.add((sequence, position))
                for layer, of in STREAM_OF.items():
                    if of == name and rng.random() < 0.9:  # some layers see some tokens alone
                        rows["routing"].append(
                            {**where, "layer": layer, "token": token["token"], **_decision(rng)}
                        )
    for sequence in {s for s, _ in routed}:
        if rng.random() < 0.5:
            rows["sequences"].append(
                {**where, "sequence": sequence, "tag": rng.choice(TAGS),
                 "request": rng.choice([None, f"request {sequence}"])}
            )  # fmt: skip
        if knobs.losses in ("sequences", "both") and rng.random() < 0.7:
            rows["outcomes"].append({**where, "sequence": sequence, "loss": _loss(rng)})
    for sequence, position in sorted(routed):
        place = {**where, "sequence": sequence, "position": position}
        if knobs.losses in ("positions", "both") and rng.random() < 0.7:
            rows["outcomes"].append({**place, "loss": _loss(rng)})
        if rng.random() < 0.3:
            rows["outcomes"].append({**place, "kept": rng.random() < 0.5})


def _decision(rng: random.Random) -> dict[str, Any]:
    k = rng.choice([0, 1, 2, 2, 3])
    ids = rng.sample(range(EXPERTS + ZERO), k)
    dropped = [slot for slot in range(k) if rng.random() < 0.4] or None
    return {
        "expert_ids": ids,
        "weights": [rng.choice([0.125, 0.25, 0.5]) for _ in ids],
        "dropped": dropped,
        "entropy": rng.choice([None, 0.5, 1.25]),
        "margin": rng.choice(MARGINS),
    }


def _loss(rng: random.Random) -> float:
    return rng.randrange(1, 64) / 8


def decisions(world: World, narrow: dict[str, Any]) -> Rows:
    """Each valid token in each layer that saw it: its rows of both tables as one, narrowed."""
    phases = {_forward_of(r): r["phase"] for r in world.visible("steps")}
    tokens = {
        (*_forward_of(t), t["stream"], t["token"]): t
        for t in world.visible("tokens")
        if not t["padding"]
    }
    out = []
    for r in world.visible("routing"):
        t = tokens.get((*_forward_of(r), STREAM_OF[r["layer"]], r["token"]))
        if t is None:
            continue
        row = {**t, **r, "phase": phases[_forward_of(r)], "slots": set(r["dropped"] or [])}
        if wanted(row, narrow):
            out.append(row)
    return out


def wanted(row: dict[str, Any], narrow: dict[str, Any]) -> bool:
    """Whether the standard filters let a row through."""
    return (
        narrow.get("first_step", -1) <= row["step"] <= narrow.get("last_step", 99)
        and narrow.get("first_layer", -1) <= row["layer"] <= narrow.get("last_layer", 99)
        and all(narrow.get(k, row[k]) == row[k] for k in ("phase", "tag", "rank"))
        and narrow.get("layer", row["layer"]) == row["layer"]
    )


def _forward_of(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["rank"], row["step"], row["forward"]
