"""`capacity_sweep` against a loop that lets every expert of every forward run over by itself."""

from __future__ import annotations

import math
import random
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from support.asking import PHASES, RANKS, ask, fitting, kept, narrowed, relaxed, same, trace_of
from support.traces import Rows, layer_info

from moe_lens.trace.meta import LayerInfo

LAYERS = [
    layer_info(0, 6, 2, zero_experts=2),
    layer_info(1, 4, 1, adapter="switch"),
    layer_info(2, 5, None, router="dynamic-k"),
    layer_info(3, 1, 1),
    layer_info(4, 4, None, router="expert-choice"),
    layer_info(5, 3, 1, adapter="mine", stream="encoder"),
    layer_info(6, 3, 1),  # never ran
]
RAN = LAYERS[:6]


@dataclass
class Token:
    """A token in a forward: its sequence, and what it chose in each layer."""

    sequence: int
    padding: bool
    sampled: bool
    chosen: dict[int, list[int]]


@dataclass
class Window:
    """Forwards whose counts are summed, each a list of tokens."""

    where: dict[str, Any]
    forwards: list[list[Token]]
    capacity: int | None
    two_tags: bool


def choose(rng: random.Random, info: LayerInfo) -> list[int]:
    everyone = info.experts + info.zero_experts
    k = rng.randint(0, everyone) if info.top_k is None else info.top_k
    # the lower ids more often, so that something overflows
    return sorted(rng.sample(range(everyone), everyone), key=lambda e: rng.random() + 0.05 * e)[:k]


def windows_of(seed: int, sampling: float) -> list[Window]:
    """Windows of one or several forwards of one or several sequences, over two ranks."""
    rng = random.Random(seed)
    made = []
    step = 0
    for rank in range(RANKS):
        for number in range(rng.randint(0, 4)):
            forwards = []
            for _ in range(rng.choice([1, 1, 2, 3])):
                sequences = [(s, rng.random() < sampling) for s in range(rng.choice([1, 1, 2, 3]))]
                forwards.append([
                    Token(s, rng.random() < 0.2, sampled, {x.layer: choose(rng, x) for x in RAN})
                    for s, sampled in sequences for _ in range(rng.randint(0, 6))
                ])  # fmt: skip
            where = {
                "rank": rank, "attempt": 0, "window": number, "step": step % 4,
                "phase": rng.choice(PHASES),
            }  # fmt: skip
            step += len(forwards)
            capacity, two_tags = rng.choice([None, 2, 50]), rng.random() < 0.5
            made.append(Window(where, forwards, capacity, two_tags))
    return made


def tables_of(windows: list[Window]) -> dict[str, Rows]:
    """What a recorder would have written of them."""
    out: dict[str, Rows] = {
        n: [] for n in ("load", "layers", "routers", "slices", "steps", "tokens", "routing")
    }
    for w in windows:
        of_layer = {x.layer: Counter[int]() for x in RAN}
        largest: Counter[int] = Counter()
        for nth, tokens in enumerate(w.forwards):
            forward = {**w.where, "forward": 100 * w.where["window"] + nth}
            out["steps"].append(forward)
            for x in RAN:
                mine = Counter(e for t in tokens if not t.padding for e in t.chosen[x.layer])
                of_layer[x.layer] += mine
                largest[x.layer] = max(largest[x.layer], *mine.values(), 0)
            for at, t in enumerate(tokens):
                if t.sampled:
                    key = {**forward, "token": at, "sequence": t.sequence, "padding": t.padding}
                    out["tokens"] += [{**key, "stream": s} for s in ("main", "encoder")]
                    for x in RAN:
                        ids = t.chosen[x.layer]
                        odd = {"expert_ids": [0] * len(ids), "router_ids": ids}
                        plain = {"expert_ids": ids}
                        out["routing"].append(
                            {**key, "layer": x.layer, **(odd if x.layer == 2 else plain)}
                        )
        valid = sum(not t.padding for f in w.forwards for t in f)
        for x in RAN:
            out["layers"].append({
                **w.where, "layer": x.layer, "forwards": len(w.forwards), "tokens": valid,
                "capacity": w.capacity, "max_load": largest[x.layer],
                "capacity_groups": capacity_groups(w, x),
            })  # fmt: skip
            for expert, n in of_layer[x.layer].items():
                some = n // 2 if w.two_tags else n
                row = {**w.where, "layer": x.layer, "expert": expert}
                out["load"] += [{**row, "tag": "a", "routed": some}]
                if w.two_tags:
                    out["load"] += [{**row, "tag": "b", "routed": n - some}]
            for tag in ("a", "b") if w.two_tags else ("a",):
                out["routers"].append({**w.where, "layer": x.layer, "tag": tag})
        seen = sum(len({t.sequence for t in f if not t.padding}) for f in w.forwards)
        out["slices"].append({**w.where, "tag": "a", "sequences": seen, "tokens": valid})
    return out


def groups_of(window: Window, layer: int, by_sequence: bool) -> list[tuple[list[Token], str]]:
    """The tokens that share a capacity, where the trace tells them apart, and from what."""
    split: dict[Any, list[Token]] = defaultdict(list)
    for nth, tokens in enumerate(window.forwards):
        for t in tokens:
            if not t.padding:
                split[nth, t.sequence if by_sequence else None].append(t)
    if len(window.forwards) == 1 and not by_sequence:
        return [(group, "counts") for group in split.values()]
    everyone = [t for group in split.values() for t in group]
    if by_sequence:
        return [(group, "rows") for group in split.values() if group[0].sampled]
    return [(g, "rows") for g in split.values()] if all(t.sampled for t in everyone) else []


def capacity_groups(window: Window, info: LayerInfo) -> int | None:
    """Of `switch`, where a capacity applies, each sequence has a capacity of its own."""
    if window.capacity is None or len(window.forwards) > 1:
        return None
    return len({t.sequence for t in window.forwards[0]}) if info.adapter == "switch" else 1


@relaxed
@given(
    seed=st.integers(0, 10**6),
    sampling=st.sampled_from([0.0, 0.6, 1.0]),
    curve=st.sampled_from([(0.5, 4.0, 36), (1.0, 1.2, 3), (1.25, 9.0, 1), (0.0, 0.5, 6)]),
    narrow=narrowed,
)
def test_equals_a_naive_loop(
    seed: int, sampling: float, curve: tuple[float, float, int], narrow: dict[str, Any]
) -> None:
    windows = windows_of(seed, sampling)
    lowest, highest, points = curve
    narrow = fitting("capacity_sweep", narrow)
    with tempfile.TemporaryDirectory() as folder:
        with trace_of(Path(folder), LAYERS, **tables_of(windows)) as trace:
            asked = {**narrow, "lowest": lowest, "highest": highest, "points": points}
            got = ask(trace, "capacity_sweep", asked, "layer", "capacity_factor")
    expected = {}
    inside = [w for w in windows if kept([w.where], narrow)]
    for x in kept_layers(narrow):
        groups = [
            g for w in inside for g in groups_of(w, x.layer, (capacity_groups(w, x) or 1) > 1)
        ]
        loads = [
            (Counter(e for t in tokens for e in t.chosen[x.layer] if e < x.experts), len(tokens))
            for tokens, _ in groups
        ]
        choices = sum(n.total() for n, _ in loads)
        everything = sum(
            e < x.experts for w in inside for f in w.forwards for t in f
            if not t.padding for e in t.chosen[x.layer]
        )  # fmt: skip
        used = {source for (n, _), (_, source) in zip(loads, groups, strict=True) if n}
        for i in range(points):
            factor = Fraction(lowest).limit_denominator(100)
            if points > 1:
                factor += (Fraction(highest).limit_denominator(100) - factor) * i / (points - 1)
            dropped = 0
            for n, tokens in loads:
                slots = n.total() if x.top_k is None else x.top_k * tokens
                capacity = math.ceil(factor * slots / x.experts)
                dropped += sum(max(0, routed - capacity) for routed in n.values())
            if choices:
                expected[x.layer, float(factor)] = (
                    dropped / choices, choices, "rows" if "rows" in used else "counts",
                    choices / everything,
                )  # fmt: skip
    assert sorted(got) == [(la, round(f, 6)) for la, f in sorted(expected)]
    for row, want in zip(got.values(), (expected[k] for k in sorted(expected)), strict=True):
        assert same(row["dropped_share"], want[0])
        assert (row["choices"], row["source"]) == want[1:3]
        assert same(row["covered"], want[3])


def kept_layers(narrow: dict[str, Any]) -> list[LayerInfo]:
    first, last = narrow.get("first_layer", 0), narrow.get("last_layer", 99)
    return [x for x in RAN if x.router != "expert-choice" and first <= x.layer <= last]


def test_a_capacity_is_not_pushed_up_by_rounding(tmp_path: Path) -> None:
    """1.1 * 100 / 2 is 55, where floats say 55.00000000000001: the 56th choice is dropped."""
    where = {"layer": 0, "step": 0, "tag": "a"}
    load = [{**where, "expert": e, "routed": n} for e, n in enumerate((56, 44))]
    layers = [{**where, "forwards": 1, "tokens": 100}]
    with trace_of(tmp_path, [layer_info(0, 2, 1)], load=load, layers=layers) as trace:
        (row,) = trace.query("capacity_sweep", lowest=1.1, points=1).rows()
    assert row["dropped_share"] == 0.01
    assert (row["choices"], row["source"], row["covered"]) == (100, "counts", 1.0)
