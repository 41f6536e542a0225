"""The questions over per-token rows, each against a plain loop over generated rows."""

from __future__ import annotations

import math
import tempfile
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.token_rows import EXPERTS, PHASES, STREAM_OF, TAGS, Knobs, World, decisions, generate
from support.traces import layer_info, meta

from moe_lens.queries.catalog import question
from moe_lens.queries.session import open_trace
from moe_lens.trace.meta import write_meta

Rows = list[dict[str, Any]]

relaxed = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
knobs = st.builds(
    Knobs,
    seed=st.integers(0, 2**32 - 1),
    forwards=st.integers(0, 3),
    tokens=st.integers(1, 6),
    token_ids=st.booleans(),
    losses=st.sampled_from(["none", "positions", "sequences", "both"]),
)
FILTERS = {
    "first_step": st.integers(0, 3),
    "last_step": st.integers(0, 3),
    "phase": st.sampled_from(PHASES),
    "tag": st.sampled_from(TAGS),
    "rank": st.integers(0, 1),
}
LAYERS = {"first_layer": st.integers(0, 3), "last_layer": st.integers(0, 3)}
layer, expert = st.integers(0, 3), st.integers(0, EXPERTS - 1)


def narrowed(**more: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the standard filters, by chance, and the parameters named here, always."""
    return st.fixed_dictionaries(more, optional={k: v for k, v in FILTERS.items() if k not in more})


def narrowed_layers(**more: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The same, for questions of all layers."""
    layers = st.fixed_dictionaries({}, optional=LAYERS)
    return st.builds(lambda a, b: a | b, narrowed(**more), layers)


def ask(world: World, name: str, parameters: dict[str, Any]) -> Rows:
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        world.save(folder)
        with open_trace(folder) as trace:
            rows = trace.query(name, **parameters).rows()
    assert {r.pop("run") for r in rows} <= {folder.name}
    return rows


def agree(got: Rows, expected: Rows) -> None:
    """The same rows in the same order, and floats within rounding."""
    assert [list(r) for r in got] == [list(r) for r in expected]
    for g, e in zip(got, expected, strict=True):
        assert {k: v for k, v in g.items() if not isinstance(v, float)} == {
            k: v for k, v in e.items() if not isinstance(v, float)
        }
        for key, value in e.items():
            if isinstance(value, float):
                assert g[key] == pytest.approx(value, rel=1e-9, abs=1e-12), (key, g, e)


def real(row: dict[str, Any]) -> list[int]:
    return [e for e in row["expert_ids"] if e < EXPERTS]


# ---- one expert ---------------------------------------------------------------------------------


@relaxed
@given(
    knobs=knobs,
    asked=narrowed(
        layer=layer,
        expert=expert,
        width=st.integers(1, 3),
        top=st.integers(1, 4),
        min_times=st.integers(0, 3),
    ),
)
def test_expert_serves(knobs: Knobs, asked: dict[str, Any]) -> None:
    world = generate(knobs)
    by_position, by_id = defaultdict(list), defaultdict(list)
    for d in decisions(world, asked):
        here = asked["expert"] in d["expert_ids"]
        by_position[d["position"] // asked["width"] * asked["width"]].append(here)
        if d["token_id"] is not None:
            by_id[d["token_id"]].append(here)

    def rows(kind: str, found: dict[int, list[bool]]) -> Rows:
        everything = [here for each in found.values() for here in each]
        overall = sum(everything) / len(everything) if everything else 0
        return [
            {"kind": kind, "value": value, "tokens": len(b), "chosen": sum(b),
             "share": sum(b) / len(b), "overall_share": overall,
             "lift": sum(b) / len(b) / overall if overall else None}
            for value, b in sorted(found.items())
        ]  # fmt: skip

    ids = rows("token id", by_id)
    enough = min(asked["min_times"], max((r["chosen"] for r in ids), default=0))
    ids = [r for r in ids if r["chosen"] >= max(1, enough)]
    ids.sort(key=lambda r: (-r["share"], -r["chosen"], r["value"]))
    expected = rows("position", by_position) + ids[: asked["top"]]
    agree(ask(world, "expert_serves", asked), expected)


@relaxed
@given(knobs=knobs, asked=narrowed(layer=layer, expert=expert, top=st.integers(1, 5)))
def test_expert_companions(knobs: Knobs, asked: dict[str, Any]) -> None:
    world = generate(knobs)
    here = decisions(world, asked)
    n = Counter(e for d in here for e in real(d))
    mine = asked["expert"]
    together = Counter(
        e for d in here if mine in d["expert_ids"] for e in real(d) if e != mine
    )  # fmt: skip
    expected = []
    for other, both in sorted(together.items(), key=lambda x: (-x[1], x[0])):
        chance = n[mine] * n[other] / len(here)
        expected.append(
            {"companion": other, "together": both, "share": both / n[mine], "expected": chance,
             "lift": both / chance}
        )  # fmt: skip
    agree(ask(world, "expert_companions", asked), expected[: asked["top"]])


# ---- one layer ----------------------------------------------------------------------------------


@relaxed
@given(knobs=knobs, asked=narrowed(layer=layer))
def test_co_activation(knobs: Knobs, asked: dict[str, Any]) -> None:
    world = generate(knobs)
    here = decisions(world, asked)
    n = Counter(e for d in here for e in real(d))
    expected = []
    for a in sorted(n):
        for b in sorted(n):
            if a != b:
                both = sum(a in d["expert_ids"] and b in d["expert_ids"] for d in here)
                chance = n[a] * n[b] / len(here)
                expected.append(
                    {"expert": a, "other": b, "together": both, "share": both / n[a],
                     "expected": chance, "lift": both / chance}
                )  # fmt: skip
    agree(ask(world, "co_activation", asked), expected)


@relaxed
@given(knobs=knobs, asked=narrowed(layer=layer, top=st.integers(0, 5)))
def test_layer_transitions(knobs: Knobs, asked: dict[str, Any]) -> None:
    world = generate(knobs)
    following = {**asked, "layer": asked["layer"] + 1}
    key = ("rank", "step", "forward", "token")
    went = {
        tuple(d[k] for k in key): first_choice(d)
        for d in decisions(world, following)
        if d["expert_ids"] and STREAM_OF[asked["layer"]] == d["stream"]
    }
    moves: Counter[tuple[int, int]] = Counter()
    for d in decisions(world, asked):
        which = tuple(d[k] for k in key)
        if d["expert_ids"] and which in went:
            moves[first_choice(d), went[which]] += 1
    left: Counter[int] = Counter()
    for (a, _), n in moves.items():
        left[a] += n
    expected = [
        {"expert": a, "next_expert": b, "tokens": n, "share": n / left[a]}
        for (a, b), n in sorted(moves.items(), key=lambda x: (-x[1], x[0]))
    ]
    agree(ask(world, "layer_transitions", asked), expected[: asked["top"] or None])


def first_choice(d: dict[str, Any]) -> int:
    best = max(range(len(d["weights"])), key=lambda slot: (d["weights"][slot], -slot))
    return int(d["expert_ids"][best])


# ---- all layers ---------------------------------------------------------------------------------


@relaxed
@given(knobs=knobs, asked=narrowed_layers())
def test_repetition(knobs: Knobs, asked: dict[str, Any]) -> None:
    world = generate(knobs)
    last = {}
    for t in sorted(valid_tokens(world, asked, set()), key=token):
        last[t["rank"], t["stream"], t["sequence"], t["position"]] = token(t)
    newest = {
        (d["layer"], d["rank"], d["sequence"], d["position"]): d
        for d in decisions(world, asked)
        if token(d) == last[d["rank"], d["stream"], d["sequence"], d["position"]]
    }
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for (la, rank, sequence, position), d in newest.items():
        before = newest.get((la, rank, sequence, position - 1))
        if before is not None:
            found[la].append((len(set(real(d)) & set(real(before))), len(real(d))))
    expected = []
    for la, pairs in sorted(found.items()):
        n = Counter(e for (of, *_), d in newest.items() if of == la for e in real(d))
        tokens = sum(of == la for of, *_ in newest)
        p = [x / tokens for x in n.values()]
        choices = sum(k for _, k in pairs)
        share = sum(x for x, _ in pairs) / choices if choices else None
        chance = sum(x * x for x in p) / sum(p) if p else None
        lift = share / chance if share is not None and chance is not None else None
        expected.append(
            {"layer": la, "pairs": len(pairs), "repeated_share": share, "chance": chance,
             "lift": lift}
        )  # fmt: skip
    agree(ask(world, "repetition", asked), expected)


@relaxed
@given(knobs=knobs, asked=narrowed_layers(width=st.integers(1, 3)))
def test_unserved_by_position(knobs: Knobs, asked: dict[str, Any]) -> None:
    world = generate(knobs)
    buckets = defaultdict(list)
    for d in decisions(world, asked):
        bucket = d["position"] // asked["width"] * asked["width"]
        buckets[d["layer"], bucket].append((len(d["expert_ids"]), len(d["slots"])))
    expected = []
    for (la, position), made in sorted(buckets.items()):
        choices, dropped = (sum(x) for x in zip(*made, strict=True))
        unserved = sum(k == lost for k, lost in made)
        expected.append(
            {"layer": la, "position": position, "tokens": len(made), "unserved": unserved,
             "unserved_rate": unserved / len(made), "dropped": dropped,
             "dropped_rate": dropped / choices if choices else None}
        )  # fmt: skip
    agree(ask(world, "unserved_by_position", asked), expected)


@relaxed
@given(knobs=knobs, asked=narrowed_layers())
def test_near_ties(knobs: Knobs, asked: dict[str, Any]) -> None:
    world = generate(knobs)
    margins = defaultdict(list)
    for d in decisions(world, asked):
        if d["margin"] is not None:
            margins[d["layer"]].append(d["margin"])
    edges = [0.0, *(10 ** (n / 2) for n in range(-15, 4)), math.inf]
    expected = []
    for la, found in sorted(margins.items()):
        for low, high in pairwise(edges):
            inside = sum(low <= m < high or m == high == math.inf for m in found)
            if inside:
                expected.append(
                    {"layer": la, "low": low, "high": None if high == math.inf else high,
                     "tokens": inside, "share": inside / len(found)}
                )  # fmt: skip
    agree(ask(world, "near_ties", asked), expected)


# ---- what became of tokens ----------------------------------------------------------------------


def outcomes(world: World) -> tuple[dict[Any, float], set[Any]]:
    """Losses by (rank, step, forward, sequence, position), and the rejected of these."""
    losses, rejected = {}, set()
    for o in world.visible("outcomes"):
        key = (o["rank"], o["step"], o["forward"], o["sequence"], o.get("position"))
        if o.get("loss") is not None:
            losses[key] = o["loss"]
        if o.get("kept") is False:
            rejected.add(key)
    return losses, rejected


def place(t: dict[str, Any]) -> tuple[int, ...]:
    return t["rank"], t["step"], t["forward"], t["sequence"], t["position"]


def token(t: dict[str, Any]) -> tuple[Any, ...]:
    return t["rank"], t["step"], t["forward"], t["stream"], t["token"]


def valid_tokens(world: World, asked: dict[str, Any], rejected: set[Any]) -> Rows:
    """Valid tokens within the filters, without rejected drafts."""
    phases = {(r["rank"], r["step"], r["forward"]): r["phase"] for r in world.visible("steps")}
    return [
        t
        for t in world.visible("tokens")
        if not t["padding"]
        and not (t["stream"] != "encoder" and place(t) in rejected)
        and asked.get("first_step", -1) <= t["step"] <= asked.get("last_step", 99)
        and all(asked.get(k, t[k]) == t[k] for k in ("tag", "rank", "sequence"))
        and asked.get("phase", p := phases[t["rank"], t["step"], t["forward"]]) == p
    ]


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


@relaxed
@given(knobs=knobs, asked=narrowed_layers())
def test_quality_of_dropped(knobs: Knobs, asked: dict[str, Any]) -> None:
    world = generate(knobs)
    losses, rejected = outcomes(world)
    hit = {token(d) for d in decisions(world, asked) if d["slots"]}
    groups = defaultdict(list)
    for t in valid_tokens(world, asked, rejected):
        if t["stream"] == "decoder" and place(t) in losses:
            groups[t["tag"], token(t) in hit].append(losses[place(t)])
    expected = []
    for (tag, dropped), found in sorted(groups.items()):
        n, middle = len(found), sum(found) / len(found)
        spread = math.sqrt(sum((x - middle) ** 2 for x in found) / (n - 1)) if n > 1 else None
        expected.append(
            {"tag": tag, "dropped": dropped, "tokens": n, "loss": middle,
             "loss_se": None if spread is None else spread / math.sqrt(n)}
        )  # fmt: skip
    agree(ask(world, "quality_of_dropped", asked), expected)


def requests(world: World, asked: dict[str, Any]) -> Rows:
    losses, rejected = outcomes(world)
    of: dict[tuple[int, int], Rows] = defaultdict(list)
    for t in valid_tokens(world, asked, rejected):
        of[t["rank"], t["sequence"]].append(t)
    made = defaultdict(list)
    for d in decisions(world, asked):
        if d["stream"] == "encoder" or place(d) not in rejected:
            made[d["rank"], d["sequence"]].append(d)
    out = []
    for (rank, sequence), tokens in of.items():
        seen = made[rank, sequence]
        said = [
            s for s in world.visible("sequences") if (s["rank"], s["sequence"]) == (rank, sequence)
        ]
        choices = sum(len(d["expert_ids"]) for d in seen)
        by_position = [
            losses[place(t)] for t in tokens if t["stream"] == "decoder" and place(t) in losses
        ]
        forwards = {(t["rank"], t["step"], t["forward"]) for t in tokens}
        whole = [
            x for (*where, s, p), x in losses.items()
            if p is None and s == sequence and tuple(where) in forwards
        ]  # fmt: skip
        out.append(
            {
                "rank": rank,
                "sequence": sequence,
                "request": max((s["request"] for s in said if s["request"]), default=None),
                "tag": max((s["tag"] for s in said), default=min(t["tag"] for t in tokens)),
                "first_step": min(t["step"] for t in tokens),
                "tokens": len(tokens),
                "experts_used": len({(d["layer"], e) for d in seen for e in real(d)}),
                "dropped_rate": sum(len(d["slots"]) for d in seen) / choices if choices else None,
                "unserved_rate": mean([len(d["slots"]) == len(d["expert_ids"]) for d in seen]),
                "loss": mean(by_position) if by_position else mean(whole),
            }
        )
    return out


@relaxed
@given(
    knobs=knobs,
    asked=narrowed_layers(
        top=st.integers(1, 5), order=st.sampled_from(["dropped", "loss", "tokens"])
    ),
)
def test_requests(knobs: Knobs, asked: dict[str, Any]) -> None:
    world = generate(knobs)
    by = {"dropped": "dropped_rate", "loss": "loss", "tokens": "tokens"}[asked["order"]]
    expected = sorted(
        requests(world, asked),
        key=lambda r: (r[by] is None, -(r[by] or 0), r["rank"], r["sequence"]),
    )
    agree(ask(world, "requests", asked), expected[: asked["top"]])


SEQUENCE = {"rank": st.integers(0, 1), "sequence": st.integers(0, 1)}


@relaxed
@given(knobs=knobs, asked=narrowed_layers(**SEQUENCE))
def test_request_load(knobs: Knobs, asked: dict[str, Any]) -> None:
    world = generate(knobs)
    _, rejected = outcomes(world)
    n: Counter[tuple[int, int]] = Counter()
    for d in decisions(world, asked):
        if d["sequence"] == asked["sequence"] and (
            d["stream"] == "encoder" or place(d) not in rejected
        ):
            n.update((d["layer"], e) for e in real(d))
    expected = [{"layer": la, "expert": e, "chosen": c} for (la, e), c in sorted(n.items())]
    agree(ask(world, "request_load", asked), expected)


@relaxed
@given(knobs=knobs, asked=narrowed_layers(**SEQUENCE))
def test_request_tokens(knobs: Knobs, asked: dict[str, Any]) -> None:
    world = generate(knobs)
    losses, rejected = outcomes(world)
    expected = []
    for d in sorted(
        decisions(world, asked), key=lambda d: (d["position"], d["layer"], d["step"], d["forward"])
    ):
        if d["sequence"] == asked["sequence"] and (
            d["stream"] == "encoder" or place(d) not in rejected
        ):
            loss = losses.get(place(d)) if d["stream"] == "decoder" else None
            columns = (
                "position",
                "token_id",
                "layer",
                "expert_ids",
                "dropped",
                "entropy",
                "margin",
            )
            expected.append({k: d[k] for k in columns} | {"loss": loss})
    agree(ask(world, "request_tokens", asked), expected)


# ---- traces without rows ------------------------------------------------------------------------

ROW_QUESTIONS = [
    "expert_serves", "expert_companions", "co_activation", "layer_transitions",
    "repetition", "unserved_by_position", "near_ties", "quality_of_dropped", "requests",
    "request_load", "request_tokens",
]  # fmt: skip


@pytest.mark.parametrize("name", ROW_QUESTIONS)
def test_a_trace_without_rows_has_no_answer_and_no_error(name: str, tmp_path: Path) -> None:
    write_meta(tmp_path, meta(layers=[layer_info(0, 1)]))
    with open_trace(tmp_path) as trace:
        assert trace.query(name).rows() == []


@pytest.mark.parametrize("name", ROW_QUESTIONS)
def test_a_layer_and_an_expert_that_are_not_there(name: str) -> None:
    world = generate(Knobs(1, 2, 4, token_ids=True, losses="both"))
    given = {p.name for p in question(name).parameters}
    absent = {"layer": 99, "expert": 99, "first_layer": 99, "sequence": 99}
    rows = ask(world, name, {k: v for k, v in absent.items() if k in given})
    if name in ("requests", "quality_of_dropped"):  # their tokens are there without any layer
        assert {r.get("experts_used", 0) for r in rows} == {0}
        assert not any(r.get("dropped") for r in rows)
    else:
        assert rows == []


@pytest.mark.parametrize("most", [1, 4, 1000, None])
def test_many_tokens_are_thinned_evenly(most: int | None) -> None:
    world = generate(Knobs(3, 3, 6, token_ids=False, losses="none"))
    rows = sum(r["layer"] == 2 for r in world.visible("routing"))
    every = 1 if most is None else -(-rows // most)
    n: Counter[int] = Counter()
    for d in decisions(world, {"layer": 2}):
        mixed = d["step"] * 7919 + d["forward"] * 104729 + d["token"] * 15485863
        if mixed % 2147483647 % every == 0:
            n.update(real(d))
    got = ask(world, "co_activation", {"layer": 2, "most": most})
    chosen = {r["expert"]: round(r["together"] / r["share"]) for r in got if r["together"]}
    assert {r["expert"] for r in got} == (set(n) if len(n) > 1 else set())
    assert chosen == {e: n[e] for e in chosen}
    assert chosen or most in (1, 4)
