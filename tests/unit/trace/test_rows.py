"""What the writer leaves on disk is what was seen: row by row, against a naive count."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.events import ROW_KEYS, TAGS, Key, Router, Row, Seen, event, losses_event, seen, tally
from support.reading import new_meta, read_rows

from moe_lens.trace import rows, windows
from moe_lens.trace.events import Losses, SequenceRow, TokenRows
from moe_lens.trace.schema import TABLES, with_keys
from moe_lens.trace.writer import TraceWriter

SUM = 2**-12 * 1.01  # the sums of `load` keep 11 mantissa bits of a float32
BF16 = 2**-8
RELATIVE = {"prob_sum": SUM, "weight_sum": SUM, "entropy": BF16, "margin": BF16, "logits": BF16}
RELATIVE["group_entropy"] = BF16


def routers() -> st.SearchStrategy[list[Router]]:
    """One to three layers; experts, k and what is known of the router differ by layer."""

    @st.composite
    def one(draw: st.DrawFn, layer: int) -> Router:
        experts = draw(st.sampled_from([1, 2, 4, 9, 40]))
        return Router(
            layer=layer,
            experts=experts,
            top_k=draw(st.integers(1, min(experts, 3))),
            dynamic=draw(st.booleans()) and draw(st.booleans()),
            capacity=draw(st.sampled_from([None, None, None, 1, 2])),
            grouped=draw(st.booleans()),
            scores=draw(st.booleans()),
            margins=draw(st.booleans()),
            runners=draw(st.integers(0, 2)),
            logits=draw(st.booleans()),
            expert_groups=draw(st.sampled_from([None, *(n for n in (2, 3) if experts % n == 0)])),
        )

    layers = st.sets(st.integers(0, 40), min_size=1, max_size=3)
    return layers.flatmap(lambda which: st.tuples(*map(one, sorted(which)))).map(list)


@st.composite
def recordings(draw: st.DrawFn) -> list[Seen | str]:
    """Forwards of one model, in steps, with flushes between; some enter only some layers."""
    model = draw(routers())
    dropless = [Router(**{**vars(r), "capacity": None}) for r in model]
    out: list[Seen | str] = []
    step = forward = sequence = 0
    for _ in range(draw(st.integers(1, 5))):
        phase = draw(st.sampled_from(["decode", "decode", "eval", "train"]))
        lengths = draw(st.lists(st.sampled_from([1, 0, 1, 2, 6]), max_size=3))
        entered = draw(st.sets(st.sampled_from(range(len(model)))))
        tags = draw(st.permutations(TAGS))[: draw(st.integers(1, 3))]
        which = model if draw(st.booleans()) else dropless
        f = seen(
            [which[i] for i in sorted(entered, reverse=draw(st.booleans()))],
            step=step,
            forward=forward,
            phase=phase,
            lengths=tuple(lengths),
            tags=tuple(tags),
            first_sequence=sequence,
            padding=draw(st.sampled_from([0.0, 0.4, 1.0])),
            kept=draw(st.sampled_from([0.0, 0.5, 1.0])),
            nonfinite=draw(st.sampled_from([0.0, 0.0, 0.3])),
            losses=draw(st.booleans()),
            seed=draw(st.integers(0, 2**32)),
        )
        out.append(f)
        sequence += len(lengths)
        if draw(st.booleans()):
            step, forward = step + draw(st.integers(1, 3)), 0
        else:
            forward += 1
        if draw(st.integers(0, 3)) == 3:
            out.append("flush")
    return out


def windows_of(recording: list[Seen | str]) -> list[tuple[int, Seen]]:
    """The window of each forward, if no clock ever runs out. A word in the list is a flush."""
    out: list[tuple[int, Seen]] = []
    number, last = -1, None
    for x in recording:
        if isinstance(x, str):
            last = None
            continue
        joins = last is not None and last.phase == x.phase and not alone(last) and not alone(x)
        number += not joins
        out.append((number, x))
        last = x
    return out


def alone(f: Seen) -> bool:
    """By the design: a capacity applies, it is training, or choices >= experts."""
    return f.phase == "train" or any(
        r.capacity is not None or len(f.valid) * (1 if r.dynamic else r.top_k) >= r.experts
        for r, _ in f.layers
    )


def write(run: Path, recording: list[Seen | str], **meta: Any) -> TraceWriter:
    writer = TraceWriter(run, new_meta(keys=["prompt"], **meta), seal_rows=40)
    known: set[int] = set()
    for x in recording:
        if isinstance(x, str):
            writer.flush()
            continue
        writer.put(event(x, known=known))
        if x.losses is not None:
            writer.put(losses_event(x))
    writer.close()
    return writer


def assert_same(name: str, got: list[Row], want: dict[Key, Row], *, exact: bool) -> None:
    by_key = {tuple(r[k] for k in ROW_KEYS[name]): r for r in got}
    assert len(by_key) == len(got), f"{name}: one key, several rows"
    assert by_key.keys() == want.keys()
    for key, row in want.items():
        assert by_key[key].keys() == row.keys()
        for column, value in row.items():
            there = by_key[key][column]
            where = f"{name} {key} {column}"
            if column == "max_load_expert":
                assert there in value, where
            elif column in ("weights", "next_weights", "logits") and value is not None:
                tolerance = 0.0 if exact and column != "logits" else BF16
                np.testing.assert_allclose(there, value, rtol=tolerance, err_msg=where)
            elif isinstance(value, float):
                tolerance = RELATIVE.get(column, 1e-9)
                assert there == pytest.approx(value, rel=tolerance, abs=1e-12), where
            else:
                assert there == value, where


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recordings(), st.booleans())
def test_what_is_read_back_is_what_a_loop_over_the_tokens_counts(
    recording: list[Seen | str], exact: bool
) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "SHARED_SECONDS", math.inf)
        patch.setattr("os.fsync", lambda fd: None)  # most of the time of a thousand small files
        writer = write(Path(folder), recording, weights="exact" if exact else "bf16")
        assert writer.take_breaches() == []
        want = tally(windows_of(recording))
        for name in TABLES:
            got = read_rows(Path(folder), name)
            assert_same(name, got, want[name], exact=exact)


def test_the_comparison_notices_one_changed_number(tmp_path: Path) -> None:
    recording: list[Seen | str] = [seen([Router(0, 4, 2, capacity=1, logits=True)], losses=True)]
    write(tmp_path, recording)
    noticed = set()
    for name in TABLES:
        want = tally(windows_of(recording))[name]
        got = read_rows(tmp_path, name)
        assert_same(name, got, want, exact=False)
        for column, value in got[0].items():
            tied = column == "max_load_expert"
            if isinstance(value, bool | int | float) and not tied:
                changed = [{**got[0], column: value + 1}, *got[1:]]
                with pytest.raises(AssertionError):
                    assert_same(name, changed, want, exact=False)
                noticed.add(name)
        with pytest.raises(AssertionError):
            assert_same(name, got[1:], want, exact=False)
    assert noticed == set(TABLES)


def test_weights_lose_their_low_bits_unless_exact(tmp_path: Path) -> None:
    recording: list[Seen | str] = [seen([Router(0, 8, 2)], lengths=(30,))]
    for codec in ("bf16", "exact"):
        write(tmp_path / codec, recording, weights=codec)
    bits = {
        codec: np.array(
            [w for r in read_rows(tmp_path / codec, "routing") for w in r["weights"]], np.float32
        ).view(np.uint32)
        for codec in ("bf16", "exact")
    }
    assert not (bits["bf16"] & 0xFFFF).any()
    assert (bits["exact"] & 0xFFFF).any()


def routing(f: Seen, **changes: Any) -> list[Row]:
    forward = event(f)
    for name, value in changes.items():
        setattr(forward.layers[0].rows, name, value)
    tables = rows.routing_tables(forward, 3, exact=True)
    return [r for t in tables for r in t.to_pylist()]


def test_rows_come_by_layer_whatever_the_order_of_the_layers() -> None:
    routers = [Router(5, 8, 2), Router(1, 8, 2), Router(3, 8, 1, runners=0, margins=False)]
    got = routing(seen(routers, lengths=(3,)))
    assert [(r["layer"], r["token"]) for r in got] == [(n, t) for n in (1, 3, 5) for t in range(3)]
    assert {r["attempt"] for r in got} == {3}
    assert [len(r["expert_ids"]) for r in got] == [2] * 3 + [1] * 3 + [2] * 3


def test_a_layer_without_rows_leaves_none() -> None:
    forward = event(seen([Router(0, 8, 2), Router(1, 8, 2)], lengths=(3,)))
    forward.layers[0].rows = None
    (table,) = rows.routing_tables(forward, 0, exact=False)
    assert set(table["layer"].to_pylist()) == {1}
    forward.forget_rows()
    assert rows.routing_tables(forward, 0, exact=False) == []


def test_an_absent_runner_up_is_null() -> None:
    f = seen([Router(0, 8, 2)], lengths=(3,))
    ids = np.array([[4], [-1], [5]], np.int32)
    weights = np.array([[0.5], [0.25], [math.nan]], np.float32)
    got = routing(f, next_ids_NM=ids, next_weights_NM=weights)
    assert [r["next_ids"] for r in got] == [[4], None, [5]]
    assert [r["next_weights"] for r in got] == [[0.5], None, None]
    got = routing(f, next_ids_NM=ids, next_weights_NM=None)
    assert [r["next_ids"] for r in got] == [[4], None, [5]]
    assert [r["next_weights"] for r in got] == [None, None, None]
    got = routing(f, next_ids_NM=None, next_weights_NM=weights)
    assert [(r["next_ids"], r["next_weights"]) for r in got] == [(None, None)] * 3


def test_dropped_lists_the_slots_and_is_null_without_any() -> None:
    mask = np.array([[True, False], [False, False], [True, True]])
    got = routing(seen([Router(0, 8, 2)], lengths=(3,)), dropped_NK=mask)
    assert [r["dropped"] for r in got] == [[0], None, [0, 1]]


def test_what_the_router_chose_stands_beside_what_ran():
    ids = np.array([[5, 6], [7, 1], [2, 3]], np.int32)
    got = routing(seen([Router(0, 8, 2)], lengths=(3,)), router_ids_NK=ids)
    assert [r["router_ids"] for r in got] == ids.tolist()
    chosen = np.array([[True, False], [False, False], [True, True]])
    got = routing(seen([Router(0, 8, 2)], lengths=(3,)), router_ids_NK=ids, chosen_NK=chosen)
    assert [r["router_ids"] for r in got] == [[5], [], [2, 3]]
    assert [len(r["expert_ids"]) for r in got] == [1, 0, 2]


def test_a_missing_number_is_null_and_never_nan() -> None:
    f = seen([Router(0, 8, 2)], lengths=(3,))
    got = routing(f, entropy_N=None, margin_N=np.array([0.5, math.nan, math.inf], np.float32))
    assert [r["entropy"] for r in got] == [None] * 3
    assert [r["margin"] for r in got] == [0.5, None, math.inf]


def test_each_stream_numbers_its_own_tokens() -> None:
    forward = event(seen([Router(0, 8, 2)], lengths=(2,), tags=("b", "a")))
    (main,) = forward.tokens
    forward.tokens = [
        TokenRows("encoder", *(getattr(main, n) for n in TokenRows.__slots__[1:-1])),
        TokenRows("decoder", *(getattr(main, n) for n in TokenRows.__slots__[1:-1])),
    ]
    forward.tokens[1].tag_N = np.array([1, 0], np.int32)
    encoder, decoder = [t.to_pylist() for t in rows.token_tables(forward, 0)]
    assert [r["stream"] for r in encoder + decoder] == ["encoder"] * 2 + ["decoder"] * 2
    assert [r["token"] for r in encoder + decoder] == [0, 1, 0, 1]
    assert [r["tag"] for r in decoder] == ["a", "b"]
    assert [r["token_id"] for r in encoder] == [None, None]


def test_the_users_keys_are_columns_of_sequences() -> None:
    forward = event(seen([Router(0, 8, 2)], lengths=()))
    forward.sequences = [
        SequenceRow(7, "code", keys={"source": "a.py", "split": None}),
        SequenceRow(8, "prose", "req-8", 7, {"split": "held out", "unheard of": "x"}),
    ]
    table = rows.sequence_table(forward, 1, with_keys(("source", "split"))["sequences"])
    head = {"attempt": 1, "step": 0, "forward": 0}
    assert table.to_pylist() == [
        {**head, "sequence": 7, "tag": "code", "request": None, "source": "a.py", "split": None}
        | {"parent": None},
        {**head, "sequence": 8, "tag": "prose", "request": "req-8", "source": None, "parent": 7}
        | {"split": "held out"},
    ]


def test_a_loss_of_a_whole_sequence_has_no_position() -> None:
    losses = Losses(
        9,
        1,
        ["code"],
        np.array([3.0]),
        np.array([2]),
        np.array([4, 5], np.int64),
        None,
        np.array([1.0, 2.0], np.float32),
    )
    head = {"attempt": 2, "step": 9, "forward": 1}
    assert rows.loss_table(losses, 2).to_pylist() == [
        {**head, "sequence": s, "position": None, "kept": None, "loss": loss}
        for s, loss in ((4, 1.0), (5, 2.0))
    ]


def test_a_step_says_what_was_lost_and_what_was_not_seen() -> None:
    forward = event(seen([Router(0, 8, 2), Router(1, 8, 2)], lengths=(3,)))
    forward.fires_seen = 1
    forward.lost_rows = 5  # capture lost some before
    forward.drop_rows()
    (row,) = rows.step_rows([(forward, 9, 4)], 0).to_pylist()
    assert row["lost_rows"] == 5 + 6
    assert (row["fires_expected"], row["fires_seen"]) == (2, 1)
    assert (row["window"], row["breaches"], row["sampled"]) == (9, 4, True)


def test_rows_of_forwards_side_by_side_that_are_given_up_are_said_of_each() -> None:
    forward = event(seen([Router(0, 8, 2), Router(1, 8, 2)], lengths=(3,)))
    forward.parts = [event(seen([], step=i)) for i in range(2)]
    for x in forward.layers:
        assert x.rows is not None
        x.rows.forward_N = np.array([0, 1, 1], np.int32)
    forward.drop_rows()
    assert forward.lost_rows == 6
    assert [part.lost_rows for part in forward.parts] == [2, 4]
