"""A small trace of sequences kept token by token, beside the counts of `write_run`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from support.traces import segment, write_run


@dataclass(frozen=True)
class Choice:
    """What one token did in one layer."""

    sequence: int
    position: int
    token_id: int
    tag: str
    layer: int
    experts: tuple[int, ...]
    dropped: tuple[int, ...]
    """Slots of `experts`."""
    loss: float


def write_sequences(
    path: Path,
    *,
    sequences: int = 5,
    length: int = 6,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    tags: tuple[str, ...] = ("code", "prose"),
    token_ids: bool = True,
    losses: bool = True,
    request: str = "request {}",
    seed: int = 0,
) -> list[Choice]:
    """Write a trace in which sequence n is a forward of step n of its own."""
    rng = random.Random(seed)
    write_run(path, layers=layers, experts=max(experts, 4), steps=sequences, tags=tags,
              phases=("train",), losses=losses, token_rows=False)  # fmt: skip
    made = []
    tokens, routing, outcomes, said = [], [], [], []
    for n in range(sequences):
        where = {"step": n, "window": n, "sequence": n}
        tag = tags[n % len(tags)]
        said.append({**where, "tag": tag, "request": request.format(n)})
        for position in range(length + n):
            token_id, loss = rng.randrange(50), rng.randrange(1, 64) / 8
            tokens.append(
                {**where, "token": position, "position": position, "tag": tag,
                 "token_id": token_id if token_ids else None}
            )  # fmt: skip
            if losses:
                outcomes.append({**where, "forward": 0, "position": position, "loss": loss})
            for layer in range(layers):
                ids = tuple(rng.sample(range(experts), top_k))
                lost = tuple(slot for slot in range(top_k) if rng.random() < 0.3)
                routing.append(
                    {**where, "layer": layer, "token": position, "expert_ids": ids,
                     "weights": [1 / (slot + 2) for slot in range(top_k)], "dropped": lost or None}
                )  # fmt: skip
                made.append(Choice(n, position, token_id, tag, layer, ids, lost, loss))
    for table, rows in (
        ("sequences", said), ("tokens", tokens), ("routing", routing), ("outcomes", outcomes),
    ):  # fmt: skip
        if rows:
            segment(path, table, rows)
    return made
