"""Recall of predicted experts against loops that rank all experts for every token."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.expert_tokens import Sequence_, conversations, table, tokens

from moe_lens.metrics.prefetch import recall
from moe_lens.metrics.tokens import tokens_of

EXPERTS = 5


def flat(made: list[Sequence_]) -> list[tuple[int, set[int]]]:
    return [(n, set(e)) for n, (_, of) in enumerate(made) for e in of]


def expected(
    made: list[Sequence_], first: int, before: dict[int, set[int]], name: str, m: int
) -> float:
    here = flat(made)
    popular = Counter(e for _, needed in here[:first] for e in needed)
    pairs: dict[int, Counter[int]] = defaultdict(Counter)
    for nth, (_, needed) in enumerate(here[:first]):
        for i in before.get(nth, ()):
            pairs[i].update(needed)
    found = of = 0
    for nth, (sequence, needed) in enumerate(here):
        if nth < first or (name == "last_layer" and nth not in before):
            continue
        prefix = Counter(e for s, past in here[:nth] if s == sequence for e in past)
        score: dict[str, Any] = {
            "popularity": lambda e: 0,
            "prefix": lambda e, prefix=prefix: prefix[e],
            "last_layer": lambda e, nth=nth: round(sum(
                pairs[i][e] / pairs[i].total() for i in before[nth] if pairs[i]), 9),
        }  # fmt: skip
        ranked = sorted(range(EXPERTS), key=lambda e: (-score[name](e), -popular[e], e))
        found += len(needed & set(ranked[:m]))
        of += len(needed)
    return found / of if of else math.nan


@settings(deadline=None, max_examples=40)
@given(made=conversations(EXPERTS, 4), data=st.data())
def test_recall_is_that_of_ranking_each_token(made: list[Sequence_], data: st.DataObject) -> None:
    here = flat(made)
    first = data.draw(st.integers(0, len(here) - 1))
    seen = st.sets(st.integers(0, 2), min_size=1, max_size=2)
    before = {nth: data.draw(seen) for nth in range(len(here)) if data.draw(st.booleans())}
    rows = table([("a", [before.get(nth, []) for nth in range(len(here))])])
    found = recall(tokens(made, EXPERTS), first, tokens_of(rows, 3))
    assert list(found["size"]) == list(range(1, EXPERTS + 1))
    for row in found.to_dict("records"):
        assert row["chance"] == row["size"] / EXPERTS
        for name in ("popularity", "prefix", "last_layer"):
            want = expected(made, first, before, name, int(row["size"]))
            if first == 0 and name != "prefix":
                want = math.nan
            assert row[name] == pytest.approx(want, nan_ok=True), name


def test_what_is_scored_is_not_fitted_on() -> None:
    """Noise has no transitions: fitted on itself, 40 tokens of 32 experts would seem to."""
    rng = np.random.default_rng(0)

    def noise() -> list[Sequence_]:
        return [("a", [rng.choice(32, 2, replace=False).tolist() for _ in range(20)])] * 2

    here, before = noise(), noise()
    own = recall(tokens(here, 32), 20, tokens(before, 32))
    # The second sequence is the first again, so that its transitions were fitted on.
    assert own.set_index("size")["last_layer"][8] > 0.7
    rng = np.random.default_rng(1)
    fresh = [here[0], noise()[0]]
    other = recall(tokens(fresh, 32), 20, tokens([before[0], noise()[0]], 32))
    # Of 40 choices chance finds a quarter; 0.07 is its standard error.
    assert other.set_index("size")["last_layer"][8] == pytest.approx(0.25, abs=0.25)
    assert other["last_layer"].iloc[-1] == 1


def test_a_layer_that_follows_the_last_is_foreseen() -> None:
    rng = np.random.default_rng(2)
    before = [("a", [rng.choice(16, 2, replace=False).tolist() for _ in range(100)])] * 2
    after = [("a", [[(5 * e + 3) % 16 for e in ids] for ids in of]) for _, of in before]
    found = recall(tokens(after, 16), 100, tokens(before, 16)).set_index("size")
    assert found["last_layer"][2] == 1.0
    assert found["popularity"][2] < 0.4


def test_without_a_layer_before_there_is_no_number() -> None:
    found = recall(tokens([("a", [[0], [1]])], 4), 1)
    assert found["last_layer"].isna().all()
