"""Small passes that are written side by side: each comes out as if it had been alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.reading import new_meta, read_rows
from support.routed import E, K, L, choices, layers

from moe_lens.errors import ImportRefused
from moe_lens.importers import writing
from moe_lens.importers.source import Choices, Counted, Pass, Tokens
from moe_lens.importers.writing import RankWriter
from moe_lens.trace.events import Forward
from moe_lens.trace.schema import TABLES
from moe_lens.trace.windows import SHARED_FORWARDS

Kind = dict[str, Any]


def a_pass(
    step: int,
    T: int = 2,
    *,
    phase: str = "decode",
    weights: bool = True,
    tags: tuple[str, ...] = ("code", "chat", "prose"),
    padding: int = 0,
    token_ids: bool = True,
    dynamic: bool = False,
    **more: Any,
) -> Pass:
    """Two sequences take turns; each has its first tokens in steps 0 and 1."""
    rng = np.random.default_rng(step)
    ids_TLK = choices(T, step).astype(np.int32)
    if dynamic:
        ids_TLK[:, :, K - 1] = np.where(rng.random((T, L)) < 0.5, -1, ids_TLK[:, :, K - 1])
    number = step % 2
    tokens = Tokens(
        sequence_T=np.full(T, number),
        position_T=np.arange(T) + 10 * step,
        token_id_T=rng.integers(0, 99, T) if token_ids else None,
        tag_T=rng.integers(0, len(tags), T) if tags else None,
        tags=tags[step % 3 :] + tags[: step % 3],
        request={number: f"r{number}"} if step < 2 else {},
        padding_T=np.arange(T) >= T - padding if padding else None,
    )
    of = {
        i: Choices(ids_TLK[:, i], rng.random((T, K)).astype(np.float32) if weights else None)
        for i in range(L)
    }
    return Pass(f"record {step}", step // 3, step % 3, phase, of, **{"tokens": tokens} | more)


def counts(step: int, T: int, phase: str = "decode") -> Counted:
    ids_TLK = choices(T, step)
    of = {i: np.bincount(ids_TLK[:, i].ravel(), minlength=E).astype(np.int32) for i in range(L)}
    return Counted(f"record {step}", step, 0, phase, of)


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many passes each event of the trace's writer had."""
    found: list[int] = []
    put = writing.TraceWriter.put

    def spy(self: Any, event: Any) -> None:
        if isinstance(event, Forward):
            found.append(len(event.parts) or 1)
        put(self, event)

    monkeypatch.setattr(writing.TraceWriter, "put", spy)
    return found


def rank_writer(run: Path, *, dynamic: bool = False) -> RankWriter:
    infos = layers(top_k=None if dynamic else K)
    return RankWriter(run, new_meta(layers=infos, weights="exact"), "file")


def written(run: Path, items: list[Any], **more: Any) -> dict[str, list[Any]]:
    w = rank_writer(run, **more)
    for item in items:
        w.put(item)
    w.close()
    return {name: read_rows(run, name) for name in TABLES}


STREAMS: dict[str, tuple[list[Any], Kind]] = {
    "all that a token may have": ([a_pass(i, 1 + i % 3) for i in range(150)], {}),
    "ids alone": ([a_pass(i, 1, weights=False, tags=(), token_ids=False) for i in range(70)], {}),
    "nobody knows whose": ([a_pass(i, tokens=None) for i in range(70)], {}),
    "padding": ([a_pass(i, 3, padding=i % 4) for i in range(70)], {}),
    "dynamic k": ([a_pass(i, dynamic=True) for i in range(70)], {"dynamic": True}),
    "phases in turn": ([a_pass(i, phase=("decode", "prefill")[i // 5 % 2]) for i in range(40)], {}),
    "large ones between": ([a_pass(i, 30 if i % 7 == 3 else 1) for i in range(40)], {}),
    "weights now and then": ([a_pass(i, weights=i % 5 > 1) for i in range(40)], {}),
    "counts": ([counts(i, 1 + i % 3) for i in range(150)], {}),
    "counts, large ones between": ([counts(i, 30 if i % 7 == 3 else 1) for i in range(40)], {}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_tables_are_those_of_passes_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handed: list[int], name: str
) -> None:
    items, more = STREAMS[name]
    together = written(tmp_path / "together", items, **more)
    assert sum(handed) == len(items)
    assert len(handed) < len(items) / 1.5
    handed.clear()
    monkeypatch.setattr(writing, "SHARED_FORWARDS", 1)
    one_by_one = written(tmp_path / "one", items, **more)
    assert handed == [1] * len(items)
    for table in TABLES:
        assert together[table] == one_by_one[table], table


def test_loads_of_single_passes_survive(tmp_path: Path) -> None:
    """`layers`: the largest load of one pass, whose it was, experts touched: by plain loops."""
    items = [a_pass(i, 3, padding=i % 2) for i in range(SHARED_FORWARDS)]
    rows = written(tmp_path, items)["layers"]
    assert [r["layer"] for r in rows] == list(range(L))
    for r in rows:
        most, expert, touched = 0, 0, 0
        for i, item in enumerate(items):
            load = [0] * E
            for ids in item.choices[r["layer"]].ids_TK[: 3 - i % 2].tolist():
                for e in ids:
                    load[e] += 1
            if max(load) > most:
                most, expert = max(load), load.index(max(load))
            touched += sum(n > 0 for n in load)
        assert (r["max_load"], r["max_load_expert"], r["touched"]) == (most, expert, touched)
        assert r["forwards"] == SHARED_FORWARDS


ALONE = {
    "training": lambda i: a_pass(i, phase="train"),
    "as many choices as experts": lambda i: a_pass(i, E // K),
    "a time that is known": lambda i: a_pass(i, t_start_ns=i),
    "counts as many as experts": lambda i: counts(i, E // K),
    "counts of training": lambda i: counts(i, 1, "train"),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_has_a_window_or_a_time_of_its_own_stands_alone(
    tmp_path: Path, handed: list[int], name: str
) -> None:
    written(tmp_path, [ALONE[name](i) for i in range(5)])
    assert handed == [1] * 5


def test_logits_stand_alone(tmp_path: Path, handed: list[int]) -> None:
    items = [a_pass(i) for i in range(5)]
    for item in items:
        for x in item.choices.values():
            x.logits_TE = np.zeros((2, E), np.float32)
    written(tmp_path, items)
    assert handed == [1] * 5


def damaged(step: int) -> Pass:
    item = a_pass(step)
    item.choices[2].ids_TK[1, 0] = E
    return item


@pytest.mark.parametrize("after", [0, 5, 100], ids=["the last", "some follow", "many follow"])
def test_a_bad_pass_among_small_ones_is_named_and_those_before_it_are_kept(
    tmp_path: Path, after: int
) -> None:
    w = rank_writer(tmp_path)
    items = [a_pass(i) for i in range(40)] + [damaged(40)]
    items += [a_pass(i) for i in range(41, 41 + after)]
    place = rf"^file: record 40, layer 2, token 1: expert {E} of {E}\."
    error = None
    with pytest.raises(ImportRefused, match=place):
        try:
            for item in items:
                w.put(item)
        except ImportRefused as e:
            error = e
            raise
        finally:
            w.close(error)
    steps = read_rows(tmp_path, "steps")
    assert [(r["step"], r["forward"]) for r in steps] == [(i // 3, i % 3) for i in range(40)]
    assert len(read_rows(tmp_path, "sequences")) == 2


def test_weights_of_another_width_among_small_passes_are_named(tmp_path: Path) -> None:
    w = rank_writer(tmp_path)
    w.put(a_pass(0))
    odd = a_pass(1)
    for x in odd.choices.values():
        x.weights_TK = np.ones((2, K - 1), np.float32)
    place = rf"^file: record 1, layer 0: weights of \(2, {K - 1}\) for choices of \(2, {K}\)\."
    with pytest.raises(ImportRefused, match=place) as e:
        w.put(odd)
    w.close(e.value)


def test_of_two_bad_places_the_first_is_named(tmp_path: Path) -> None:
    """What the reader refuses comes after what still waits."""
    w = rank_writer(tmp_path)
    w.put(damaged(0))
    w.put(a_pass(1))
    with pytest.raises(ImportRefused, match=r"record 0, layer 2, token 1"):
        w.close(ImportRefused("file: record 2: cut off"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no space")])
def test_another_end_is_not_replaced(tmp_path: Path, error: BaseException) -> None:
    w = rank_writer(tmp_path)
    w.put(damaged(0))
    w.close(error)  # the caller raises it on
    again = rank_writer(tmp_path)  # the lock is free
    again.close()


def test_flush_leaves_nothing_waiting(tmp_path: Path) -> None:
    w = rank_writer(tmp_path)
    for i in range(5):
        w.put(a_pass(i))
    w.flush()
    assert len(read_rows(tmp_path, "steps")) == 5
    assert len(read_rows(tmp_path, "routing")) == 5 * 2 * L
    assert sum(r["routed"] for r in read_rows(tmp_path, "load")) == 5 * 2 * L * K
    w.close()


def test_numbers_of_sequences_that_follow_each_other_take_no_room() -> None:
    rng = np.random.default_rng(0)
    numbers = np.concatenate([rng.permutation(1000), rng.integers(-500, 3000, 2000)]).tolist()
    begun, truth = writing._Begun(), set[int]()
    for number in numbers:
        assert begun.add(number) == (number not in truth)
        truth.add(number)
    assert len(begun._above) < len(truth) - 1000
