"""`moe_lens.diff` against a plain loop over the rows that were written, and what it refuses."""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from support.traces import Rows, layer_info, meta, segment, write_run

import moe_lens
from moe_lens import TraceError
from moe_lens.trace.meta import write_meta

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def text_of(rng: random.Random) -> Rows:
    """Tokens of two ranks, two forwards each, two sequences a forward, some of them padding."""
    return [
        {
            "rank": rank, "step": step, "forward": 0, "stream": "main", "token": t,
            "sequence": 2 * step + t // 6, "position": t % 6, "padding": rng.random() < 0.2,
            "token_id": rng.randrange(50),
        }
        for rank in range(2)
        for step in range(2)
        for t in range(12)
    ]  # fmt: skip


def routing_of(rng: random.Random, tokens: Rows, like: Rows | None = None) -> Rows:
    """Choices for the tokens; with `like`, mostly those, with other weights and some flips."""
    made = []
    for i, t in enumerate(tokens):
        for layer in range(LAYERS):
            chosen = rng.sample(range(EXPERTS), TOP_K)
            if like is not None and rng.random() < 0.7:
                chosen = list(like[i * LAYERS + layer]["expert_ids"])
                rng.shuffle(chosen)
            made.append(
                {
                    **{k: t[k] for k in ("rank", "step", "forward", "token")},
                    "layer": layer,
                    "expert_ids": chosen,
                    "weights": [rng.random() for _ in chosen],
                    "margin": None if layer == 2 else rng.random(),
                }
            )
    return made


def write(path: Path, tokens: Rows, routing: Rows, sequences: Rows = (), **changes: Any) -> Path:
    """A run of two ranks with these rows; steps from 1 on decode."""
    layers = [layer_info(i, EXPERTS, TOP_K) for i in range(LAYERS)]
    for rank in range(2):
        write_meta(path, meta(rank, world=2, layers=layers, weights="exact", **changes))
        steps = [
            {"rank": rank, "step": step, "phase": "decode" if step else "prefill"}
            for step in sorted({t["step"] for t in tokens})
        ]
        tables = {"tokens": tokens, "routing": routing, "sequences": sequences, "steps": steps}
        for table, rows in tables.items():
            mine = [{k: v for k, v in r.items() if k != "rank"} for r in rows if r["rank"] == rank]
            segment(path, table, mine, rank=rank)
    return path


def naive(tokens_a: Rows, a: Rows, tokens_b: Rows, b: Rows, place: Any) -> dict[str, Any]:
    """The comparison, one token and layer at a time."""

    def by_place(tokens: Rows, routing: Rows) -> dict[Any, Any]:
        where = {
            (t["rank"], t["step"], t["forward"], t["token"]): place(t)
            for t in sorted(tokens, key=lambda t: (t["step"], t["forward"], t["token"]))
            if not t["padding"]
        }
        newest = {p: key for key, p in where.items()}  # the last one of a place
        at = {(r["rank"], r["step"], r["forward"], r["token"], r["layer"]): r for r in routing}
        return {
            (p, layer): at[(*key, layer)] for p, key in newest.items() for layer in range(LAYERS)
        }

    mine, other = by_place(tokens_a, a), by_place(tokens_b, b)
    assert mine.keys() == other.keys()
    layers: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    first: dict[Any, int] = {}
    for (p, layer), ra in sorted(mine.items(), key=lambda item: item[0][1]):
        rb, found = other[p, layer], layers[layer]
        wa = dict(zip(ra["expert_ids"], ra["weights"], strict=True))
        wb = dict(zip(rb["expert_ids"], rb["weights"], strict=True))
        flipped = set(wa) != set(wb)
        found["flip"].append(flipped)
        found["top1"].append(max(wa, key=wa.__getitem__) != max(wb, key=wb.__getitem__))
        found["overlap"].append(len(set(wa) & set(wb)) / TOP_K)
        found["diff"] += [abs(wa[e] - wb[e]) for e in set(wa) & set(wb)]
        if ra["margin"] is not None:
            found["margin"].append(ra["margin"])
            found["at_flips"] += [ra["margin"]] if flipped else []
        if flipped:
            first.setdefault(p, layer)
    return {"layers": layers, "first": first}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("by", ["token", "position"])
def test_equals_a_naive_loop(seed: int, by: str, tmp_path: Path) -> None:
    rng = random.Random(seed)
    tokens = text_of(rng)
    a = routing_of(rng, tokens)
    b = routing_of(rng, tokens, a)
    write(tmp_path / "a", tokens, a)
    write(tmp_path / "b", tokens, b)
    found = moe_lens.diff(tmp_path / "a", tmp_path / "b", by=by, flips=1000)
    keys = ("rank", "step", "token") if by == "token" else ("rank", "sequence", "position")
    expected = naive(tokens, a, tokens, b, lambda t: tuple(t[k] for k in keys))
    compare(found, expected)
    assert found.tokens == sum(not t["padding"] for t in tokens)
    places = [tuple(r) for r in found.flips[["rank", "sequence", "position", "layer"]].to_numpy()]
    assert places == sorted(places)
    flips = sum(sum(x["flip"]) for x in expected["layers"].values())
    assert len(places) == len(set(places)) == flips
    for row in found.flips.itertuples():
        assert set(row.ids_a) != set(row.ids_b)
    assert not found.rounded


@pytest.mark.parametrize(
    ("narrowed", "steps"),
    [({"phase": "decode"}, {1}), ({"first_step": 1}, {1}), ({"last_step": 0}, {0}), ({}, {0, 1})],
)
def test_a_part_of_the_steps_is_compared(narrowed: dict[str, Any], steps: set[int], tmp_path: Path):
    rng = random.Random(3)
    tokens = text_of(rng)
    a = routing_of(rng, tokens)
    b = routing_of(rng, tokens, a)
    some = [t for t in tokens if t["step"] in steps]
    expected = naive(some, a, some, b, lambda t: (t["rank"], t["step"], t["token"]))
    write(tmp_path / "a", tokens, a)
    write(tmp_path / "b", tokens, b)
    with moe_lens.open([tmp_path / "a", tmp_path / "b"]) as trace:
        asked = {"a": "a", "b": "b", **narrowed}
        layers = trace.query("diff_layers", **asked).df()
        (row,) = trace.query("diff_tokens", **asked).rows()
        flips = trace.query("diff_flips", **asked, top=1000).df()
    assert layers.flips.tolist() == [sum(expected["layers"][i]["flip"]) for i in range(LAYERS)]
    assert row["both"] == row["tokens_a"] == sum(not t["padding"] for t in some)
    assert set(flips.step) <= steps
    assert len(flips) == layers.flips.sum()
    if set(narrowed) <= {"phase"}:
        found = moe_lens.diff(tmp_path / "a", tmp_path / "b", **narrowed)
        compare(found, expected)
        with pytest.raises(TraceError, match="a holds no per-token rows of phase 'evil'"):
            moe_lens.diff(tmp_path / "a", tmp_path / "b", phase="evil")


def compare(found: moe_lens.Difference, expected: dict[str, Any]) -> None:
    total = [x for of in expected["layers"].values() for x in of["flip"]]
    assert found.flip_rate == pytest.approx(statistics.mean(total))
    overlaps = [x for of in expected["layers"].values() for x in of["overlap"]]
    assert found.overlap == pytest.approx(statistics.mean(overlaps))
    assert found.diverged_tokens == len(expected["first"])
    for row in found.layers.itertuples():
        of = expected["layers"][row.layer]
        assert row.tokens == len(of["flip"])
        assert row.flips == sum(of["flip"])
        assert row.flip_rate == pytest.approx(statistics.mean(of["flip"]))
        assert row.top1_flip_rate == pytest.approx(statistics.mean(of["top1"]))
        assert row.overlap == pytest.approx(statistics.mean(of["overlap"]))
        assert row.weight_diff_mean == pytest.approx(statistics.mean(of["diff"]), rel=1e-5)
        assert row.weight_diff_max == pytest.approx(max(of["diff"]), rel=1e-5)
        assert row.first_flips == sum(at == row.layer for at in expected["first"].values())
        for got, margins in ((row.margin, of["margin"]), (row.margin_at_flips, of["at_flips"])):
            if margins:
                assert got == pytest.approx(statistics.median(margins), rel=1e-5)
            else:
                assert got != got  # a router without a margin has none here


def test_runs_cut_into_other_forwards_align_by_position(tmp_path: Path) -> None:
    """One run decodes token by token, re-decides some, with its sequences in another order."""
    rng = random.Random(5)
    tokens = [t for t in text_of(rng) if not t["padding"]]
    names = {(t["rank"], t["sequence"]): f"r{t['rank']}s{t['sequence']}" for t in tokens}
    a = routing_of(rng, tokens)
    decoded, b = [], []
    for i, t in enumerate(tokens):
        row = {**t, "step": 100 + t["position"], "token": 40 - t["sequence"]}
        row["sequence"] = 50 - t["sequence"]
        again = {**row, "step": 300, "token": i} if rng.random() < 0.3 else None
        for made in (row, again):
            if made is not None:
                decoded.append(made)
                b += [
                    {**r, "step": made["step"], "token": made["token"]}
                    for r in routing_of(rng, [t], a[i * LAYERS : (i + 1) * LAYERS])
                ]
    one = [{"rank": r, "sequence": s, "request": name} for (r, s), name in names.items()]
    two = [{**x, "sequence": 50 - x["sequence"]} for x in one]
    write(tmp_path / "a", tokens, a, one)
    write(tmp_path / "b", decoded, b, two)
    says = r"alone.*and.*alone.*0 in both.*--by position, in Python by=\"position\""
    with pytest.raises(TraceError, match=says):
        moe_lens.diff(tmp_path / "a", tmp_path / "b")
    found = moe_lens.diff(tmp_path / "a", tmp_path / "b", by="position")
    back = {"r": 50}
    expected = naive(
        tokens, a, decoded, b,
        lambda t: (t["rank"], t["sequence"] if t["step"] < 100 else back["r"] - t["sequence"],
                   t["position"]),
    )  # fmt: skip
    compare(found, expected)
    assert found.flips.iloc[0]["request"] in names.values()


def test_rejected_drafts_are_no_part_of_a_text(tmp_path: Path) -> None:
    rng = random.Random(1)
    tokens = [t for t in text_of(rng) if not t["padding"]]
    a = routing_of(rng, tokens)
    write(tmp_path / "a", tokens, a)
    # b drafted one token more in each sequence of rank 0, and did not keep it
    drafts = [
        {**t, "step": 9, "token": i, "position": 6}
        for i, t in enumerate(tokens)
        if t["rank"] == 0 and t["position"] == max(
            u["position"] for u in tokens
            if (u["rank"], u["sequence"]) == (0, t["sequence"])
        )
    ]  # fmt: skip
    assert drafts
    b = a + routing_of(rng, drafts)
    write(tmp_path / "b", tokens + drafts, b)
    for by in ("token", "position"):
        with pytest.raises(TraceError, match=f"{len(drafts)} tokens are in b alone"):
            moe_lens.diff(tmp_path / "a", tmp_path / "b", by=by)
    rejected = [
        {**{k: t[k] for k in ("step", "forward", "sequence", "position")}, "kept": False}
        for t in drafts
    ]
    segment(tmp_path / "b", "outcomes", rejected)
    for by in ("token", "position"):
        found = moe_lens.diff(tmp_path / "a", tmp_path / "b", by=by)
        assert (found.flip_rate, found.overlap) == (0, 1)
        assert found.diverged_tokens == len(found.flips) == 0


# -- what is refused -----------------------------------------------------------------------------


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", tokens=20)
    write_run(tmp_path / "b", tokens=23)
    with pytest.raises(TraceError, match=r"12 tokens are in b alone .as rank 0, step \d"):
        moe_lens.diff(tmp_path / "a", tmp_path / "b")
    write_run(tmp_path / "c", tokens=20, token_rows=False, sampling="none")
    with pytest.raises(TraceError, match=r"c holds no per-token rows \(sampling: none\)"):
        moe_lens.diff(tmp_path / "a", tmp_path / "c")
    with pytest.raises(TraceError, match="compared with itself"):
        moe_lens.diff(tmp_path / "a", tmp_path / "a")
    with pytest.raises(TraceError, match="does not exist"):
        moe_lens.diff(tmp_path / "a", tmp_path / "d")


def test_other_models_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", layers=3)
    with pytest.raises(TraceError, match="a has 2 MoE layers, b 3"):
        moe_lens.diff(tmp_path / "a", tmp_path / "b")
    write_run(tmp_path / "c", experts=16)
    with pytest.raises(TraceError, match="layer 0 has experts 8 in a, 16 in c"):
        moe_lens.diff(tmp_path / "a", tmp_path / "c")


def test_other_texts_and_lost_rows_are_refused(tmp_path: Path) -> None:
    rng = random.Random(0)
    tokens = [t for t in text_of(rng) if not t["padding"]]
    a = routing_of(rng, tokens)
    write(tmp_path / "a", tokens, a)
    write(tmp_path / "b", [{**tokens[0], "token_id": 77}, *tokens[1:]], a)
    with pytest.raises(TraceError, match="other texts: 1 of"):
        moe_lens.diff(tmp_path / "a", tmp_path / "b")
    write(tmp_path / "c", [{**t, "token_id": None} for t in tokens], a[1:])
    with pytest.raises(TraceError, match="layer 0: 1 tokens have a decision in one of"):
        moe_lens.diff(tmp_path / "a", tmp_path / "c")


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='by=\'step\' must be "token" or "position"'):
        moe_lens.diff(tmp_path, tmp_path / "b", by="step")
    with pytest.raises(ValueError, match="flips=-1"):
        moe_lens.diff(tmp_path, tmp_path / "b", flips=-1)


def test_weights_that_were_rounded_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", weights="exact")
    assert moe_lens.diff(tmp_path / "a", tmp_path / "b").rounded
