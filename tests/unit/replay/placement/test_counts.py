"""What is read from a run, against what a synthetic one was made of, and against plain SQL."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_lens
from moe_lens.errors import ReplayError
from moe_lens.replay.placement.balance import rank_rows
from moe_lens.replay.placement.choices import choices_of, together_of
from moe_lens.replay.placement.counts import counts_of, rows_of
from moe_lens.replay.placement.fit import Group, fitted, placed
from moe_lens.replay.placement.formats import as_format, write_plan
from moe_lens.replay.placement.study import Question, study
from moe_lens.replay.placement.traffic import leaving
from moe_lens.replay.placement.what_if import divided, traffic_of
from moe_lens.trace import synthetic
from moe_lens.trace.reader import open_run

SMALL = synthetic.Spec(steps=6, sequences=4, length=16, popularity="zipf")


def asked(run: Path, sql: str) -> list[tuple[Any, ...]]:
    """Rows of a query."""
    return [tuple(row.values()) for row in moe_lens.open(run).sql(sql).arrow().to_pylist()]


def run_of(folder: Path, spec: synthetic.Spec) -> tuple[Path, synthetic.Truth]:
    run = folder / "run"
    return run, synthetic.generate(run, spec)


def test_counts_are_those_of_the_run(tmp_path: Path) -> None:
    spec = synthetic.Spec(steps=6, sequences=4, length=16, rows=False, ranks=2)
    run, truth = run_of(tmp_path, spec)
    counts = counts_of(open_run(run))
    assert (counts.rows_FLE == truth.counts_FLE).all()
    assert (counts.recorded, counts.uncounted) == (6, 0)
    some = counts_of(open_run(run), layers=frozenset([1]), steps=range(2, 5), most=2)
    assert [key[0] for key in some.forwards] == [2, 4]
    assert (some.rows_FLE[:, 0] == truth.counts_FLE[[2, 4], 1]).all()


def test_dropped_rows_are_not_computed(tmp_path: Path) -> None:
    spec = synthetic.Spec(steps=4, popularity="zipf", capacity_factor=1.0)
    run, _ = run_of(tmp_path, spec)
    files = open_run(run)
    counts = counts_of(files)
    rows_FLE = counts.rows_FLE
    [(total,)] = asked(run, "select sum(processed) from load")
    assert rows_FLE.sum() == total
    assert rows_FLE.max() <= 8 * 64 * 2 / 16
    choices = choices_of(rows_of(files, counts.infos), counts)
    assert choices is not None
    assert sum((of.expert_ids_TK >= 0).sum() for of in choices.values()) == total


def test_forwards_that_share_a_window_are_counted_row_by_row(tmp_path: Path) -> None:
    spec = synthetic.Spec(steps=2, phases=("serve",), decode=6, sequences=3, length=40)
    run, truth = run_of(tmp_path, spec)
    [(shared,)] = asked(run, "select count(*) from layers where forwards > 1")
    assert shared, "the run has no window of several forwards"
    counts = counts_of(open_run(run))
    assert (counts.rows_FLE == truth.counts_FLE).all()
    assert counts.phases == ["prefill", "decode"]
    assert len(counts.of_phase("decode").forwards) == 12


def test_without_rows_such_forwards_are_left_out_and_said(tmp_path: Path) -> None:
    spec = synthetic.Spec(steps=2, phases=("serve",), decode=6, sequences=3, length=40, rows=False)
    run, _ = run_of(tmp_path, spec)
    counts = counts_of(open_run(run))
    assert (counts.phases, counts.recorded, counts.uncounted) == (["prefill"], 14, 12)
    with pytest.raises(ReplayError, match="record with tokens"):
        counts_of(open_run(run), phase="decode")
    with pytest.raises(ReplayError, match="no forwards of phase 'train'"):
        counts_of(open_run(run), phase="train")
    with pytest.raises(ReplayError, match="no layer 7"):
        counts_of(open_run(run), layers=frozenset([7]))


def test_loads_of_ranks_equal_sql_to_the_row(tmp_path: Path) -> None:
    """Without replicas from the counts, with replicas from every choice in its turn."""
    run, _ = run_of(tmp_path, SMALL)
    files = open_run(run)
    counts = counts_of(files)
    plan = placed("contiguous", Group(4), counts)
    found = asked(
        run,
        """select step, layer, expert // 4 as rank, sum(processed) as n
           from load group by all order by all""",
    )
    rows_FLR = np.zeros((6, 2, 4), int)
    for step, layer, rank, n in found:
        rows_FLR[step, layer, rank] = n
    assert (rank_rows(counts, plan) == rows_FLR).all()

    plan = fitted(files, "eplb", Group(4, 8), counts)
    choices = asked(
        run,
        """select step, layer, unnest(expert_ids) as expert
           from routing order by step, layer, token""",
    )
    rows_FLR[:] = 0
    turn: dict[tuple[int, int, int], int] = {}
    for step, layer, expert in choices:
        key = step, layer, expert
        holders = np.flatnonzero(plan.slots_LP[layer] == expert)
        rows_FLR[step, layer, holders[turn.get(key, 0) % len(holders)] // 6] += 1
        turn[key] = turn.get(key, 0) + 1
    assert (rank_rows(counts, plan) == rows_FLR).all()


def test_what_is_chosen_together_against_pairs_of_every_token(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path, SMALL)
    files = open_run(run)
    counts = counts_of(files)
    made_LEE = together_of(choices_of(rows_of(files, counts.infos), counts), counts)
    assert made_LEE is not None
    pairs = asked(
        run,
        """with chosen as (select layer, step, token, unnest(expert_ids) as e from routing)
           select a.layer, a.e as a, b.e as b, count(*) as n from chosen a
           join chosen b using (layer, step, token) group by all""",
    )
    truth_LEE = np.zeros_like(made_LEE)
    for layer, a, b, n in pairs:
        truth_LEE[layer, a, b] = n
    assert (made_LEE == truth_LEE).all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_tokens_send_counts_the_recorded_rank_as_their_own(tmp_path: Path, ranks: int) -> None:
    spec = synthetic.Spec(steps=3, sequences=4, length=8, ranks=ranks)
    run, _ = run_of(tmp_path, spec)
    files = open_run(run)
    counts = counts_of(files)
    plan = placed("contiguous", Group(2), counts)
    choices = choices_of(rows_of(files, counts.infos), counts)
    assert choices is not None
    made = traffic_of(choices, counts.infos, plan)
    # In the run of one rank the first half of a forward's 32 tokens starts on rank 0.
    found = asked(
        run,
        """with there as (
              select step, layer, rank, token,
                if((select max(rank) from routing) = 1, rank, token // 16) as home,
                unnest(expert_ids) // 8 as place
              from routing)
            select home, place, count(distinct (step, layer, rank, token)) as once, count(*) as each
            from there group by all order by all""",
    )
    once_RR = np.zeros((2, 2), int)
    each = 0
    for a, b, n, choices in found:
        once_RR[a, b] = n
        each += choices if a != b else 0
    assert made.rows_RR.tolist() == once_RR.tolist()
    assert (made.to_ranks.rows, made.to_ranks_by_choice.rows) == (leaving(once_RR), each)
    assert made.to_ranks.bytes == 256 * 2 * made.to_ranks.rows
    assert made.token_layers == 3 * 32 * 2 * ranks


def test_halves_are_of_each_phase_and_later_ones_judge(tmp_path: Path) -> None:
    spec = synthetic.Spec(steps=4, phases=("serve",), decode=2, sequences=3, length=40)
    run, _ = run_of(tmp_path, spec)
    earlier, later = divided(counts_of(open_run(run)))
    assert not set(earlier.forwards) & set(later.forwards)
    for phase in ("prefill", "decode"):
        assert max(earlier.of_phase(phase).forwards) < min(later.of_phase(phase).forwards)
    three = counts_of(open_run(run), phase="prefill", most=3)
    assert divided(three)[0].forwards == divided(three)[1].forwards == three.forwards


def test_a_rank_without_rows_leaves_a_shared_forward_uncounted(tmp_path: Path) -> None:
    """The rows of one rank are not those of the group."""
    spec = synthetic.Spec(steps=2, phases=("serve",), decode=6, sequences=3, length=40, ranks=2)
    run, truth = run_of(tmp_path, spec)
    assert (counts_of(open_run(run)).rows_FLE == truth.counts_FLE).all()
    for path in (run / "routing" / "rank=1").iterdir():
        path.unlink()
    counts = counts_of(open_run(run))
    assert (counts.phases, counts.uncounted) == (["prefill"], 12)
    assert (counts.rows_FLE == truth.counts_FLE[[0, 7]]).all()


def test_every_phase_keeps_its_share_of_the_forwards_that_are_looked_at(tmp_path: Path) -> None:
    """Every fourth forward is a prefill: a stride of four would see none of them, or only them."""
    spec = synthetic.Spec(steps=20, phases=("serve",), decode=3, sequences=2, length=8, layers=1)
    run, _ = run_of(tmp_path, spec)
    counts = counts_of(open_run(run), most=20)
    of = [len(counts.of_phase(phase).forwards) for phase in ("prefill", "decode")]
    assert of == [5, 15]
    assert counts.forwards == sorted(counts.forwards)
    assert counts_of(open_run(run), most=2).phases == ["prefill", "decode"]


def test_a_plan_of_more_layers_serves_these(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path, SMALL)
    counts = counts_of(open_run(run))
    plan = placed("eplb", Group(4), counts)
    turned = replace(plan, layers=(1, 0), slots_LP=plan.slots_LP[::-1])
    path = tmp_path / "plan.json"
    write_plan(path, as_format(turned, "moe-lens", []))
    for layers in (None, frozenset([1])):
        asked_of = Question(Group(4), str(path), now=str(path), layers=layers)
        found = study(run, asked_of)
        wanted = [0, 1] if layers is None else [1]
        assert found.plan.layers == tuple(wanted)
        assert (found.plan.slots_LP == plan.slots_LP[wanted]).all()
        assert (found.now.moved, found.of("eplb").placement.layers) == (0, tuple(wanted))


def test_groups_of_the_model_card_stay_on_their_nodes(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path, synthetic.Spec(groups=4, rows=False, popularity="zipf"))
    files = open_run(run)
    plan = fitted(files, "eplb", Group(4, 0, 2))
    for slots_P in plan.slots_LP:
        first, second = (set(half // 4) for half in slots_P.reshape(2, -1))
        assert not first & second


def test_a_latent_layer_sends_less(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path, SMALL)
    files = open_run(run)
    counts = counts_of(files)
    choices = choices_of(rows_of(files, counts.infos), counts)
    assert choices is not None
    plan = placed("contiguous", Group(4), counts)
    narrow = [dataclasses.replace(info, dispatch_width=64) for info in counts.infos]
    made = traffic_of(choices, narrow, plan, dtype="fp8")
    assert made.to_ranks.bytes == 64 * made.to_ranks.rows
