"""Workloads are what a naive loop over the recorded rows says."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.traces import START_NS, Rows, layer_info, meta, segment, stream, write_run

from moe_lens.errors import ReplayError
from moe_lens.replay.choose import choose, coarse_first
from moe_lens.replay.index import Index, index_of
from moe_lens.replay.routing import Routed, read
from moe_lens.trace.meta import Attempt, LayerInfo, write_meta
from moe_lens.trace.reader import open_run


def everything(run: Path, *, partial: bool = False, chunk: int = 500_000, **narrow: Any):
    """Every workload of a run by (rank, layer, step, forward)."""
    index = index_of(open_run(run), **narrow)
    chosen = choose(index, None, partial=partial)
    layers = {layer for _, layer in index.infos}
    found = [r for each in read(index, layers, chosen.forwards, chunk=chunk) for r in each]
    return {(r.rank, r.layer, r.step, r.forward): r for r in found}, index, chosen


def naive(rows: Rows, experts: int) -> dict[tuple[int, ...], dict[str, Any]]:
    """The same, one token after the other."""
    out: dict[tuple[int, ...], dict[str, Any]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda r: r["token"]):
        at = out[row.get("rank", 0), row["layer"], row["step"], row["forward"]]
        ids = [e if e < experts else -1 for e in row["expert_ids"]]
        at["ids"].append(ids)
        at["weights"].append(row["weights"] or [1 / len(ids)] * len(ids))
        at["next"].append(row.get("next_ids"))
        at["dropped"].append([slot in (row.get("dropped") or []) for slot in range(len(ids))])
    return out


def same(found: dict[tuple[int, ...], Routed], expected: dict[tuple[int, ...], Any]) -> None:
    assert found.keys() == expected.keys()
    for key, routed in found.items():
        want, width = expected[key], routed.expert_ids_TK.shape[1]
        assert width == max(map(len, want["ids"]), default=0)
        for t, ids in enumerate(want["ids"]):
            pad = [-1] * (width - len(ids))
            assert routed.expert_ids_TK[t].tolist() == ids + pad
            assert routed.weights_TK[t].tolist() == pytest.approx(
                want["weights"][t] + [0.0] * len(pad)
            )
            assert routed.dropped_TK[t].tolist() == want["dropped"][t] + [False] * len(pad)
        assert routed.expert_ids_TK.dtype == np.int32
        assert routed.weights_TK.dtype == np.float32


@pytest.mark.parametrize("chunk", [1, 64, 500_000])
@pytest.mark.parametrize("open_tables", [(), ("routing", "tokens", "steps", "layers")])
def test_every_forward_of_every_rank(
    tmp_path: Path, chunk: int, open_tables: tuple[str, ...]
) -> None:
    written = write_run(
        tmp_path / "run", ranks=(0, 1), world=2, zero_experts=2, open_tables=open_tables
    )
    found, index, chosen = everything(written.path, chunk=chunk)
    same(found, naive(written.rows["routing"], 8))
    assert (index.forwards, index.padding) == (8, 0)
    assert (chosen.recorded, chosen.partial) == (8, 0)
    assert {r.phase for r in found.values()} == {"train", "eval"}
    assert any((r.expert_ids_TK < 0).any() for r in found.values())  # zero experts


def test_narrowed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run").path
    found, index, _ = everything(run, layers=frozenset({1}), phase="eval", steps=range(2, 4))
    assert set(found) == {(0, 1, 3, 0)}
    assert index.forwards == 1


def test_copies_of_another_rank_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ranks=(0, 1), world=2).path
    write_meta(run, meta(1, world=2, layers=[layer_info(i) for i in range(2)], counts="copy"))
    found, _, _ = everything(run)
    assert {rank for rank, *_ in found} == {0}


def run_of(
    path: Path,
    rows: Rows,
    *,
    infos: list[LayerInfo] | None = None,
    tokens: dict[tuple[int, int], int] | None = None,
    padding: Rows = (),
    **about: Any,
) -> Path:
    """A trace of these rows of routing, and of the counts that go with them."""
    infos = infos or [layer_info(0)]
    write_meta(path, meta(layers=infos, **about))
    pads = {(p["step"], p["forward"], p["token"]) for p in padding}
    valid: dict[tuple[int, int], set[int]] = defaultdict(set)
    for row in rows:
        if (row["step"], row["forward"], row["token"]) not in pads:
            valid[row["step"], row["forward"]].add(row["token"])
    counts = {key: len(found) for key, found in valid.items()} | (tokens or {})
    attempt = {(r["step"], r["forward"]): r.get("attempt", 0) for r in rows}
    at = [
        {"step": s, "forward": f, "window": s, "attempt": attempt.get((s, f), 0), "tokens": n}
        for (s, f), n in counts.items()
    ]
    segment(path, "steps", [{**x, "phase": "decode", "sampled": True} for x in at])
    windows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for x in at:
        windows[x["window"]].append(x)
    segment(
        path,
        "layers",
        [
            {
                **{k: found[0][k] for k in ("window", "step", "attempt")},
                "layer": info.layer,
                "tokens": sum(x["tokens"] for x in found),
                "forwards": len(found),
            }
            for found in windows.values()
            for info in infos
        ],
    )
    segment(path, "routing", list(rows))
    if padding:
        segment(path, "tokens", [{"stream": "main", **p, "padding": True} for p in padding])
    return path


def row(step: int, token: int, ids: list[int], forward: int = 0, **more: Any) -> dict[str, Any]:
    weights = more.pop("weights", [1 / 2] * len(ids))
    at = {"step": step, "forward": forward, "layer": more.pop("layer", 0), "token": token}
    return {**at, "expert_ids": ids, "weights": weights, **more}


def test_dynamic_k_missing_weights_runners_up_and_drops(tmp_path: Path) -> None:
    rows = [
        row(0, 0, [3, 1, 2], weights=[0.5, 0.3, 0.2], next_ids=[4], next_weights=[0.1]),
        row(0, 1, [7], weights=[], next_ids=[7], next_weights=[0.25]),
        row(0, 2, [5, 6], weights=[0.75, math.nan], dropped=[1]),
        row(0, 3, []),
    ]
    info = layer_info(0, top_k=None, router="dynamic-k")
    (routed,) = everything(run_of(tmp_path, rows, infos=[info]))[0].values()
    assert routed.expert_ids_TK.tolist() == [[3, 1, 2], [7, -1, -1], [5, 6, -1], [-1, -1, -1]]
    assert routed.weights_TK == pytest.approx(
        np.array([[0.5, 0.3, 0.2], [1, 0, 0], [0.5, 0.5, 0], [0, 0, 0]])
    )
    assert routed.unweighted == 2
    assert routed.dropped_TK.tolist() == [
        [False] * 3,
        [False] * 3,
        [False, True, False],
        [False] * 3,
    ]
    # The second token's runner-up is its own expert (rerouted when recorded): none is left.
    assert routed.next_ids_TM is not None
    assert routed.next_weights_TM is not None
    assert routed.next_ids_TM.tolist() == [[4], [-1], [-1], [-1]]
    assert routed.next_weights_TM[0, 0] == pytest.approx(0.1)


def test_a_later_attempt_supersedes_its_steps(tmp_path: Path) -> None:
    attempts = [
        Attempt(0, START_NS, first_step=0, end="failed"),
        Attempt(1, START_NS, first_step=1, end="closed"),
    ]
    rows = [
        row(0, 0, [0, 1]),
        row(1, 0, [2, 3]),
        row(1, 0, [4, 5], attempt=1),
        row(2, 0, [6, 7], attempt=1),
    ]
    run = run_of(tmp_path, rows, attempts=attempts)
    segment(
        run,
        "steps",
        [
            {"step": s, "window": s, "attempt": a, "phase": "decode", "tokens": 1, "sampled": True}
            for s, a in ((0, 0), (1, 0), (1, 1), (2, 1))
        ],
    )
    found, index, _ = everything(run)
    by_step = [found[key].expert_ids_TK.tolist() for key in sorted(found)]
    assert by_step == [[[0, 1]], [[4, 5]], [[6, 7]]]
    assert index.forwards == 3


def test_padding_is_not_replayed(tmp_path: Path) -> None:
    rows = [row(0, t, [t, t + 1], layer=n) for n in (0, 1) for t in range(4)]
    padding = [{"step": 0, "forward": 0, "token": t} for t in (1, 3)]
    infos = [layer_info(0), layer_info(1)]
    found, index, chosen = everything(run_of(tmp_path, rows, infos=infos, padding=padding))
    assert [r.expert_ids_TK.tolist() for r in found.values()] == [[[0, 1], [2, 3]]] * 2
    assert index.padding == 4
    assert chosen.partial == 0


def test_only_whole_forwards_unless_asked(tmp_path: Path) -> None:
    rows = [row(s, t, [0, 1]) for s in range(3) for t in range(4)]
    run = run_of(tmp_path, rows, tokens={(1, 0): 9})
    found, _, chosen = everything(run)
    assert {step for _, _, step, _ in found} == {0, 2}
    assert (chosen.recorded, chosen.partial) == (3, 1)
    found, _, chosen = everything(run, partial=True)
    assert {step for _, _, step, _ in found} == {0, 1, 2}
    assert chosen.used_partial
    torn = run_of(tmp_path / "torn", rows, tokens={(s, 0): 9 for s in range(3)})
    with pytest.raises(ReplayError, match=r"none of the 3 .* 4 of 9.*tokens=1.0.*--partial"):
        everything(torn)


def test_forwards_that_share_a_window_are_judged_one_by_one(tmp_path: Path) -> None:
    rows = [row(0, t, [0, 1], forward=f) for f in range(3) for t in range(2)]
    run = run_of(tmp_path / "a", rows, tokens={(0, 1): 5})
    assert {forward for *_, forward in everything(run)[0]} == {0, 2}
    # A layer of another stream has other tokens than the forward's: its window must add up.
    info = layer_info(0, stream="encoder")
    other = run_of(tmp_path / "b", rows, infos=[info])
    segment(
        other,
        "steps",
        [{"step": 0, "forward": f, "phase": "decode", "tokens": 7} for f in range(3)],
    )
    assert len(everything(other)[0]) == 3


def test_a_forward_that_skips_a_layer(tmp_path: Path) -> None:
    rows = [row(0, 0, [0, 1]), row(0, 0, [2, 3], layer=1), row(1, 0, [4, 5], layer=1)]
    found, _, _ = everything(run_of(tmp_path, rows, infos=[layer_info(0), layer_info(1)]))
    assert set(found) == {(0, 0, 0, 0), (0, 1, 0, 0), (0, 1, 1, 0)}


def test_a_row_in_the_open_stream_only(tmp_path: Path) -> None:
    run = run_of(tmp_path, [row(0, 0, [0, 1])], tokens={(1, 0): 1})
    stream(run, "routing", [row(1, 0, [2, 3])], seq=1)
    assert len(everything(run)[0]) == 2


def test_refused(tmp_path: Path) -> None:
    counts_only = write_run(tmp_path / "counts", token_rows=False, sampling="none").path
    with pytest.raises(ReplayError, match=r"no per-token rows \(sampling: none\).*tokens=1.0"):
        index_of(open_run(counts_only))
    run = write_run(tmp_path / "run").path
    with pytest.raises(ReplayError, match="no layer 5: its layers are 0-1"):
        index_of(open_run(run), layers=frozenset({5}))
    with pytest.raises(ReplayError, match="no phase 'decode': its phases are eval, train"):
        index_of(open_run(run), phase="decode")
    with pytest.raises(ReplayError, match="no steps 90 to 99: its steps are 0 to"):
        index_of(open_run(run), steps=range(90, 100))
    infos = [layer_info(0), layer_info(1, router="expert-choice", top_k=None)]
    write_meta(run, meta(layers=infos))
    with pytest.raises(ReplayError, match=r"layer 1 choose their tokens.*--layers 0 replays"):
        index_of(open_run(run))
    assert isinstance(index_of(open_run(run), layers=frozenset({0})), Index)


def test_chosen_forwards_are_spread_over_the_run(tmp_path: Path) -> None:
    index = index_of(open_run(write_run(tmp_path / "run", steps=40, tokens=2).path))
    chosen = choose(index, 4).forwards
    assert sorted(f.step for f in chosen if f.phase == "train") == [4, 14, 24, 34]
    assert sorted(f.step for f in chosen if f.phase == "eval") == [5, 15, 25, 35]
    assert {f.phase for f in chosen[:2]} == {"train", "eval"}
    every = choose(index, None).forwards
    assert [f.step for f in every[:8]] == [0, 1, 32, 33, 16, 17, 8, 9]
    assert sorted(f.step for f in every) == list(range(40))
    assert len(choose(index, 100).forwards) == 40


def test_every_beginning_is_spread() -> None:
    assert coarse_first(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert coarse_first(1) == [0]
    for n in range(1, 40):
        assert sorted(coarse_first(n)) == list(range(n))
