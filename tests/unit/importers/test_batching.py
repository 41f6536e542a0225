"""Sequences laid into forwards: every token once, in order, within the bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.routed import L, choices, requests

from moe_lens.errors import ImportRefused
from moe_lens.importers import batching
from moe_lens.importers.batching import Batcher, Batching
from moe_lens.importers.source import UNKNOWN_PHASE, Pass, Sequence


def laid(sequences: list[Sequence], how: Batching) -> list[Pass]:
    batcher = Batcher(how, list(range(L)))
    passes = [p for s in sequences for p in batcher.add(s)]
    return passes + list(batcher.rest())


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 12),
    seed=st.integers(0, 5),
    tokens=st.integers(1, 20),
    at_once=st.integers(1, 6),
    room=st.sampled_from([1, 10, 25, 1 << 18]),
    unsaid=st.sampled_from([0, 1, 2]),
)
def test_every_token_runs_once_where_it_stands(
    n: int, seed: int, tokens: int, at_once: int, room: int, unsaid: int
) -> None:
    sequences = requests(n, seed)
    for s in sequences[: n * unsaid // 2]:
        s.prompt_tokens = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "IN_FLIGHT", room)
        passes = laid(sequences, Batching(tokens, at_once))
    assert [p.step for p in passes] == list(range(len(passes)))
    found: dict[int, list[int]] = {}
    for p in passes:
        assert p.tokens is not None
        assert p.tokens.token_id_T is not None
        numbers = p.tokens.sequence_T.tolist()
        assert len(set(numbers)) <= at_once
        assert len(numbers) <= (at_once if p.phase == "decode" else tokens)
        if p.phase == "decode":
            assert len(set(numbers)) == len(numbers)
        for t, number in enumerate(numbers):
            s = sequences[number]
            at = len(found.setdefault(number, []))
            found[number].append(t)
            unknown = s.prompt_tokens is None
            prompt = unknown or at < (s.prompt_tokens or 0)
            assert p.phase == (UNKNOWN_PHASE if unknown else "prefill" if prompt else "decode")
            assert p.tokens.position_T[t] == s.first_position + at
            assert s.token_id_T is not None
            assert p.tokens.token_id_T[t] == s.token_id_T[at]
            assert p.tokens.tags[p.tokens.tag_T[t]] == s.tag  # type: ignore[index]
            assert s.weights_TLK is not None
            for layer in range(L):
                assert (p.choices[layer].ids_TK[t] == s.ids_TLK[at, layer]).all()
                weights = p.choices[layer].weights_TK
                assert weights is not None
                assert (weights[t] == s.weights_TLK[at, layer]).all()
            assert (number in p.tokens.request) >= (at == 0)
    assert {k: len(v) for k, v in found.items()} == {
        i: len(s.ids_TLK) for i, s in enumerate(sequences)
    }


def test_sequences_that_run_together_decode_together() -> None:
    sequences = [Sequence(f"{i}", requests(1, i, 1)[0].ids_TLK.repeat(5, 0)) for i in range(3)]
    for s in sequences:
        s.prompt_tokens = 2
    passes = laid(sequences, Batching(100, 3))
    assert [(p.phase, len(p.choices[0].ids_TK)) for p in passes] == [
        ("prefill", 6), ("decode", 3), ("decode", 3), ("decode", 3),
    ]  # fmt: skip


def test_one_that_ends_makes_room_for_the_next() -> None:
    sequences = [Sequence(f"{i}", requests(1, i, 1)[0].ids_TLK.repeat(4, 0)) for i in range(3)]
    for s, prompt in zip(sequences, (3, 1, 2), strict=True):
        s.prompt_tokens = prompt
    passes = laid(sequences, Batching(100, 2))
    run = [(p.phase, sorted(set(p.tokens.sequence_T.tolist()))) for p in passes if p.tokens]
    assert run == [
        ("prefill", [0, 1]), ("decode", [0, 1]),
        ("prefill", [2]), ("decode", [1, 2]), ("decode", [1, 2]),
    ]  # fmt: skip


def test_tokens_in_memory_are_bounded_however_many_places_are_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batching, "IN_FLIGHT", 20)
    batcher = Batcher(Batching(tokens=100, sequences=100), list(range(L)))
    (like,) = requests(1, most=9)
    like = replace(like, ids_TLK=choices(8, 0), prompt_tokens=4, weights_TLK=None, token_id_T=None)
    given = taken = 0
    for _ in range(12):
        given += 8
        for made in batcher.add(like):
            assert made.tokens is not None
            taken += len(made.tokens.sequence_T)
            assert len(set(made.tokens.sequence_T.tolist())) <= 2  # a third has no room beside them
        assert given - taken < 20 + 8


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ids_TLK": np.zeros((3, L), np.int32)}, r"request 0: an array of \(3, 4\), not of"),
        ({"ids_TLK": np.zeros((3, 2, 3), np.int32)}, r"not of \[tokens, 4 layers, top-k\]"),
        ({"weights_TLK": np.zeros((1, L, 2), np.float32)}, r"request 0: weights of \(1, 4, 2\)"),
        ({"token_id_T": np.zeros(70, np.int32)}, "request 0: 70 token ids for"),
        ({"prompt_tokens": 1.5}, "request 0: a prompt of 1.5"),
        ({"first_position": (1 << 31) - 1}, "request 0: a first position of 2147483647"),
        ({"request": 5}, "request 0: the request's id is 5, not text"),
        ({"request": "\ud800"}, "request 0: the request's id .* is no whole text"),
        ({"tag": "\ud800"}, "request 0: the tag .* is no whole text"),
        ({"prompt_tokens": -1}, "request 0: a prompt of -1, in a sequence of 8 tokens"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, object], text: str) -> None:
    (sequence,) = requests(1)
    for name, value in change.items():
        setattr(sequence, name, value)
    with pytest.raises(ImportRefused, match=text):
        laid([sequence], Batching())


def test_another_top_k_in_the_middle_is_refused() -> None:
    first, second = requests(2)
    second.ids_TLK, second.weights_TLK = second.ids_TLK[:, :, :2], None
    with pytest.raises(ImportRefused, match="request 1: top-2, but top-3 before"):
        laid([first, second], Batching())


@pytest.mark.parametrize("bad", [(0, 1), (1, 0), (-5, 2)])
def test_a_batch_of_nothing_is_refused(bad: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one token and one sequence"):
        Batching(*bad)


def test_a_sequence_without_token_ids_beside_one_with_has_unknown_ones() -> None:
    first, second = requests(2)
    first.prompt_tokens = second.prompt_tokens = None
    known, second.token_id_T = first.token_id_T, None
    (made,) = laid([first, second], Batching())
    assert made.tokens is not None
    assert made.tokens.token_id_T is not None
    assert known is not None
    missing = [-1] * len(second.ids_TLK)
    assert made.tokens.token_id_T.tolist() == known.tolist() + missing
