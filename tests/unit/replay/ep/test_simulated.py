"""A simulated group from end to end: its counts against SQL and plain loops, its files, its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.traces import layer_info, meta, segment, write_run

from moe_lens.errors import ReplayError
from moe_lens.queries.session import open_trace
from moe_lens.replay import results
from moe_lens.replay.ep import simulate
from moe_lens.replay.ep.all_to_all import PRESETS
from moe_lens.replay.ep.session import Replayed, replay_ep
from moe_lens.replay.ep.settings import Parallel
from moe_lens.replay.placement.formats import write_plan
from moe_lens.replay.placement.methods import place
from moe_lens.replay.placement.plan import to_json
from moe_lens.replay.policies import Policy
from moe_lens.replay.session import Progress
from moe_lens.replay.settings import Settings
from moe_lens.trace.meta import write_meta
from moe_lens.trace.schema import REPLAY_EP

SMALL: dict[str, Any] = {"hidden": 16, "intermediate": 16, "dtype": "float32", "repeats": 2}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", tokens=30, steps=4).path


def of(found: Replayed, placement: str) -> list[dict[str, Any]]:
    return [row for row in found.rows if row["placement"] == placement]


def test_loads_are_those_that_sql_counts(run: Path) -> None:
    found = replay_ep(run, Parallel(4, "lpt"), Settings(**SMALL))
    table = pq.read_table(found.path)
    assert table.schema.equals(REPLAY_EP.schema)
    assert found.path.parent == run / "replay_ep"
    assert results.about(found.path) == found.about
    with open_trace(run) as trace:
        counted = trace.sql(
            "with slots as (select layer, step, forward, token, unnest(expert_ids) as expert "
            "from routing) select layer, step, forward, expert // 2 as ep_rank, "
            "count(*) as rows, count(distinct token) as arrived, "
            "count(distinct expert) as touched from slots group by all"
        ).rows()
        asked = trace.query("replay_ranks", placement="contiguous").rows()
        in_view = trace.sql("select count(*) as n from replay_ep").rows()
    keys = ("layer", "step", "forward", "ep_rank")
    sql = {tuple(r[k] for k in keys): (r["rows"], r["arrived"], r["touched"]) for r in counted}
    got = {
        tuple(r[k] for k in keys): (r["rows"], r["arrived"], r["touched"])
        for r in of(found, "contiguous")
        if r["rows"]
    }
    assert got == sql
    assert in_view == [{"n": 2 * 4 * 2 * 4}]
    # The question and the summary say the same of the same rows.
    said = {(s["phase"], s["layer"]): s for s in found.by_layer() if s["placement"] == "contiguous"}
    assert len(asked) == len(said) == 4
    for row in asked:
        own = said[row["phase"], row["layer"]]
        assert row["max_over_mean_rows"] == pytest.approx(own["rows_max_over_mean"])
        assert row["max_over_mean_time"] == pytest.approx(own["time_max_over_mean"])
        assert row["waiting_share"] == pytest.approx(own["waiting_share"])
        assert row["layer_ms"] == pytest.approx(own["layer_ns"] / 1e6)
        assert row["share_p95"] is row["share_p99"] is None


def test_what_is_sent_is_what_a_plain_loop_sends(run: Path) -> None:
    with open_trace(run) as trace:
        rows: list[dict[str, Any]] = trace.sql(
            "select layer, step, token, expert_ids from routing"
        ).rows()
    for dedup in (True, False):
        parallel = Parallel(4, dedup=dedup, dispatch_dtype="fp8", all_to_all="b200")
        found = replay_ep(run, parallel, Settings(**SMALL))
        sent: Counter[tuple[int, ...]] = Counter()
        received: Counter[tuple[int, ...]] = Counter()
        for row in rows:
            source = row["token"] * 4 // 30
            where = [e // 2 for e in row["expert_ids"]]
            for rank in set(where) if dedup else where:
                if rank != source:
                    sent[row["layer"], row["step"], source] += 1
                    received[row["layer"], row["step"], rank] += 1
        for row in found.rows:
            key = row["layer"], row["step"], row["ep_rank"]
            assert (row["sent_rows"], row["received_rows"]) == (sent[key], received[key])
            assert row["sent_bytes"] == sent[key] * (16 + 4)
        first = [r for r in found.rows if (r["layer"], r["step"]) == (1, 2)]
        for name, size in (("dispatch_ns", 20), ("combine_ns", 64)):
            most = max(max(r["sent_rows"], r["received_rows"]) for r in first) * size
            for row in first:
                assert row[name] == pytest.approx(1e9 * most / PRESETS["b200"].bytes_per_s)


def test_times_are_of_the_parts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose time is the rows it computes: the slowest rank is the one with most rows."""
    made: list[tuple[int, float]] = []

    def call(layer: Any, x_TD: Any, ids: np.ndarray, weights: np.ndarray) -> Any:
        assert len(x_TD) == len(ids) == len(weights)
        assert ids.max() < layer.experts
        made.append((layer.experts, float((ids >= 0).sum())))
        return made[-1]

    def timed(works: Mapping[str, Any], repeats: int, device: object, **_: object) -> Any:
        return {name: [1e-9 * work[1]] * repeats for name, work in works.items()}

    monkeypatch.setattr(simulate, "call", call)
    monkeypatch.setattr(simulate, "interleaved", timed)
    found = replay_ep(run, Parallel(4, "eplb", 4), Settings(**SMALL))
    assert {experts for experts, _ in made} == {2, 3}
    for placement in ("eplb+4", "contiguous"):
        by_forward: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for row in of(found, placement):
            assert row["busy_ns"] == pytest.approx(row["rows"])
            by_forward.setdefault((row["layer"], row["step"]), []).append(row)
        for ranks in by_forward.values():
            assert sum(r["rows"] for r in ranks) == 60
            slowest = max(r["rows"] for r in ranks)
            assert [r["wait_ns"] for r in ranks] == pytest.approx(
                [slowest - r["rows"] for r in ranks]
            )
    for said in found.by_layer():
        assert said["time_max_over_mean"] == pytest.approx(said["rows_max_over_mean"])
        assert said["waiting_share"] == pytest.approx(1 - 1 / said["time_max_over_mean"])


def test_parts_that_are_alike_are_timed_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def timed(works: Mapping[str, Any], repeats: int, device: object, **_: object) -> Any:
        calls.append(len(works))
        return {name: [1.0] * repeats for name in works}

    monkeypatch.setattr(simulate, "interleaved", timed)
    rows = pq.read_table(run / "routing").to_pylist()
    # Every token chooses the first expert of each rank.
    alike = [{**r, "expert_ids": [0, 2, 4, 6], "weights": [0.25] * 4} for r in rows]
    segment(run, "routing", alike)
    replay_ep(run, Parallel(4), Settings(**{**SMALL, "layers": frozenset({0})}))
    assert calls == [2] * 4  # one part for four ranks, and the same once more for the noise


def test_forwards_of_many_ranks_are_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tokens=10, steps=3, ranks=(0, 1), world=2).path
    found = replay_ep(run, Parallel(2), Settings(**SMALL))
    assert {row["tokens"] for row in found.rows} == {20}
    assert {(r["layer"], r["step"]): 0 for r in found.rows}.keys() == {
        (layer, step) for layer in (0, 1) for step in range(3)
    }
    with open_trace(run) as trace:
        counted = trace.sql(
            "with s as (select layer, step, unnest(expert_ids) as e from routing) "
            "select layer, step, e // 4 as r, count(*) as n from s group by all"
        ).rows()
    want = {(c["layer"], c["step"], c["r"]): c["n"] for c in counted}
    assert {
        (r["layer"], r["step"], r["ep_rank"]): r["rows"] for r in found.rows if r["rows"]
    } == want


def test_tokens_start_where_they_were_recorded(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tokens=6, steps=1, ranks=(0, 1), world=2)
    mine = [r for r in run.rows["routing"] if r["rank"] == 0 and r["token"] < 2]
    steps = [{**r, "tokens": 2} for r in run.rows["steps"] if r["rank"] == 0]
    windows = [{**r, "tokens": 2} for r in run.rows["layers"] if r["rank"] == 0]
    for table, rows in (("routing", mine), ("steps", steps), ("layers", windows)):
        segment(run.path, table, rows)
    every = mine + [r for r in run.rows["routing"] if r["rank"] == 1]
    found = replay_ep(run.path, Parallel(2), Settings(**SMALL))
    for row in found.rows:
        own = [r for r in every if (r["layer"], r["rank"]) == (row["layer"], row["ep_rank"])]
        other = 1 - row["ep_rank"]
        assert row["sent_rows"] == sum(any(e // 4 == other for e in r["expert_ids"]) for r in own)
    # On four ranks they are dealt out: 8 tokens, 2 each.
    four = replay_ep(run.path, Parallel(4), Settings(**SMALL))
    assert max(r["sent_rows"] for r in four.rows) <= 2 * 2


def test_a_forward_that_a_rank_lacks_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tokens=10, steps=3, ranks=(0, 1), world=2)
    kept = [r for r in run.rows["routing"] if r["rank"] == 1 and r["step"] != 1]
    segment(run.path, "routing", kept, rank=1)
    found = replay_ep(run.path, Parallel(2), Settings(**SMALL))
    assert {row["step"] for row in found.rows} == {0, 2}
    assert found.about["forwards"].items() >= {"with_rows": 3, "left_out": 1, "replayed": 2}.items()
    every = replay_ep(run.path, Parallel(2), Settings(**{**SMALL, "partial": True}))
    assert {(r["step"], r["tokens"]) for r in every.rows} == {(0, 20), (1, 10), (2, 20)}
    segment(run.path, "routing", [r for r in kept if not r["step"]][:5], rank=1)
    with pytest.raises(
        ReplayError, match="of none of its 3 forwards with per-token rows has every"
    ):
        replay_ep(run.path, Parallel(2), Settings(**SMALL))


def test_forwards_in_which_ranks_have_nothing_to_do(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3, tokens=8)
    rows = run.rows["routing"]
    for row in rows:
        if row["step"] == 0:
            row["expert_ids"], row["weights"] = [], []
        elif row["step"] == 1:
            row["expert_ids"] = [0, 1]
    segment(run.path, "routing", rows)
    found = replay_ep(run.path, Parallel(4, "lpt"), Settings(**SMALL))
    for row in of(found, "contiguous"):
        if row["step"] == 0 or (row["step"] == 1 and row["ep_rank"]):
            assert row["rows"] == row["arrived"] == row["touched"] == row["busy_ns"] == 0
            assert row["received_rows"] == 0
        elif row["step"] == 1:
            assert (row["rows"], row["arrived"], row["touched"]) == (16, 8, 2)
            assert row["busy_ns"] > row["wait_ns"] == 0
    assert all(r["dispatch_ns"] == 0 for r in found.rows if r["step"] == 0)


def test_policies_are_applied_before_rows_are_spread(run: Path) -> None:
    drop = replay_ep(run, Parallel(4), Settings(**{**SMALL, "policy": Policy("drop", 0.5)}))
    assert max(r["rows"] for r in drop.rows) <= 2 * 4  # ceil(0.5 * 60 / 8) rows an expert
    one = replay_ep(run, Parallel(4), Settings(**{**SMALL, "policy": Policy(top_k=1)}))
    assert sum(r["rows"] for r in one.rows) == 30 * 2 * 4
    assert drop.path != one.path


def test_width_comes_from_the_trace_or_from_the_sizes_asked_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tokens=8, steps=1).path
    infos = [
        layer_info(n, hidden_size=24, intermediate_size=8, dispatch_width=10) for n in range(2)
    ]
    write_meta(run, meta(layers=infos))
    base: dict[str, Any] = {"dtype": "float32", "repeats": 2}
    own = replay_ep(run, Parallel(2), Settings(**base))
    assert {(s["dispatch"], s["combine"]) for s in own.about["shapes"]} == {(40, 40)}
    other = replay_ep(run, Parallel(2, dispatch_dtype="fp8"), Settings(**base, hidden=32))
    assert {(s["dispatch"], s["combine"]) for s in other.about["shapes"]} == {(36, 128)}


def test_a_plan_of_a_file(run: Path, tmp_path: Path) -> None:
    plan = place("contiguous", np.ones((2, 8)), (0, 1), ranks=2, replicas=2, nodes=2)
    path = tmp_path / "plan.json"
    write_plan(path, to_json(plan))
    found = replay_ep(run, Parallel(2, str(path)), Settings(**SMALL))
    assert list(dict.fromkeys(r["placement"] for r in found.rows)) == [
        "plan.json",
        "contiguous",
    ]
    assert found.about["placement"].items() >= {"nodes": 2, "replicas": 2, "fitted": False}.items()
    for ranks, layers, experts, says in (
        (4, (0, 1), 8, "is a plan for 2 ranks, not for 4"),
        (2, (0,), 8, "is of another model"),
        (2, (0, 1), 6, "is of another model: it has 6 experts"),
    ):
        other = place("contiguous", np.ones((len(layers), experts)), layers, ranks=2)
        write_plan(path, to_json(other))
        with pytest.raises(ReplayError, match=says):
            replay_ep(run, Parallel(ranks, str(path)), Settings(**SMALL))


@pytest.mark.parametrize(
    ("parallel", "changes", "says"),
    [
        (Parallel(3), {}, "8 slots .* do not lie on 3 ranks in equal numbers: take --replicas 1"),
        (Parallel(4, nodes=3), {}, "4 ranks do not lie on 3 nodes"),
        (Parallel(2, "best"), {}, "no way to place is called 'best'"),
        (Parallel(2, "gone.json"), {}, "gone.json cannot be read"),
        (Parallel(2, all_to_all="x"), {}, "no all-to-all is called 'x'"),
        (Parallel(2, nodes=2, all_to_all="h800-low-latency"), {}, "is of one node"),
        (Parallel(40, replicas=32), {}, "has 30 tokens, fewer than 40 ranks"),
        (Parallel(2), {"hidden": None}, "does not say how large an expert of layer 0"),
        (Parallel(2), {"phase": "decode"}, "no phase 'decode'"),
        (Parallel(2), {"hidden": 10**6, "intermediate": 10**6}, "Nothing was allocated"),
    ],
)
def test_refused(run: Path, parallel: Parallel, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ReplayError, match=says):
        replay_ep(run, parallel, Settings(**{**SMALL, **changes}))
    assert not (run / "replay_ep").exists()


def test_a_trace_without_rows_per_token(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", token_rows=False).path
    with pytest.raises(ReplayError, match="holds no per-token rows"):
        replay_ep(run, Parallel(2), Settings(**SMALL))


def test_a_name_and_another_place(run: Path, tmp_path: Path) -> None:
    settings = Settings(**{**SMALL, "forwards": 1})
    assert replay_ep(run, Parallel(2), settings, name="n").path == run / "replay_ep" / "n.parquet"
    out = tmp_path / "o.parquet"
    assert replay_ep(run, Parallel(2), settings, out=out).path == out
    with pytest.raises(ReplayError, match="both say where"):
        replay_ep(run, Parallel(2), settings, name="n", out=out)
    names = {
        replay_ep(run, parallel, settings).path.name
        for parallel in (
            Parallel(2),
            Parallel(4),
            Parallel(2, "eplb", 2),
            Parallel(2, dedup=False),
            Parallel(2, nodes=2),
            Parallel(2, dispatch_dtype="fp8"),
            Parallel(2, all_to_all="b200"),
        )
    }
    assert len(names) == 7


def test_time_runs_out(run: Path) -> None:
    found = replay_ep(run, Parallel(2), Settings(**SMALL, forwards=None, seconds=1e-6))
    assert {(r["step"], r["layer"]) for r in found.rows} == {(0, 0), (0, 1)}
    assert found.about["forwards"].items() >= {"chosen": 4, "replayed": 1}.items()


def test_ctrl_c_keeps_what_was_measured(run: Path) -> None:
    def stop(now: Progress) -> None:
        if now.done == 1:
            raise KeyboardInterrupt

    found = replay_ep(run, Parallel(2), Settings(**SMALL), name="n", on_progress=stop)
    assert found.interrupted
    assert found.path == run / "replay_ep" / "n-interrupted.parquet"
    assert results.about(found.path)["state"] == "interrupted"

    def at_once(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay_ep(run, Parallel(2), Settings(**SMALL), on_progress=at_once)


def row(placement: str, step: int, rank: int, rows: int, busy: float) -> dict[str, Any]:
    return {
        "placement": placement, "layer": 0, "step": step, "forward": 0, "phase": "eval",
        "ep_rank": rank, "ep_ranks": 2, "rows": rows, "touched": 1, "sent_rows": 1,
        "sent_bytes": 8, "received_bytes": 8, "busy_ns": busy, "wait_ns": 0.0, "noise_ns": 1.0,
        "dispatch_ns": 10.0 * (rank + 1), "combine_ns": 5.0,
    }  # fmt: skip


def said(rows: Sequence[dict[str, Any]], **changes: Any) -> str:
    from moe_lens.replay.ep.summary import answers

    about = {
        "placement": {"name": "eplb+2", "ranks": 2, "replicas": 2},
        "baseline": "contiguous", "mode": "simulated", "device": "cuda:0",
    }  # fmt: skip
    (text,) = answers(list(rows), about | changes)
    return text


def test_the_answer() -> None:
    good = [row("eplb+2", s, r, 50, 50.0) for s in range(4) for r in range(2)]
    bad = [row("contiguous", s, r, 75 - 50 * r, 75.0 - 50 * r) for s in range(4) for r in range(2)]
    # A layer takes 20 + 50 + 5 in place of 20 + 75 + 5.
    assert said(good + bad) == (
        "eval: 2 ranks, eplb with 2 replicas: the slowest rank takes 1.00 times the mean rank's "
        "time (contiguous: 1.50); a layer takes 25 % less time (4 forwards)."
    )
    few = [r for r in good + bad if r["step"] < 2]
    assert "a layer takes 0.75 times as long; too few to call it more or less" in said(few)
    noisy = [{**r, "noise_ns": 60.0} for r in good + bad]
    assert "a layer takes as long, within the noise of 42.4 %" in said(noisy)
    on_cpus = said(good + bad, mode="real", device="cpu")
    assert "the slowest rank computes 1.00 times the mean rank's rows (contiguous: 1.50)" in on_cpus
    assert "less time" not in on_cpus
    nothing = [{**r, "rows": 0, "busy_ns": 0.0} for r in good]
    assert "no expert computed anything" in said(nothing, baseline=None)
    alone = said([{**r, "wait_ns": 5.0} for r in good], baseline=None)
    assert alone.endswith("ranks wait 10.0 % of their time (4 forwards).")
