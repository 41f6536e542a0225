"""Windows: which forwards share one, and what is summed, counted or kept apart inside it."""

from __future__ import annotations

import copy
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.events import Router, Row, event, losses_event, seen
from support.reading import new_meta, read_rows

from moe_lens.trace import windows
from moe_lens.trace.events import Forward, LayerCounts, Losses, StepEnd
from moe_lens.trace.tables import window_tables
from moe_lens.trace.windows import Window, stands_alone
from moe_lens.trace.writer import TraceWriter

SMALL = Router(0, 40, 2)  # 40 experts: a few tokens of two choices each stay below


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(windows, "time", clock)
    return clock


def small(tokens: int = 3, phase: str = "decode", **more: Any) -> Forward:
    return event(seen([SMALL], lengths=(tokens,), phase=phase, **more))


def layer(experts: int = 4, tags: int = 1, number: int = 0, **more: Any) -> LayerCounts:
    """A layer in which nothing happened but what `more` says."""
    none = np.zeros((tags, experts), np.int64)
    fields: dict[str, Any] = {
        "layer": number,
        "tokens": 0,
        "padding_tokens": 0,
        "tokens_G": np.zeros(tags, np.int64),
    }
    fields |= {"routed_GE": none, "processed_GE": none, "weight_sum_GE": none * 0.0}
    return LayerCounts(**fields | more)


def forward(*layers: LayerCounts, tags: tuple[str, ...] = ("code",), **more: Any) -> Forward:
    none = np.zeros(len(tags), np.int64)
    fields: dict[str, Any] = {"step": 0, "forward": 0, "phase": "decode", "t_start_ns": 0}
    out = Forward(**fields | {"tags": list(tags), "tokens_G": none, "sequences_G": none} | more)
    out.layers = list(layers)
    return out


def window(*forwards: Forward) -> dict[str, list[Row]]:
    out = Window(0, 0, forwards[0])
    for f in forwards:
        assert f is forwards[0] or out.takes(f)
        out.add(f)
    return {name: table.to_pylist() for name, table in window_tables([out]).items()}


@pytest.mark.parametrize(
    ("router", "tokens", "phase", "alone"),
    [
        (Router(0, 40, 2), 3, "decode", False),
        (Router(0, 40, 2), 19, "decode", False),
        (Router(0, 40, 2), 20, "decode", True),  # tokens x k = experts
        (Router(0, 40, 3, dynamic=True), 39, "decode", False),
        (Router(0, 40, 3, dynamic=True), 40, "decode", True),
        (Router(0, 40, 2, capacity=64), 3, "decode", True),
        (Router(0, 40, 2), 3, "train", True),
        (Router(0, 40, 2), 0, "prefill", False),
    ],
)
def test_a_forward_stands_alone_where_a_capacity_applies_or_it_fills_the_experts(
    router: Router, tokens: int, phase: str, alone: bool
) -> None:
    f = event(seen([Router(7, 40, 1), router], lengths=(tokens,), phase=phase))
    assert stands_alone(f) is alone
    assert Window(0, 0, f).alone is alone


def test_small_forwards_of_one_phase_share_a_window(clock: Clock) -> None:
    out = Window(0, 0, small())
    assert out.takes(small())
    assert not out.takes(small(phase="prefill"))
    assert not out.takes(small(tokens=20))
    assert not out.takes(event(seen([Router(0, 40, 2, capacity=64)], phase="decode")))


def test_a_window_that_stands_alone_takes_no_other(clock: Clock) -> None:
    assert not Window(0, 0, small(tokens=20)).takes(small())


def test_a_shared_window_ends_after_a_second(clock: Clock) -> None:
    first = small()
    out = Window(0, 0, first)
    second = int(windows.SHARED_SECONDS * 1e9)
    for later, takes in ((second, True), (second + 1, False), (-second, True)):
        other = small()
        other.t_start_ns = first.t_start_ns + later
        assert out.takes(other) is takes  # by when it ran, not by when the writer sees it
    clock.now += windows.SHARED_SECONDS
    assert not out.expired()
    clock.now += 0.01
    assert out.expired()


def test_forwards_of_unknown_time_share_a_window_up_to_a_number() -> None:
    known = forward(layer(40, tokens=1))
    unknown = forward(layer(40, tokens=1), t_start_ns=None)
    for first, other in ((unknown, unknown), (unknown, known), (known, unknown)):
        out = Window(0, 0, first)
        for _ in range(windows.SHARED_FORWARDS):
            assert out.takes(other)
            out.add(other)
        assert not out.takes(other)


def test_tags_grow_inside_a_shared_window() -> None:
    first = seen([SMALL], tags=("code",), lengths=(2, 1), phase="decode")
    then = seen([SMALL], tags=("prose", "code"), lengths=(3, 2), phase="decode", seed=3)
    got = window(event(first), event(then), event(first))
    for tag in ("code", "prose"):
        tokens = [t for f in (first, then, first) for t in f.tokens if t.tag == tag]
        assert tokens
        (router,) = (r for r in got["routers"] if r["tag"] == tag)
        (slice_,) = (r for r in got["slices"] if r["tag"] == tag)
        assert router["tokens"] == slice_["tokens"] == len(tokens)
        routed = sum(r["routed"] for r in got["load"] if r["tag"] == tag)
        assert routed == len(tokens) * SMALL.top_k


def test_a_layer_first_seen_late_in_a_window_has_the_tags_seen_before() -> None:
    one = layer(tokens=1, tokens_G=np.array([1]), routed_GE=np.array([[0, 0, 0, 1]]))
    two = layer(number=1, tokens=1, tokens_G=np.array([1]), routed_GE=np.array([[1, 0, 0, 0]]))
    got = window(forward(one, tags=("code",)), forward(two, tags=("prose",)))
    assert [(r["layer"], r["tag"], r["expert"]) for r in got["load"]] == [
        (0, "code", 3),
        (1, "prose", 0),
    ]
    assert [(r["layer"], r["tag"], r["tokens"]) for r in got["routers"]] == [
        (0, "code", 1),
        (1, "prose", 1),
    ]


def test_rows_of_a_window_come_by_layer() -> None:
    f = event(seen([Router(n, 40, 2) for n in (9, 2, 5)], phase="decode", lengths=(3,)))
    got = window(f)
    for name in ("load", "layers", "routers"):
        order = [r["layer"] for r in got[name]]
        assert order == sorted(order)
        assert set(order) == {2, 5, 9}


def test_max_load_is_the_largest_in_one_forward_and_touched_adds_up() -> None:
    def loads(*processed: int) -> Forward:
        counts = np.array([processed])
        return forward(layer(tokens=1, processed_GE=counts, routed_GE=counts))

    (row,) = window(loads(2, 0, 1, 0), loads(0, 0, 3, 0), loads(2, 0, 0, 1))["layers"]
    assert (row["max_load"], row["max_load_expert"]) == (3, 2)
    assert row["touched"] == 2 + 1 + 2
    assert (row["forwards"], row["tokens"]) == (3, 3)


def test_choices_moved_to_an_expert_are_load_of_it() -> None:
    own, moved = np.array([[3, 0, 2, 0]]), np.array([[0, 1, 2, 0]])
    (row,) = window(forward(layer(processed_GE=own, rerouted_in_GE=moved)))["layers"]
    assert (row["max_load"], row["max_load_expert"], row["touched"]) == (4, 2, 3)


def test_max_load_is_of_an_expert_over_all_tags() -> None:
    counts = np.array([[2, 0, 3, 0], [2, 0, 0, 0]])
    f = forward(layer(tags=2, processed_GE=counts, routed_GE=counts), tags=("code", "prose"))
    (row,) = window(f)["layers"]
    assert (row["max_load"], row["max_load_expert"], row["touched"]) == (4, 0, 2)


def test_a_forward_without_tokens_has_a_row_of_zeros() -> None:
    got = window(event(seen([Router(0, 4, 2)], lengths=())))
    assert got["load"] == got["routers"] == got["slices"] == []
    (row,) = got["layers"]
    assert (row["forwards"], row["tokens"], row["max_load"], row["touched"]) == (1, 0, 0, 0)


def test_a_batch_of_padding_alone_is_counted_as_padding() -> None:
    got = window(event(seen([Router(0, 4, 2)], lengths=(5,), padding=1.0)))
    assert sum(r["padding"] for r in got["load"]) == 5 * 2
    assert sum(r["routed"] + r["processed"] for r in got["load"]) == 0
    assert got["routers"] == []
    assert got["slices"] == []
    assert got["layers"][0]["padding_tokens"] == 5


@pytest.mark.parametrize("name", ["routed_GE", "processed_GE", "padding_GE", "received_GE"])
def test_load_leaves_out_zeros_and_nothing_else(name: str) -> None:
    counts = layer(**{name: np.array([[0, 2, 0, 0]])})
    (row,) = window(forward(counts))["load"]
    assert row["expert"] == 1
    assert row[name.removesuffix("_GE")] == 2


def test_load_keeps_an_expert_that_got_rerouted_choices_alone() -> None:
    counts = layer(
        routed_GE=np.array([[3, 0, 0, 0]]),
        processed_GE=np.array([[1, 0, 0, 0]]),
        overflowed_GE=np.array([[2, 0, 0, 0]]),
        rerouted_in_GE=np.array([[0, 0, 2, 0]]),
        weight_sum_GE=np.array([[0.5, 0, 0.5, 0]]),
    )
    got = window(forward(counts))["load"]
    assert [(r["expert"], r["rerouted_in"]) for r in got] == [(0, 0), (2, 2)]


def test_what_no_forward_knew_is_null() -> None:
    counts = layer(tokens=1, tokens_G=np.array([1]), routed_GE=np.array([[1, 0, 0, 0]]))
    got = window(forward(counts))
    assert got["load"][0]["prob_sum"] is None
    assert got["load"][0]["received"] is None
    sums = ("entropy_sum", "margin_sum", "top1_prob_sum", "zloss_sum")
    assert [got["routers"][0][n] for n in sums] == [None] * 4
    assert got["layers"][0]["capacity"] is None


def test_what_one_layer_knows_and_another_does_not_is_null_in_the_other_alone() -> None:
    counts = np.array([[1, 0, 0, 0]])
    knows = layer(number=0, routed_GE=counts, received_GE=counts + 4, prob_sum_GE=counts * 0.5)
    got = window(forward(knows, layer(number=1, routed_GE=counts)))["load"]
    assert [r["received"] for r in got] == [5, 4, 4, 4, None]
    assert [r["prob_sum"] for r in got] == [0.5, 0, 0, 0, None]


def known(entropy: bool, tokens: int = 1) -> Forward:
    counts = layer(
        tokens=tokens,
        tokens_G=np.array([tokens]),
        routed_GE=np.array([[tokens, 0, 0, 0]]),
        entropy_sum_G=np.array([1.5 * tokens]) if entropy else None,
        prob_sum_GE=np.array([[0.5, 0.5, 0, 0]]) if entropy else None,
    )
    return forward(counts)


def test_a_sum_that_was_unknown_at_first_stays_unknown() -> None:
    got = window(known(False), known(True))
    assert got["routers"][0]["entropy_sum"] is None
    assert got["load"][0]["prob_sum"] is None


def test_a_sum_that_becomes_unknown_is_unknown() -> None:
    got = window(known(True), known(False))
    assert got["routers"][0]["tokens"] == 2
    assert got["routers"][0]["entropy_sum"] is None
    assert got["load"][0]["prob_sum"] is None


def test_a_nan_in_a_sum_of_one_tag_is_null_there_alone() -> None:
    counts = layer(
        tags=2,
        tokens_G=np.array([1, 1]),
        routed_GE=np.array([[1, 0, 0, 0], [1, 0, 0, 0]]),
        entropy_sum_G=np.array([1.5, math.nan]),
    )
    got = window(forward(counts, tags=("code", "prose")))["routers"]
    assert [r["entropy_sum"] for r in got] == [1.5, None]


def test_counts_first_seen_late_in_a_window_are_not_lost() -> None:
    pads = layer(padding_tokens=1, padding_GE=np.array([[0, 1, 0, 0]]), nonfinite_G=np.array([0]))
    some = layer(tokens=2, tokens_G=np.array([2]), nonfinite_G=np.array([2]))
    got = window(forward(layer()), forward(pads), forward(some), forward(pads))
    assert [(r["expert"], r["padding"]) for r in got["load"]] == [(1, 2)]
    assert got["routers"][0]["nonfinite_tokens"] == 2
    assert got["layers"][0]["padding_tokens"] == 2


def test_a_shared_window_leaves_the_forwards_as_they_were() -> None:
    full = Router(0, 40, 2, logits=True)
    made = [seen([full], lengths=(2, 1), tags=t, phase="decode") for t in (("a",), ("b", "a"))]
    forwards = [event(f) for f in made]
    before = copy.deepcopy(forwards)
    got = window(*forwards, forwards[0])
    assert sum(r["routed"] for r in got["load"]) == 9 * 2
    for old, new in zip(before, forwards, strict=True):
        assert new.tags == old.tags
        np.testing.assert_array_equal(new.tokens_G, old.tokens_G)
        for x, y in zip(old.layers, new.layers, strict=True):
            for name in LayerCounts.__slots__:
                if name != "rows":
                    np.testing.assert_equal(getattr(y, name), getattr(x, name), name)


# ---- through the writer: losses, flushes, ends of steps -----------------------------------------


def slices(run: Path) -> dict[tuple[int, str], tuple[int, float | None, int]]:
    """(window, tag) to tokens, loss_sum, loss_tokens: rows of one key summed, as readers do."""
    out: dict[tuple[int, str], tuple[int, float | None, int]] = {}
    for r in read_rows(run, "slices"):
        key = r["window"], r["tag"]
        tokens, loss, n = out.get(key, (0, None, 0))
        if r["loss_sum"] is not None:
            loss = (loss or 0.0) + r["loss_sum"]
        out[key] = tokens + r["tokens"], loss, n + r["loss_tokens"]
    return out


def loss(tag: str, value: float, n: int = 1) -> Losses:
    none = np.zeros(0)
    ids = none.astype(np.int64)
    return Losses(0, 0, [tag], np.array([value]), np.array([n]), ids, None, none.astype(np.float32))


def train(step: int) -> Forward:
    return event(seen([Router(0, 8, 2)], step=step, phase="train", lengths=(4,), tags=("code",)))


@pytest.mark.parametrize("between", ["nothing", "flush", "step end", "flush and step end"])
def test_losses_go_to_the_window_of_their_forward(tmp_path: Path, between: str) -> None:
    writer = TraceWriter(tmp_path, new_meta())
    for step in range(3):
        writer.put(train(step))
        if "flush" in between:
            writer.flush()
        if "step end" in between:
            writer.put(StepEnd(step))
        writer.put(loss("code", 10.0 + step, 4))
        writer.put(loss("prose", 0.5, 1))  # a tag of which the forward had no token
    writer.close()
    assert slices(tmp_path) == {
        (step, tag): (4, 10.0 + step, 4) if tag == "code" else (0, 0.5, 1)
        for step in range(3)
        for tag in ("code", "prose")
    }
    assert [r["window"] for r in read_rows(tmp_path, "steps")] == [0, 1, 2]
    for r in read_rows(tmp_path, "slices"):
        assert (r["step"], r["phase"]) == (r["window"], "train")


def test_losses_without_tokens_behind_them_are_null_and_not_zero(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, new_meta())
    writer.put(train(0))
    writer.close()
    assert slices(tmp_path) == {(0, "code"): (4, None, 0)}


def test_the_end_of_a_step_closes_a_window_of_training_and_no_shared_one(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, new_meta())
    for step in range(3):
        writer.put(small(step=step))
        writer.put(StepEnd(step))
    writer.put(train(3))
    writer.put(StepEnd(3))
    writer.close()
    assert [r["window"] for r in read_rows(tmp_path, "steps")] == [0, 0, 0, 1]


def test_a_shared_window_is_written_after_its_second_without_another_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "SHARED_SECONDS", 0.0)
    writer = TraceWriter(tmp_path, new_meta())
    done = _appended(writer, monkeypatch, "load")
    writer.put(small())
    assert done.wait(20)
    writer.close()
    assert [r["forwards"] for r in read_rows(tmp_path, "layers")] == [1]


def _appended(writer: TraceWriter, monkeypatch: pytest.MonkeyPatch, table: str) -> threading.Event:
    done = threading.Event()
    append = writer._store.append

    def watched(name: str, rows: Any) -> None:
        append(name, rows)
        if name == table:
            done.set()

    monkeypatch.setattr(writer._store, "append", watched)
    return done


def test_a_forward_that_stood_alone_shares_no_window_after_a_flush_and_its_losses(
    tmp_path: Path,
) -> None:
    writer = TraceWriter(tmp_path, new_meta())
    big = seen([SMALL], lengths=(30,), phase="eval", losses=True)
    writer.put(event(big))
    writer.flush()
    writer.put(losses_event(big))
    writer.put(small(phase="eval", forward=1))
    writer.close()
    assert [r["window"] for r in read_rows(tmp_path, "steps")] == [0, 1]


@pytest.mark.parametrize(
    ("one", "other", "want"), [(3, 4, 7), (0, 4, 4), (3, None, None), (None, 4, None)]
)
def test_times_of_all_to_alls_are_known_where_every_forward_saw_them(
    one: int | None, other: int | None, want: int | None
) -> None:
    forwards = [forward(layer(dispatch_ns=x, combine_ns=9)) for x in (one, other)]
    window = Window(0, 0, forwards[0])
    for x in forwards:
        window.add(x)
    layers = window_tables([window])["layers"]
    assert layers["dispatch_ns"].to_pylist() == [want]
    assert layers["combine_ns"].to_pylist() == [18]
