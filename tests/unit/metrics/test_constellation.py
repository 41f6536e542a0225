"""What a beginning foretells, against plain loops; and its laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.expert_tokens import Sequence_, conversations, tokens

from moe_lens.metrics.constellation import after, foretold

EXPERTS = 5
PREFIXES = st.sampled_from([1, 2, 3, 0.25, 0.5])


def looped(
    sequences: list[Sequence_],
    counted: list[list[bool]],
    prefix: float,
    cover: float,
    texts: list[int],
) -> dict[str, object]:
    """Sequence after sequence, choice after choice."""

    def count(s: int, places: range, only: bool) -> list[int]:
        return [
            sum(e in sequences[s][1][p] for p in places if counted[s][p] or not only)
            for e in range(EXPERTS)
        ]

    hits = {name: [0] * (EXPERTS + 1) for name in ("prefix", "popularity", "oracle")}
    covered = dict.fromkeys([*hits, "chance"], 0.0)
    choices, sizes, used, known = 0, [], 0, False
    for s, (_, of) in enumerate(sequences):
        n = math.ceil(prefix * len(of)) if prefix < 1 else int(prefix)
        begun, rest = count(s, range(min(n, len(of))), False), count(s, range(n, len(of)), True)
        if not sum(rest) or not sum(begun):
            continue
        others = [
            sum(count(o, range(len(sequences[o][1])), True)[e]
                for o in range(len(sequences)) if texts[o] != texts[s])
            for e in range(EXPERTS)
        ]  # fmt: skip
        known |= any(others)
        order = {
            "prefix": sorted(range(EXPERTS), key=lambda e: (-begun[e], -others[e], e)),
            "popularity": sorted(range(EXPERTS), key=lambda e: (-others[e], e)),
            "oracle": sorted(range(EXPERTS), key=lambda e: (-rest[e], e)),
        }
        least = cover * sum(begun) - 1e-9
        size = 1
        while sum(begun[e] for e in order["prefix"][:size]) < least:
            size += 1
        sizes.append(size)
        used, choices = used + 1, choices + sum(rest)
        covered["chance"] += size / EXPERTS * sum(rest)
        for name, experts in order.items():
            covered[name] += sum(rest[e] for e in experts[:size])
            for m in range(EXPERTS + 1):
                hits[name][m] += sum(rest[e] for e in experts[:m])
    return {"hits": hits, "covered": covered, "choices": choices, "sizes": sizes, "used": used,
            "known": known}  # fmt: skip


@given(
    sequences=conversations(EXPERTS), prefix=PREFIXES, cover=st.sampled_from([0.5, 0.9, 1.0]),
    data=st.data(),
)  # fmt: skip
def test_recall_is_that_of_a_loop(
    sequences: list[Sequence_], prefix: float, cover: float, data: st.DataObject
) -> None:
    counted = [[data.draw(st.booleans()) for _ in of] for _, of in sequences]
    flat = np.array([x for of in counted for x in of])
    texts = [data.draw(st.integers(0, 3)) for _ in sequences]
    found = foretold(tokens(sequences, EXPERTS), flat, prefix, cover, np.array(texts))
    loop = looped(sequences, counted, prefix, cover, texts)
    assert (found.sequences, found.choices) == (loop["used"], loop["choices"])
    if not loop["choices"]:
        assert found.recall[["prefix", "oracle"]].isna().all(axis=None)
        return
    assert found.covering == pytest.approx(np.mean(loop["sizes"]))
    for name, hits in loop["hits"].items():
        if name == "popularity" and not loop["known"]:
            assert found.recall[name].isna().all()
            continue
        assert found.recall[name].tolist() == pytest.approx([h / loop["choices"] for h in hits[1:]])
        assert found.covered[name] == pytest.approx(loop["covered"][name] / loop["choices"])
    assert found.covered["chance"] == pytest.approx(loop["covered"]["chance"] / loop["choices"])


@given(sequences=conversations(EXPERTS), prefix=PREFIXES)
def test_more_experts_find_more_and_nothing_beats_the_oracle(
    sequences: list[Sequence_], prefix: float
) -> None:
    of = tokens(sequences, EXPERTS)
    recall = foretold(of, np.ones(len(of), bool), prefix).recall.dropna(axis=1)
    for name in set(recall) & {"prefix", "popularity", "oracle"}:
        assert (np.diff(recall[name]) >= -1e-12).all()
        assert recall[name].iloc[-1] == pytest.approx(1)
        assert (recall["oracle"] >= recall[name] - 1e-12).all()


def test_a_sequence_does_not_make_its_own_popularity() -> None:
    """The one sequence that uses expert 4 is foretold by the others, which never do."""
    of = tokens([("a", [{0}] * 4), ("a", [{0}] * 4), ("a", [{4}] * 4)], EXPERTS)
    found = foretold(of, np.ones(12, bool), 2)
    assert found.recall["popularity"][0] == pytest.approx(4 / 6)
    assert found.recall["prefix"][0] == 1


def test_nor_does_another_one_of_its_text() -> None:
    of = tokens([("a", [{0}] * 4), *[("a", [{4}] * 4)] * 3], EXPERTS)
    every = np.ones(16, bool)
    assert foretold(of, every, 2).recall["popularity"][0] == pytest.approx(6 / 8)
    apart = foretold(of, every, 2, text_S=np.array([0, 1, 1, 1]))
    assert apart.recall["popularity"][0] == 0  # 4 foretells the first, and 0 the others
    alone = foretold(of, every, 2, text_S=np.zeros(4, np.int64))
    assert alone.recall["popularity"].isna().all()


@pytest.mark.parametrize(("prefix", "begun"), [(1, 1), (3, 3), (0.5, 3), (0.3, 2), (9, 5)])
def test_how_long_a_beginning_is(prefix: float, begun: int) -> None:
    of = tokens([("a", [{0}] * 5)], EXPERTS)
    assert after(of, prefix).tolist() == [False] * begun + [True] * (5 - begun)
