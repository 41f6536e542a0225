"""What a trace knows of a layer: against what was planted, and plain loops over the rows."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.traces import segment, write_run

from moe_lens.metrics.catalogue import METRICS, Measured, measure, metrics
from moe_lens.metrics.evidence import Evidence
from moe_lens.queries.evidence import evidence
from moe_lens.queries.session import one_run, open_trace
from moe_lens.trace.layout import meta_path
from moe_lens.trace.meta import read_meta, write_meta
from moe_lens.trace.synthetic import Dead, Hot, Spec, Truth, generate

ALL = list(metrics().values())


def known(path: Path, layer: int = 0, phase: str = "train") -> Evidence:
    with open_trace(path) as trace:
        run = one_run(trace)
        return evidence(trace, run, run.layers[layer], phase, ALL)


def found(given: Evidence, name: str) -> Measured:
    return measure(METRICS[name], given)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    path = tmp_path_factory.mktemp("traces") / "planted"
    spec = Spec(
        layers=2, experts=16, top_k=4, steps=4, forwards=2, sequences=4, length=32, ranks=2,
        logits=True, capacity_factor=1.1, domain_strength=1.0, phases=("train", "eval"),
        planted=(Hot(3, share=0.7), Dead(5)), seed=2,
    )  # fmt: skip
    return path, generate(path, spec)


@pytest.fixture(scope="module")
def layer(planted: tuple[Path, Truth]) -> Evidence:
    return known(planted[0], layer=1)


def test_counts_are_those_that_were_written(planted: tuple[Path, Truth], layer: Evidence) -> None:
    path, truth = planted
    with open_trace(path) as trace:
        forwards = trace.sql("select step, forward, phase, rank from steps").rows()
    # counts_FLE is over both ranks; phases take turns step by step.
    order = sorted({(f["step"], f["forward"], f["phase"]) for f in forwards})
    mine = [i for i, (_, _, phase) in enumerate(order) if phase == "train"]
    wanted = truth.counts_FLE[mine, 1].sum(0)
    assert layer.counts_E is not None
    assert layer.counts_E.tolist() == wanted.tolist()
    assert layer.tokens == wanted.sum() / 4 == 2 * 2 * 2 * 4 * 32
    assert layer.counts_FE is not None
    assert layer.counts_FE.sum(0).tolist() == wanted.tolist()  # eight forwards: all are looked at
    assert layer.step_F is not None
    assert layer.rank_F is not None
    assert layer.step_F.tolist() == [0, 0, 0, 0, 2, 2, 2, 2]
    assert layer.rank_F.tolist() == [0, 0, 1, 1] * 2
    assert layer.counts_HE is not None
    first = truth.counts_FLE[[i for i in mine if order[i][0] == 0], 1].sum(0)
    assert layer.counts_HE.tolist() == [first.tolist(), (wanted - first).tolist()]


def test_what_was_planted_is_found(layer: Evidence) -> None:
    hot, dead = found(layer, "max_share"), found(layer, "dead_experts")
    assert layer.counts_E is not None
    assert layer.counts_E.argmax() == 3
    # F = 0.7 of tokens is f = 0.7 / 4 of choices; sd of 1024 tokens is 0.0036.
    assert hot.value == pytest.approx(0.7 / 4, abs=0.015)
    assert hot.beyond == "high"
    assert (dead.value, dead.beyond) == (1, "high")
    assert layer.counts_E[5] == 0
    assert found(layer, "min_vio").value == 1
    assert found(layer, "popularity_stability").beyond == "high"


def test_the_stored_question_and_the_catalogue_agree(layer: Evidence) -> None:
    row = layer.layer_balance
    assert row is not None
    for name in ("max_over_mean", "load_entropy", "effective_experts"):
        assert found(layer, name).value == pytest.approx(row[name], rel=1e-12)
    sweep = layer.sweep
    assert sweep is not None
    from moe_lens.metrics.capacity import dropped_at

    assert layer.counts_FE is not None
    for factor, dropped in sweep.to_numpy()[::7]:
        assert dropped_at(layer.counts_FE, factor) == pytest.approx(dropped, abs=1e-12)


def test_confidence_and_losses_against_loops_over_logits(
    planted: tuple[Path, Truth], layer: Evidence
) -> None:
    with open_trace(planted[0]) as trace:
        rows = trace.sql(
            "select z.rank, z.step, z.forward, t.sequence, z.logits, r.expert_ids, r.weights, "
            "r.dropped from logits z join routing r using (run, rank, step, forward, layer, token) "
            "join tokens t using (run, rank, step, forward, token) join steps s "
            "using (run, rank, step, forward) where layer = 1 and s.phase = 'train'"
        ).rows()
    assert len(rows) == layer.tokens
    mass = ties = entropy = zloss = gates = lost = weight = 0.0
    mean = np.zeros(16)
    by_sequence: dict[tuple[object, ...], list[tuple[np.ndarray, list[int]]]] = defaultdict(list)
    for row in rows:
        z = [float(x) for x in row["logits"]]
        top = max(z)
        total = sum(math.exp(x - top) for x in z)
        p = [math.exp(x - top) / total for x in z]
        mass += sum(p[e] for e in row["expert_ids"])
        ranked = sorted(z, reverse=True)
        ties += ranked[3] - ranked[4] < 2.0 ** (math.floor(math.log2(abs(ranked[3]))) - 7)
        entropy -= sum(x * math.log(x) for x in p if x)
        zloss += (top + math.log(total)) ** 2
        g = [w / sum(row["weights"]) for w in row["weights"]]
        gates -= sum(x * math.log(x) for x in g if x)
        lost += sum(row["weights"][slot] for slot in row["dropped"] or ())
        weight += sum(row["weights"])
        mean += p
        by_sequence[row["rank"], row["sequence"]].append((np.array(p), row["expert_ids"]))
    T = len(rows)
    assert found(layer, "top_k_mass").value == pytest.approx(mass / T, rel=1e-9)
    assert found(layer, "bf16_ties").value == pytest.approx(ties / T)
    assert found(layer, "gate_entropy").value == pytest.approx(gates / T, rel=1e-6)
    assert found(layer, "dropped_gate_mass").value == pytest.approx(lost / weight, rel=1e-6)
    # From sums over exact logits; these are rounded to bfloat16.
    assert found(layer, "token_entropy").value == pytest.approx(entropy / T, rel=5e-3)
    assert found(layer, "z_loss").value == pytest.approx(zloss / T, rel=5e-3)
    P = mean / T
    assert found(layer, "mean_entropy").value == pytest.approx(-(P * np.log(P)).sum(), rel=5e-3)
    info = found(layer, "routing_information").value
    assert info == pytest.approx(-(P * np.log(P)).sum() - entropy / T, rel=2e-2)
    loss = 0.0
    for tokens in by_sequence.values():
        n = np.bincount([e for _, ids in tokens for e in ids], minlength=16)
        loss += 16 * len(tokens) * float((n / n.sum() * np.mean([p for p, _ in tokens], 0)).sum())
    assert found(layer, "switch_loss_sequence").value == pytest.approx(loss / T, rel=1e-9)
    n = np.bincount([e for row in rows for e in row["expert_ids"]], minlength=16)
    whole = 16 * float((n / n.sum() * P).sum())
    assert found(layer, "switch_loss").value == pytest.approx(whole, rel=1e-3)
    assert found(layer, "switch_loss_k").value == pytest.approx(4 * whole, rel=1e-3)


def test_scopes_are_ordered_as_they_nest(layer: Evidence) -> None:
    names = ("sequence", "micro", "rank", "global")
    values = [found(layer, f"switch_loss_{name}").value for name in names]
    assert values == sorted(values, reverse=True)
    gap = found(layer, "scope_gap")
    assert gap.value == pytest.approx(values[1] - values[3])


def test_drops_against_loops(planted: tuple[Path, Truth], layer: Evidence) -> None:
    with open_trace(planted[0]) as trace:
        rows = trace.sql(
            'select "window", rank, expert, sum(routed) as n, sum(overflowed) as over from load '
            "where layer = 1 and phase = 'train' group by all"
        ).rows()
    room = math.ceil(round(1.1 * 128 * 4 / 16, 6))
    assert layer.capacity_F is not None
    assert set(layer.capacity_F) == {room}
    over = [max(0, row["n"] - room) for row in rows]
    assert found(layer, "overflow_rate").value == pytest.approx(sum(over) / layer.tokens / 4)
    assert found(layer, "dropped_rate").value == found(layer, "overflow_rate").value
    assert found(layer, "overflowed_experts").value == sum(x > 0 for x in over) / 8 / 16
    used = sum(min(row["n"], room) for row in rows)
    assert found(layer, "capacity_slack").value == pytest.approx(1 - used / (room * 8 * 16))
    assert found(layer, "late_drops").value > 1.05  # filled in order of position
    padded = sum(-min(row["n"], room) % 128 for row in rows)
    assert found(layer, "tile_padding").value == pytest.approx(padded / used)


def test_nothing_planted_is_within_chance(tmp_path: Path) -> None:
    """Of a hundred metrics one or two are beyond 199 draws in some run: not more than that."""
    tested = beyond = 0
    for seed in range(4):
        generate(tmp_path / str(seed), Spec(layers=1, experts=16, top_k=4, steps=4, seed=seed))
        given = known(tmp_path / str(seed))
        for each in (measure(m, given) for m in ALL):
            tested += each.chance is not None and each.chance.high is not None
            beyond += each.beyond != ""
        assert found(given, "dead_experts").value == 0
    assert tested > 200
    assert beyond <= 0.03 * tested


def test_padding_and_other_phases_are_not_counted(tmp_path: Path) -> None:
    """Pitfalls 1 and 3; and 8, 11: zero-compute experts are no part of balance."""
    written = write_run(tmp_path / "run", zero_experts=2)
    rows = [r for r in written.rows["load"] if r["layer"] == 0 and r["phase"] == "eval"]
    where = {"attempt": 0, "window": 1, "step": 1, "phase": "eval", "layer": 0, "tag": "code"}
    segment(tmp_path / "run", "load", [{**where, "expert": 7, "padding": 500}], seq=8)
    padding = {"attempt": 0, "step": 1, "forward": 0, "token": 40}
    segment(tmp_path / "run", "tokens", [{**padding, "padding": True}], seq=8)
    choice = {"expert_ids": [7, 6], "weights": [0.5, 0.5]}
    segment(tmp_path / "run", "routing", [{**padding, "layer": 0, **choice}], seq=8)
    wanted = [sum(r["routed"] for r in rows if r["expert"] == e) for e in range(8)]
    given = known(tmp_path / "run", phase="eval")
    assert given.counts_E is not None
    assert given.counts_E.tolist() == wanted
    assert given.chosen_TV is not None
    # Two forwards routed the same positions: the last routing of each, and none of the padding.
    assert given.chosen_TV.shape == (32, 10)
    assert given.chosen_TV.sum() == 32 * 2
    mine = [r for r in written.rows["routing"] if r["layer"] == 0]
    last = max(r["step"] for r in mine if r["step"] in {x["step"] for x in rows})
    ids = [r["expert_ids"] for r in mine if r["step"] == last]
    assert given.chosen_TV.sum(0).tolist() == np.bincount(np.ravel(ids), minlength=10).tolist()
    assert given.counts_FE is not None
    assert given.counts_FE.sum(0).tolist() == wanted
    assert given.outputs == 10
    assert given.prob_V is None
    assert "zero-compute" in found(given, "mean_entropy").lacks


def test_copies_of_a_rank_count_once(tmp_path: Path) -> None:
    """Pitfall 6: under tensor parallelism two ranks route the same tokens."""
    write_run(tmp_path / "one", ranks=(0,))
    write_run(tmp_path / "two", ranks=(0, 1), world=2)
    meta = read_meta(meta_path(tmp_path / "two", 1))
    meta.counts = "copy"
    write_meta(tmp_path / "two", meta)
    one, two = known(tmp_path / "one"), known(tmp_path / "two")
    assert one.tokens == two.tokens
    assert one.counts_FE is not None
    assert two.counts_FE is not None
    assert one.counts_FE.tolist() == two.counts_FE.tolist()


def test_experts_that_choose_have_no_balance(tmp_path: Path) -> None:
    """Pitfall 12: it would be perfect, and mean nothing."""
    write_run(tmp_path / "run")
    meta = read_meta(meta_path(tmp_path / "run", 0))
    meta.layers[0].router = "expert-choice"
    write_meta(tmp_path / "run", meta)
    given = known(tmp_path / "run")
    for name in ("max_vio", "max_vio_batch", "switch_loss", "scope_gap", "drop_at_1"):
        assert "experts choose their tokens" in found(given, name).lacks, name
    assert found(known(tmp_path / "run", layer=1), "max_vio").lacks == ""


def test_rejected_drafts_are_no_tokens(tmp_path: Path) -> None:
    """Pitfall 15."""
    path = tmp_path / "run"
    generate(path, Spec(layers=1, steps=1, sequences=2, length=8, logits=True))
    with open_trace(path) as trace:
        before = len(trace.query("sequence_choices"))
        (first,) = trace.sql("select * from tokens where token = 3").rows()
    where = {k: first[k] for k in ("step", "forward", "sequence", "position")}
    segment(path, "outcomes", [{"attempt": 0, **where, "kept": False}], seq=90)
    with open_trace(path) as trace:
        rows = trace.query("sequence_choices").rows()
        assert len(rows) == before - 1 == 15
        assert (first["sequence"], 3) not in {(row["sequence"], row["position"]) for row in rows}
        assert all(len(row["logits"]) == 16 for row in rows)


def test_how_much_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "run"
    generate(path, Spec(layers=1, steps=20, forwards=2, sequences=2, length=8, ranks=2))
    with open_trace(path) as trace:
        loads = trace.query("forward_loads", most=16).df()
        assert sorted(set(loads["step"])) == [0, 5, 10, 15]  # whole steps, 80 forwards / 16
        assert loads.groupby("step")[["rank", "window"]].nunique().to_numpy().min() == 2
        assert len(trace.query("forward_loads", most=1).df().groupby("step")) == 1
        rows = trace.query("sequence_choices", most=40).df()
        sizes = rows.groupby(["rank", "sequence"]).size()
        assert sizes.tolist() == [8] * 5  # whole sequences, until there are 40
        assert set(rows["step"]) != {0}
        assert len(trace.query("sequence_choices", most=None)) == 20 * 2 * 2 * 16


def test_forwards_are_drawn_from_the_phase_alone(tmp_path: Path) -> None:
    generate(tmp_path / "run", Spec(layers=1, steps=8, phases=("eval", "train"), length=8))
    with open_trace(tmp_path / "run") as trace:
        loads = trace.query("forward_loads", phase="train", most=2).df()
    assert sorted(set(loads["step"])) == [1, 5]


def rewritten(run: Path, table: str, rows: list[dict[str, Any]], **changes: object) -> None:
    """The table's only segment once more, with other values in some columns."""
    kept = [{k: v for k, v in row.items() if k != "rank"} for row in rows]
    segment(run, table, [{**row, **changes} for row in kept])


def test_a_capacity_for_each_sequence_has_no_null_of_forwards(tmp_path: Path) -> None:
    written = write_run(tmp_path / "run", phases=("train",))
    rewritten(tmp_path / "run", "layers", written.rows["layers"], capacity_groups=4)
    given = known(tmp_path / "run")
    assert given.capacity_F is None
    rate = found(given, "overflow_rate")
    assert rate.lacks == ""
    assert rate.chance is None
    assert found(given, "capacity_slack").lacks == (
        "no capacity of whole forwards: each sequence has its own"
    )


def test_what_the_router_chose_beside_what_ran(tmp_path: Path) -> None:
    written = write_run(tmp_path / "run", layers=1, phases=("eval",))
    rewritten(tmp_path / "run", "routing", written.rows["routing"], router_ids=[6, 7])
    given = known(tmp_path / "run", phase="eval")
    assert given.chosen_TV is not None
    assert given.weight_TV is not None
    assert given.chosen_TV[:, 6:].all()
    assert given.chosen_TV.sum() == 2 * len(given.chosen_TV)
    # Weights are those of the experts that ran, of each position's last routing.
    wanted = np.zeros(8)
    for row in written.rows["routing"][-len(given.chosen_TV) :]:
        for expert, weight in zip(row["expert_ids"], row["weights"], strict=True):
            wanted[expert] += weight
    assert given.weight_TV.sum(0).tolist() == wanted.tolist()


def test_windows_of_several_forwards_have_no_batches(tmp_path: Path) -> None:
    written = write_run(tmp_path / "run", phases=("decode",))
    rewritten(tmp_path / "run", "layers", written.rows["layers"], forwards=3)
    given = known(tmp_path / "run", phase="decode")
    assert given.counts_FE is None
    assert "windows hold several" in found(given, "max_vio_batch").lacks
    assert found(given, "max_vio").lacks == ""


def test_logits_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    written = write_run(tmp_path / "run", layers=1, steps=1, phases=("eval",))
    nan, inf = float("nan"), float("inf")
    z = [[1.0, 0, 0, 0, 0, 0, 0, -inf], [nan] * 8, [inf] + [0.0] * 7, [0.0, 3, 0, 0, 0, 0, 0, 0]]
    rows = [{"step": 0, "forward": 0, "layer": 0, "token": t, "logits": x} for t, x in enumerate(z)]
    segment(tmp_path / "run", "logits", rows)
    given = known(tmp_path / "run", phase="eval")
    assert given.logits_TV is not None
    assert given.logits_TV.tolist() == [z[0], z[3]]
    assert found(given, "logit_max").value == 3
    assert given.chosen_TV is not None
    ids = [written.rows["routing"][t]["expert_ids"] for t in (0, 3)]
    assert [sorted(np.flatnonzero(row)) for row in given.chosen_TV] == [sorted(x) for x in ids]
    # The meta file does not say whether these are logits of a softmax or of sigmoids.
    assert found(given, "top1_margin").lacks == (
        "the router's score is unknown: logits have no probabilities"
    )
    meta = read_meta(meta_path(tmp_path / "run", 0))
    meta.layers[0].score = "sigmoid"
    write_meta(tmp_path / "run", meta)
    p = [1 / (1 + math.exp(-x)) for x in z[3]]
    first = [1 / (1 + math.exp(-1)), *[0.5] * 6, 0.0]
    margins = [(sorted(x)[-1] - sorted(x)[-2]) / sum(x) for x in (first, p)]
    value = found(known(tmp_path / "run", phase="eval"), "top1_margin").value
    assert value == pytest.approx(sum(margins) / 2)


def test_without_rows_counts_still_answer(tmp_path: Path) -> None:
    write_run(tmp_path / "run", token_rows=False)
    given = known(tmp_path / "run")
    assert "record with tokens=1.0" in found(given, "top_k_mass").lacks
    assert "record with tokens=1.0" in found(given, "late_drops").lacks
    assert found(given, "load_cv").lacks == ""


def test_a_dropless_layer_has_no_rates_of_drops(tmp_path: Path) -> None:
    write_run(tmp_path / "run", phases=("eval",))
    meta = read_meta(meta_path(tmp_path / "run", 0))
    meta.layers[1].capacity_policy = None
    write_meta(tmp_path / "run", meta)
    assert found(known(tmp_path / "run", 0, "eval"), "dropped_rate").value == 0
    given = known(tmp_path / "run", 1, "eval")
    for name in ("dropped_rate", "unserved_rate", "overflowed_experts"):
        assert found(given, name).lacks == "no capacity: the layer is dropless"
    assert found(given, "drop_at_1").lacks == ""


def test_too_few_tokens_for_dead(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tokens=8, steps=2)
    given = known(tmp_path / "run")
    assert found(given, "dead_experts").lacks == (
        "too few tokens: with fewer than 32 an expert is missed by chance"
    )
