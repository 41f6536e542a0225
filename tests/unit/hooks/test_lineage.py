"""Rows of a cache that grows, is cropped and reordered, against texts that are kept whole."""

from __future__ import annotations

import gc

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens_hooks.lineage import Line, Routed, Rows, StagedOutcomes
from moe_lens_hooks.wrapping import _listeners, listen, silence


def routed(number, B, S, again=0, layout="bs", rows=True, padding=None):
    T = B * (S + again)
    token_N = np.arange(T)
    row_T = token_N // (S + again) if layout == "bs" else token_N % B
    return Routed(
        step=number,
        forward=10 + number,
        shape=(B, S),
        again=again,
        layout=layout,
        token_N=token_N if rows else None,
        sequence_N=row_T if rows else None,
        position_N=torch.arange(T) + 100 * number if rows else None,
        padding_T=padding,
    )


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 3)),
        st.tuples(st.just("cut"), st.integers(0, 3)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 2), min_size=1, max_size=4)),
        st.tuples(st.just("skip"), st.integers(1, 2)),
    ),
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(actions, st.integers(1, 3))
def test_rows_against_whole_texts(actions, B):
    rows = Rows([Line(b, b) for b in range(B)])
    texts: list[list[int | None]] = [[] for _ in range(B)]
    numbers = list(range(B))
    fresh = iter(range(B, 1000))
    nodes = 0
    forwards: list[list[list[int | None]]] = []
    for what, how in actions:
        B, before = len(texts), {n for t in texts for n in t if n is not None}
        if what == "add":
            rows.add(routed(len(forwards), B, how))
            for text in texts:
                text += range(nodes, nodes + how)
                nodes += how
            forwards.append([list(t) for t in texts])
            lost = set()
        elif what == "cut":
            length = max(0, len(texts[0]) - how)
            lost = set(rows.cut(length).tolist())
            texts = [t[:length] for t in texts]
        elif what == "skip":
            rows.skip(how)
            texts = [t + [None] * how for t in texts]
            lost = set()
        else:
            source = [i % B for i in how]
            parents = []

            def fork(line, parents=parents):
                parents.append(line.number)
                return Line(next(fresh), line.sampled_as, parent=line.number)

            lost = set(rows.reorder(source, fork).tolist())
            texts = [list(texts[i]) for i in source]
            first = [source.index(i) == at for at, i in enumerate(source)]
            old = [numbers[i] for i in source]
            assert parents == [n for n, f in zip(old, first, strict=True) if not f]
            numbers = [x.number for x in rows.lines]
            assert [n for n, f in zip(numbers, first, strict=True) if f] == [
                n for n, f in zip(old, first, strict=True) if f
            ]
            assert len(set(numbers)) == len(numbers)
        after = {n for t in texts for n in t if n is not None}
        assert lost == before - after
        assert rows.length == len(texts[0])
    for at, then in enumerate(forwards):
        for row, text in enumerate(then):
            if rows.forwards[at].shape[1]:
                gaps = [i for i, n in enumerate(text) if n is None]  # which nobody saw
                seen = text[gaps[-1] + 1 :] if gaps else text
                assert rows.path(at, row) == seen[::-1]


def test_outcomes_are_of_tokens_with_rows_that_are_no_padding():
    rows = Rows([Line(0, 0), Line(1, 1)])
    rows.add(routed(0, 2, 3, padding=torch.tensor([True, False, False, False, False, False])))
    rows.add(routed(1, 2, 1, rows=False))
    rows.add(routed(2, 2, 1, again=3, layout="sb"))
    lost = rows.cut(0)
    out = StagedOutcomes(rows.tokens(lost), kept=False).resolve()
    assert not out.kept
    got = list(zip(out.step_N, out.forward_N, out.sequence_N, out.position_N, strict=True))
    first = [(0, 10, 0, 1), (0, 10, 0, 2), (0, 10, 1, 3), (0, 10, 1, 4), (0, 10, 1, 5)]
    # tokens 0 to 5 of the last forward were routed before; 6 and 7 are the new ones
    assert sorted(got) == [*first, (2, 12, 0, 206), (2, 12, 1, 207)]


class Base:
    def go(self, x):
        return x + 1


class Derived(Base):
    def go(self, x):
        return super().go(x) * 10


class Ear:
    def __init__(self):
        self.heard = []

    def hear(self, owner, args, kwargs):
        from contextlib import contextmanager

        @contextmanager
        def around():
            box = []
            yield box
            self.heard.append((type(owner).__name__, args, kwargs, box))

        return around()


def test_methods_are_listened_to_on_their_class_and_left_as_they_were():
    before = vars(Base)["go"], vars(Derived)["go"]
    a, b = Ear(), Ear()
    listen(Derived, "go", a.hear)
    listen(Base, "go", a.hear)
    listen(Base, "go", a.hear)  # twice is once
    listen(Base, "go", b.hear)
    listen(Base, "nothing", b.hear)
    assert Derived().go(1) == 20
    assert a.heard == [("Derived", (1,), {}, [20])]  # once, though both methods ran
    assert Base().go(x=2) == 3
    assert b.heard == [("Base", (), {"x": 2}, [3])]
    silence(a.hear)
    assert vars(Derived)["go"] is before[1]
    Base().go(5)
    assert len(b.heard) == 2
    del b
    gc.collect()  # nobody is left to listen
    assert vars(Base)["go"] is before[0]
    assert not any(cls in (Base, Derived) for cls, _ in _listeners)
