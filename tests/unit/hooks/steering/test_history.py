"""Decisions by sequence and position: the last that counts, however the recording was cut."""

from __future__ import annotations

import numpy as np
import pytest
from support.traces import layer_info, meta, segment, write_run

from moe_lens import SteeringError
from moe_lens.trace.meta import Attempt, write_meta
from moe_lens_hooks.steering.history import history_of
from moe_lens_hooks.steering.recorded import read


def write(path, tokens, *, sequences=(), outcomes=(), attempts=None, ranks=(0,), **layer):
    """A run of one layer in which the expert of a token says which row of `tokens` it is.

    A token is (step, token, sequence, position), and may say more as a dict.
    """
    more = {} if attempts is None else {"attempts": attempts}
    infos = [layer_info(0, 100, 1, **layer)]
    for rank in ranks:
        write_meta(path, meta(rank, world=len(ranks), layers=infos, weights="exact", **more))
        rows, routing, steps = [], [], {}
        for i, (step, token, sequence, position, *said) in enumerate(tokens):
            row = {"step": step, "token": token, "sequence": sequence, "position": position}
            row |= said[0] if said else {}
            if row.pop("rank", 0) != rank:
                continue
            rows.append(row)
            chosen = {"expert_ids": [i], "weights": [i / 100], "layer": 0}
            routing.append({**row, **chosen, **(said[1] if len(said) > 1 else {})})
            at = {"step": step, "attempt": row.get("attempt", 0)}
            steps.setdefault(tuple(at.values()), {**at, "tokens": 0})["tokens"] += 1
        for table, found in (
            ("tokens", rows), ("routing", routing), ("steps", [*steps.values()]),
            ("sequences", sequences), ("outcomes", outcomes),
        ):  # fmt: skip
            segment(path, table, list(found), rank=rank)
    return path


def decided(path, **options):
    """Expert by (sequence's place, position)."""
    recorded = read(path, ranks=None, steps=None, weights=True, **options)
    history = history_of(recorded)
    ids, weights = history.decisions[0]
    found = {}
    for place in range(len(history.sequences)):
        for position in range(10):
            row = history.look_up("main", np.array([place]), np.array([position]))[0]
            if row >= 0:
                found[place, position] = int(ids[row, 0])
                assert weights[row, 0] == np.float32(found[place, position] / 100)
    return history, found


def test_prefill_chunks_and_decode_make_one_sequence(tmp_path):
    tokens = [(0, 0, 5, 0), (0, 1, 5, 1), (0, 2, 6, 0), (1, 0, 5, 2), (1, 1, 6, 1), (2, 0, 5, 3)]
    history, found = decided(write(tmp_path / "r", tokens))
    assert history.sequences == [(0, 5), (0, 6)]
    assert found == {(0, 0): 0, (0, 1): 1, (1, 0): 2, (0, 2): 3, (1, 1): 4, (0, 3): 5}
    assert (history.length("main", 0), history.length("main", 1)) == (4, 2)


def test_the_last_decision_counts_and_padding_does_not(tmp_path):
    tokens = [
        (0, 0, 5, 0), (0, 1, 5, 1), (1, 0, 5, 1), (2, 0, 5, 1, {"padding": True}),
        (2, 1, 5, 2, {"padding": True}),
    ]  # fmt: skip
    assert decided(write(tmp_path / "r", tokens))[1] == {(0, 0): 0, (0, 1): 2}


def test_a_rejected_draft_counts_only_where_it_was_decided_again(tmp_path):
    # draft of positions 1 to 3 in step 1; 2 and 3 were rejected, and 2 was routed again in step 2
    tokens = [(0, 0, 5, 0), (1, 0, 5, 1), (1, 1, 5, 2), (1, 2, 5, 3), (2, 0, 5, 2)]
    outcomes = [
        {"step": 1, "sequence": 5, "position": 2, "kept": False},
        {"step": 1, "sequence": 5, "position": 3, "kept": False},
        {"step": 1, "sequence": 5, "position": 1, "kept": True},
        {"step": 0, "sequence": 5, "position": None, "kept": False},
        {"step": 0, "sequence": 5, "position": 0, "kept": None, "loss": 1.0},
    ]
    found = decided(write(tmp_path / "r", tokens, outcomes=outcomes))[1]
    assert found == {(0, 0): 0, (0, 1): 1, (0, 2): 4}


def test_a_beam_has_the_beginning_of_the_one_it_forked_from(tmp_path):
    # 6 forked from 5 at position 2, 7 from 6 at position 3; 5 went on by itself
    tokens = [
        (0, 0, 5, 0), (0, 1, 5, 1), (1, 0, 5, 2), (1, 1, 6, 2), (2, 0, 5, 3), (2, 1, 7, 3),
    ]  # fmt: skip
    sequences = [{"sequence": 5}, {"sequence": 6, "parent": 5}, {"sequence": 7, "parent": 6}]
    found = decided(write(tmp_path / "r", tokens, sequences=sequences))[1]
    of = [[found.get((place, p)) for p in range(5)] for place in range(3)]
    assert of == [[0, 1, 2, 4, None], [0, 1, 3, None, None], [0, 1, 3, 5, None]]


def test_what_a_later_attempt_overtook_does_not_count(tmp_path):
    attempts = [Attempt(0, 1, first_step=0), Attempt(1, 2, first_step=1)]
    tokens = [
        (0, 0, 5, 0), (1, 0, 5, 1), (1, 0, 5, 1, {"attempt": 1}), (2, 0, 5, 2),
    ]  # fmt: skip
    assert decided(write(tmp_path / "r", tokens, attempts=attempts))[1] == {(0, 0): 0, (0, 1): 2}


def test_sequences_of_all_ranks_are_there_by_rank(tmp_path):
    tokens = [(0, 0, 5, 0), (0, 0, 5, 0, {"rank": 1}), (0, 1, 6, 0, {"rank": 1})]
    path = write(tmp_path / "r", tokens, ranks=(0, 1), sequences=[{"sequence": 6, "request": "x"}])
    history, found = decided(path)
    assert history.sequences == [(0, 5), (1, 5), (1, 6)]
    assert found == {(0, 0): 0, (1, 0): 1, (2, 0): 2}
    with pytest.raises(SteeringError, match=r"has 2 of sequence 5 \(several ranks\?\)"):
        history.find(5)
    assert history.find(6) == history.find("x") == 2
    assert history.label(2) == "request 'x'"
    only = history_of(read(path, ranks=[1], steps=None, weights=False))
    assert only.sequences == [(1, 5), (1, 6)]
    assert only.decisions[0][1] is None


def test_where_a_library_runs_other_experts_the_choice_is_what_is_read(tmp_path):
    tokens = [(0, 0, 5, 0, {}, {"router_ids": [42]}), (0, 1, 5, 1, {}, {"router_ids": None})]
    rows = read(
        write(tmp_path / "r", tokens, faithful=False), ranks=None, steps=None, weights=False
    ).layers[0]
    assert rows.ids_NK.tolist() == [[42], [1]]


def test_fewer_choices_than_k_leave_slots_open(tmp_path):
    chosen = ([3, 4], [1], [])
    tokens = [(0, i, 5, i, {}, {"expert_ids": ids}) for i, ids in enumerate(chosen)]
    path = write(tmp_path / "r", tokens)
    rows = read(path, ranks=None, steps=None, weights=False).layers[0]
    assert rows.ids_NK.tolist() == [[3, 4], [1, -1], [-1, -1]]


def test_rows_without_their_forward_are_refused(tmp_path):
    path = write(tmp_path / "r", [(0, 0, 5, 0)])
    segment(path, "tokens", [{"step": 9, "sequence": 5}], seq=1)
    with pytest.raises(SteeringError, match="step 9, forward 0 have no row in the table"):
        read(path, ranks=None, steps=None, weights=False)


def test_rows_in_an_open_stream_are_read_too(tmp_path):
    written = write_run(tmp_path / "r", steps=3, open_tables=("tokens", "routing", "steps"))
    recorded = read(tmp_path / "r", ranks=None, steps=None, weights=False)
    rows = [r for r in written.rows["routing"] if r["layer"] == 1]
    order = sorted(rows, key=lambda r: (r["step"], r["token"]))
    assert recorded.layers[1].ids_NK.tolist() == [r["expert_ids"] for r in order]
    assert [f for _, f, _ in recorded.forwards] == [0, 1, 2]
    assert recorded.sizes == [35, 35, 35]  # the three of padding have no rows here
    some = read(tmp_path / "r", ranks=None, steps=range(1, 3), weights=False)
    assert [step for _, step, _ in some.forwards] == [1, 2]
    assert len(some.layers[0].ids_NK) == 64
