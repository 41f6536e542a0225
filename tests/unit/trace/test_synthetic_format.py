"""A synthetic trace is a trace: its rows agree with each other, with the logits, with `counts`."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tables import read

import moe_lens
from moe_lens.errors import TraceError, TraceWriteError
from moe_lens.trace import layout
from moe_lens.trace.events import Forward
from moe_lens.trace.invariants import check
from moe_lens.trace.lock import RankLock
from moe_lens.trace.meta import read_meta
from moe_lens.trace.synthetic import (
    Burst,
    Committee,
    Dead,
    Drift,
    Hot,
    Pair,
    Spec,
    Specialist,
    counts,
    events,
    everything,
    generate,
    run,
)
from moe_lens.trace.synthetic.forwards import forward
from moe_lens.trace.synthetic.router import Routers, numbered, settle, top
from moe_lens.trace.synthetic.schedule import Sequences, moments

Rows = list[dict[str, Any]]

PLANTED = (
    Hot(0, share=0.6),
    Dead(1),
    Pair(2, 3, together=0.8, share=0.3),
    Committee((4, 5), share=0.25, layers=(1,)),
    Specialist(7, "prose", lift=2.0, share=0.3),
)
SPECS = {
    "bare": Spec(),
    "planted": Spec(experts=24, top_k=6, planted=PLANTED, popularity="zipf", domain_strength=1.0),
    "dropping": Spec(capacity_factor=1.0, popularity="zipf"),
    "drops all": Spec(capacity_factor=0.1, planted=(Hot(0, 0.99),), top_k=1, experts=3),
    "serving": Spec(phases=("serve",), decode=5, steps=3, burst=Burst(0.7)),
    "mixed": Spec(phases=("train", "eval", "serve"), decode=3, steps=6, forwards=2, losses=True),
    "lookup": Spec(context_independence=1.0, planted=(Dead(0),)),
    "all chosen": Spec(experts=4, top_k=4, capacity_factor=0.5),
    "one expert": Spec(experts=1, top_k=1, layers=1),
    "odd number": Spec(experts=37, top_k=5, ranks=2, drift=Drift((3,)), popularity="lognormal"),
    "counts alone": Spec(rows=False, ranks=2),
    "groups": Spec(experts=12, top_k=3, groups=4),
}


def made(spec: Spec, *, index: int = 0) -> Forward:
    """One forward as the writer gets it."""
    moment = moments(spec)[index]
    return forward(Routers(spec), Sequences(spec).batch(0, moment.batch), moment, 0)


def rows(path: Path, table: str) -> Rows:
    found: Rows = read(path, table).to_pylist()
    return found


@pytest.mark.parametrize("name", SPECS)
def test_nothing_is_wrong_with_it(tmp_path: Path, name: str) -> None:
    spec = SPECS[name]
    truth = generate(tmp_path / "run", spec)
    with moe_lens.open(tmp_path / "run") as trace:
        info = trace.info()
        assert "closed" in repr(info)
        (seen,) = trace.sql(
            "select count(*) n, sum(breaches) breaches, sum(lost_rows) lost, "
            "sum(fires_expected - fires_seen) unseen from steps"
        ).rows()
        (routed,) = trace.sql("select sum(routed) n from load").rows()
    forwards = spec.ranks * len(truth.moments)
    assert seen == {"n": forwards, "breaches": 0, "lost": 0, "unseen": 0}
    assert routed["n"] == truth.counts_FLE.sum()
    assert (counts(spec) == truth.counts_FLE).all()


@pytest.mark.parametrize("name", SPECS)
def test_rows_are_of_the_logits_that_decide(name: str) -> None:
    spec = SPECS[name]
    whole = made(replace(spec, rows=True, logits=True), index=min(2, len(moments(spec)) - 1))
    assert check(whole) == []
    for layer in whole.layers:
        r = layer.rows
        assert r is not None
        assert r.logits_NE is not None
        assert r.entropy_N is not None
        k, e = spec.top_k, spec.experts
        for t in range(0, len(r), 37):
            z = [float(v) for v in r.logits_NE[t]]
            order = sorted(range(e), key=lambda i: -z[i])
            assert r.expert_ids_NK[t].tolist() == order[:k]
            total = sum(math.exp(v - max(z)) for v in z)
            p = [math.exp(v - max(z)) / total for v in z]
            chosen = sum(p[i] for i in order[:k])
            assert r.weights_NK[t] == pytest.approx([p[i] / chosen for i in order[:k]], rel=1e-3)
            entropy = -sum(x * math.log(x) for x in p if x > 0)
            assert r.entropy_N[t] == pytest.approx(entropy, abs=1e-3)
            if spec.groups is None:
                assert r.group_entropy_N is None
            else:
                of = e // spec.groups
                sums = [sum(p[i : i + of]) for i in range(0, e, of)]
                of_group = -sum(x * math.log(x) for x in sums)
                assert r.group_entropy_N is not None
                assert r.group_entropy_N[t] == pytest.approx(of_group, abs=1e-3)
            if k == e:
                assert r.next_ids_NM is None and r.margin_N is None  # noqa: PT018
                continue
            assert r.next_ids_NM is not None
            assert r.next_weights_NM is not None
            assert r.margin_N is not None
            assert r.next_ids_NM[t].tolist() == [order[k]]
            assert r.next_weights_NM[t] == pytest.approx([p[order[k]] / chosen], rel=1e-3)
            assert r.margin_N[t] == pytest.approx(z[order[k - 1]] - z[order[k]], abs=1e-4)


@given(
    experts=st.integers(1, 40),
    top_k=st.integers(1, 40),
    sequences=st.integers(1, 5),
    length=st.integers(1, 9),
    independence=st.sampled_from([0.0, 0.3, 1.0]),
    popularity=st.sampled_from(["uniform", "zipf", "lognormal"]),
    skew=st.floats(0, 4),
    factor=st.none() | st.floats(0.05, 3),
    phase=st.sampled_from(["train", "serve"]),
    ranks=st.integers(1, 2),
    hot=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_every_forward_keeps_the_invariants(
    experts: int,
    top_k: int,
    sequences: int,
    length: int,
    independence: float,
    popularity: str,
    skew: float,
    factor: float | None,
    phase: str,
    ranks: int,
    hot: bool,
    seed: int,
) -> None:
    top_k = min(top_k, experts)
    spec = Spec(
        experts=experts,
        top_k=top_k,
        sequences=sequences,
        length=length,
        context_independence=independence,
        popularity=popularity,
        skew=skew,
        capacity_factor=factor,
        phases=(phase,),
        decode=2,
        steps=2,
        ranks=ranks,
        planted=(Hot(0, 0.5),) if hot and top_k < experts and independence < 1 else (),
        seed=seed,
    )
    counts_FLE = counts(spec, rank=0)
    drawn, routers = Sequences(spec), Routers(spec)
    for moment in moments(spec):
        whole = forward(routers, drawn.batch(0, moment.batch), moment, 0)
        assert check(whole) == []
        routed_LE = np.stack([layer.routed_GE.sum(0) for layer in whole.layers])
        assert (routed_LE == counts_FLE[moment.index]).all()


def test_coins_deal_out_the_same_logits() -> None:
    g = np.random.default_rng(3)
    logits_TE = numbered(g.normal(0, 2, (500, 24)).astype(np.float32))
    forced_TE = numbered(logits_TE + g.choice(np.array([-1000, 0, 1000], np.float32), (500, 24)))
    settled_TE, best_TN, ids_TN = settle(logits_TE, forced_TE, 6)
    assert (np.sort(settled_TE) == np.sort(logits_TE)).all()
    assert (np.sort(ids_TN[:, :6]) == np.sort(top(forced_TE, 6)[1])).all()
    assert (np.take_along_axis(settled_TE, ids_TN, 1) == best_TN).all()
    assert (best_TN == -np.sort(-settled_TE)[:, :7]).all()
    unmoved_TE = settled_TE == logits_TE
    natural = {(t, e) for t, row in enumerate(top(logits_TE, 6)[1].tolist()) for e in row}
    chosen = {(t, e) for t, row in enumerate(ids_TN[:, :6].tolist()) for e in row}
    assert {(int(t), int(e)) for t, e in np.argwhere(~unmoved_TE)} == natural ^ chosen


def test_counts_and_sums_are_of_the_rows(tmp_path: Path) -> None:
    spec = replace(SPECS["planted"], capacity_factor=1.1)
    truth = generate(tmp_path / "run", spec)
    tag = {(r["step"], r["token"]): r["tag"] for r in rows(tmp_path / "run", "tokens")}
    routed, dropped = Counter[Any](), Counter[Any]()
    weight, entropy, margin = (defaultdict[Any, float](float) for _ in range(3))
    unserved = Counter[Any]()
    for r in rows(tmp_path / "run", "routing"):
        of = (r["step"], r["layer"], tag[r["step"], r["token"]])
        entropy[of] += r["entropy"]
        margin[of] += r["margin"]
        unserved[of] += len(r["dropped"] or []) == spec.top_k
        for slot, (e, w) in enumerate(zip(r["expert_ids"], r["weights"], strict=True)):
            routed[*of, e] += 1
            if slot in (r["dropped"] or []):
                dropped[*of, e] += 1
            else:
                weight[*of, e] += w
    seen = 0
    for r in rows(tmp_path / "run", "load"):
        cell = (r["step"], r["layer"], r["tag"], r["expert"])
        assert r["routed"] == routed[cell]
        assert (r["overflowed"], r["dropped"]) == (dropped[cell], dropped[cell])
        assert r["processed"] == routed[cell] - dropped[cell]
        assert r["weight_sum"] == pytest.approx(weight[cell], rel=0.01, abs=1e-6)
        seen += r["routed"]
    assert seen == routed.total() == truth.counts_FLE.sum()
    assert dropped.total() > 100
    for r in rows(tmp_path / "run", "routers"):
        of = (r["step"], r["layer"], r["tag"])
        assert r["entropy_sum"] == pytest.approx(entropy[of], rel=0.01)
        assert r["margin_sum"] == pytest.approx(margin[of], rel=0.01)
        assert r["unserved_tokens"] == unserved[of]


def test_drops_are_the_last_tokens_of_a_full_expert() -> None:
    spec = SPECS["dropping"]
    room = math.ceil(spec.sequences * spec.length * spec.top_k / spec.experts)
    for layer in made(spec).layers:
        assert layer.rows is not None
        assert layer.rows.dropped_NK is not None
        assert layer.capacity == room
        used, want = Counter[int](), []
        for ids in layer.rows.expert_ids_NK.tolist():
            want.append([used[e] >= room for e in ids])
            used.update(ids)
        assert layer.rows.dropped_NK.tolist() == want
        assert any(map(any, want))


def test_probabilities_and_z_loss_are_summed() -> None:
    whole = made(replace(SPECS["planted"], logits=True))
    tag_T = whole.tokens[0].tag_N
    for layer in whole.layers:
        assert layer.rows is not None
        z = np.asarray(layer.rows.logits_NE, np.float64)
        lse = np.log(np.exp(z).sum(1))
        p = np.exp(z - lse[:, None])
        for g in range(len(whole.tags)):
            mine = tag_T == g
            assert layer.prob_sum_GE is not None
            assert layer.prob_sum_GE[g] == pytest.approx(p[mine].sum(0), rel=1e-3, abs=1e-6)
            assert layer.zloss_sum_G is not None
            assert layer.zloss_sum_G[g] == pytest.approx((lse[mine] ** 2).sum(), rel=1e-4)
            assert layer.top1_prob_sum_G is not None
            assert layer.top1_prob_sum_G[g] == pytest.approx(p[mine].max(1).sum(), rel=1e-4)


def test_serving_decodes_the_sequences_of_its_prefill(tmp_path: Path) -> None:
    spec = SPECS["serving"]
    truth = generate(tmp_path / "run", spec)
    steps = rows(tmp_path / "run", "steps")
    assert [s["phase"] for s in steps] == ["prefill", *["decode"] * 5] * 3
    assert [(s["step"], s["forward"]) for s in steps] == [
        (s, f) for s in range(3) for f in range(6)
    ]
    starts = [s["t_start_ns"] for s in steps]
    ends = [s["t_start_ns"] + s["host_ns"] for s in steps]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    at: dict[int, list[int]] = defaultdict(list)
    tags: dict[int, set[str]] = defaultdict(set)
    for r in rows(tmp_path / "run", "tokens"):
        at[r["sequence"]].append(r["position"])
        tags[r["sequence"]].add(r["tag"])
    assert sorted(at) == list(range(3 * spec.sequences))
    assert all(sorted(p) == list(range(spec.length + 5)) for p in at.values())
    declared = {r["sequence"]: r["tag"] for r in rows(tmp_path / "run", "sequences")}
    assert {s: {t} for s, t in declared.items()} == tags
    assert [m.phase for m in truth.moments] == [s["phase"] for s in steps]


def test_a_sequence_keeps_its_topic_from_prefill_to_decoding() -> None:
    spec = replace(SPECS["serving"], topics=50, stay=1.0)
    batch = Sequences(spec).batch(0, 0)
    assert (batch.topic_BS == batch.topic_BS[:, :1]).all()
    assert batch.topic_BS.shape[1] >= spec.length + spec.decode


def test_topics_are_a_markov_chain() -> None:
    spec = Spec(topics=4, stay=0.6, sequences=200, length=200)
    topic = Sequences(spec).batch(0, 0).topic_BS
    same = (topic[:, 1:] == topic[:, :-1]).mean()
    assert same == pytest.approx(0.6 + 0.4 / 4, abs=0.015)
    assert np.bincount(topic.ravel()) / topic.size == pytest.approx(np.full(4, 0.25), abs=0.03)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_is_not_there(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank is from 0 to 1, got {rank}"):
        counts(Spec(ranks=2), rank=rank)
    with pytest.raises(ValueError, match=f"rank is from 0 to 1, got {rank}"):
        list(events(Spec(ranks=2), rank=rank))


def test_any_domain_may_come_first_in_a_batch() -> None:
    """Else a capacity would always drop the same domains' tokens."""
    spec = Spec(sequences=8)
    first = [int(Sequences(spec).batch(0, n).domain_B[0]) for n in range(200)]
    assert np.bincount(first) / 200 == pytest.approx(np.full(4, 0.25), abs=0.12)


def test_events_are_what_the_writer_is_handed() -> None:
    spec = replace(SPECS["mixed"], steps=3)
    kinds = [type(e).__name__ for e in events(spec)]
    pair = ["Forward", "Losses"]
    assert kinds == [*pair * 2, "StepEnd", *pair * 2, "StepEnd", *["Forward"] * 4]


def test_losses_are_of_the_next_token(tmp_path: Path) -> None:
    spec = replace(SPECS["mixed"], steps=2)
    generate(tmp_path / "run", spec)
    declared = [r["sequence"] for r in rows(tmp_path / "run", "sequences")]
    assert sorted(declared) == list(range(2 * 2 * spec.sequences))  # each forward has its own
    domains = list(spec.shares)
    drawn = Sequences(spec)
    frequency = {
        (tag, int(i)): float(p)
        for tag, ids, probs in zip(domains, drawn.ids, drawn.probs, strict=True)
        for i, p in zip(ids, probs, strict=True)
    }
    token = {(r["sequence"], r["position"]): r for r in rows(tmp_path / "run", "tokens")}
    outcomes = rows(tmp_path / "run", "outcomes")
    assert len(outcomes) == 2 * 2 * spec.sequences * spec.length
    compared = 0
    for r in outcomes:
        following = token.get((r["sequence"], r["position"] + 1))
        if following is not None:
            p = frequency[following["tag"], following["token_id"]]
            assert r["loss"] == pytest.approx(-math.log(p), rel=1e-5)
            compared += 1
    assert compared == 2 * 2 * spec.sequences * (spec.length - 1)


def test_ranks_are_one_trace(tmp_path: Path) -> None:
    spec = SPECS["odd number"]
    truth = generate(tmp_path / "run", spec)
    assert layout.ranks(tmp_path / "run") == [0, 1]
    metas = [read_meta(layout.meta_path(tmp_path / "run", r)) for r in range(2)]
    assert [(m.rank, m.world, m.coordinates) for m in metas] == [(r, 2, {"dp": r}) for r in (0, 1)]
    assert metas[0].run_id == metas[1].run_id
    per_rank = [counts(spec, rank=r) for r in range(2)]
    assert (per_rank[0] != per_rank[1]).any()
    assert (per_rank[0] + per_rank[1] == truth.counts_FLE).all()
    with moe_lens.open(tmp_path / "run") as trace:
        found = trace.sql(
            "select rank, step, layer, expert, sum(routed) n from load "
            "group by all having sum(routed) > 0"
        ).rows()
        (tokens,) = trace.sql("select sum(tokens) n from steps").rows()
    assert tokens["n"] == 2 * spec.steps * spec.sequences * spec.length
    want = {
        (r, f, i, e): n
        for r, counts_FLE in enumerate(per_rank)
        for (f, i, e), n in np.ndenumerate(counts_FLE)
        if n
    }
    assert {tuple(r.values())[:4]: r["n"] for r in found} == want


def test_the_same_spec_gives_the_same_bytes(tmp_path: Path) -> None:
    spec = everything(steps=2, ranks=2)
    for name in ("a", "b"):
        generate(tmp_path / name, spec)
    for table in ("routing", "tokens", "load", "routers", "outcomes"):
        for rank in range(2):
            one, two = (layout.segments(tmp_path / n, table, rank) for n in ("a", "b"))
            assert [p.read_bytes() for p in one.values()] == [p.read_bytes() for p in two.values()]
    assert (counts(spec) != counts(replace(spec, seed=1))).any()


def test_no_row_is_lost_however_slow_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "WAITING_BYTES", 0)
    spec = Spec(phases=("serve",), decode=2)
    generate(tmp_path / "run", spec)
    assert len(rows(tmp_path / "run", "routing")) == 8 * 2 * (8 * 64 + 2 * 8)


def test_counts_alone_leave_no_rows(tmp_path: Path) -> None:
    generate(tmp_path / "run", SPECS["counts alone"])
    for table in ("routing", "tokens", "sequences"):
        assert rows(tmp_path / "run", table) == []


def test_what_the_model_card_says(tmp_path: Path) -> None:
    generate(tmp_path / "run", Spec(groups=4, hidden_size=64, intermediate_size=None))
    card = read_meta(layout.meta_path(tmp_path / "run", 0)).layers[1]
    assert (card.groups, card.top_groups, card.hidden_size) == (4, 4, 64)
    assert card.intermediate_size is None


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(TraceError, match="not an empty folder"):
            generate(place, Spec())
    with pytest.raises(TraceWriteError, match="cannot write the trace"):
        generate(tmp_path / "file" / "run", Spec())
    (tmp_path / "new").mkdir()
    lock = RankLock(tmp_path / "new", 0)
    try:
        with pytest.raises(TraceError, match="not an empty folder"):
            generate(tmp_path / "new", Spec())
    finally:
        lock.release()
