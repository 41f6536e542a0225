"""Tokens from a table, cut in two, as accesses of tokens and of forwards."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from support.expert_tokens import Sequence_, conversations, table, tokens

from moe_lens.metrics.accesses import Accesses
from moe_lens.metrics.tokens import tokens_of


def sets(asked: Accesses) -> list[list[int]]:
    bounds = zip(asked.starts, asked.starts[1:], strict=False)
    return [asked.expert_ids[a:b].tolist() for a, b in bounds]


@settings(deadline=None, max_examples=40)
@given(made=conversations(6))
def test_tokens_are_those_of_the_table(made: list[Sequence_]) -> None:
    found = tokens(made, 6)
    flat = [(n, tag, i, sorted(e)) for n, (tag, of) in enumerate(made) for i, e in enumerate(of)]
    assert found.sequences.tolist() == [n for n, *_ in flat]
    assert found.tags.tolist() == [tag for _, tag, *_ in flat]
    assert found.positions.tolist() == [i for *_, i, _ in flat]
    assert sets(found.accesses()) == [e for *_, e in flat]
    assert found.top_k == pytest.approx(sum(len(e) for *_, e in flat) / len(flat))
    # Each sequence is a forward of its own here.
    union = [sorted(set().union(*of)) for _, of in made]
    assert sets(found.accesses("forward")) == union


@settings(deadline=None, max_examples=40)
@given(made=conversations(6))
def test_the_cut_is_between_sequences_and_nearest_the_middle(made: list[Sequence_]) -> None:
    found = tokens(made, 6)
    cut = found.half()
    lengths = [len(of) for _, of in made]
    between = [sum(lengths[:i]) for i in range(1, len(lengths))]
    if between:
        assert cut in between
        assert abs(cut - len(found) / 2) == min(abs(b - len(found) / 2) for b in between)
        assert found.half("forward") == between.index(cut) + 1
    else:
        assert cut == len(found) // 2
        assert found.half("forward") == 0
    first, second = found.until(cut), found.since(cut)
    assert sets(first.chosen) + sets(second.chosen) == sets(found.chosen)
    assert [*first.nth, *second.nth] == found.nth.tolist()


def test_tokens_of_interleaved_sequences_have_no_conversations() -> None:
    rows = table([("a", [[0], [1]]), ("a", [[2], [3]])])
    order = {0: 0, 1: 2, 2: 1, 3: 3}
    mixed = rows.assign(nth=rows["nth"].map(order)).sort_values("nth")
    with pytest.raises(ValueError, match="by = sequence"):
        tokens_of(mixed, 4).begins()


def test_no_rows_are_no_tokens() -> None:
    found = tokens([], 4)
    assert len(found) == len(found.accesses()) == len(found.accesses("forward")) == 0
    assert found.begins().tolist() == []
