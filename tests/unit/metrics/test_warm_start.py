"""Loads after a beginning against a cache that is played token by token, for every size."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.expert_tokens import Sequence_, conversations, tokens

from moe_lens.metrics.warm_start import STARTS, loads

EXPERTS = 5


def played(stack: list[int], sets: list[set[int]], counted: list[bool], size: int) -> int:
    """Loads of LRU. `stack`: what is resident, used last at the end."""
    content = stack[len(stack) - min(size, len(stack)) :]
    missed = 0
    for needed, counts in zip(sets, counted, strict=True):
        missed += len(needed - set(content)) * counts
        # Of one access the higher id leaves first: it counts as used longer ago.
        content = [e for e in content if e not in needed] + sorted(needed, reverse=True)
        content = content[-size:]
    return missed


def used(sets: list[set[int]]) -> list[int]:
    out: list[int] = []
    for needed in sets:
        out = [e for e in out if e not in needed] + sorted(needed, reverse=True)
    return out


@settings(max_examples=60)
@given(sequences=conversations(EXPERTS, most=4), prefix=st.sampled_from([1, 2, 0.5]),
       data=st.data())  # fmt: skip
def test_loads_are_those_of_a_cache(
    sequences: list[Sequence_], prefix: float, data: st.DataObject
) -> None:
    # Of a conversation the prompt comes first, and is in another phase.
    prompts = [data.draw(st.integers(0, len(of))) for _, of in sequences]
    counted = [[p >= n for p in range(len(of))]
               for n, (_, of) in zip(prompts, sequences, strict=True)]  # fmt: skip
    flat = np.array([x for of in counted for x in of])
    texts = [data.draw(st.integers(0, 3)) for _ in sequences]
    found = loads(tokens(sequences, EXPERTS), flat, prefix, np.array(texts))
    largest = max(len(s) for _, of in sequences for s in of)
    assert found.loads["size"].tolist() == list(range(largest, EXPERTS + 1))
    own = [Counter(e for s, c in zip(of, flags, strict=True) if c for e in s)
           for (_, of), flags in zip(sequences, counted, strict=True)]  # fmt: skip
    for size, *got in found.loads.itertuples(index=False):
        expected = dict.fromkeys(STARTS[:4], 0)
        for s, ((_, of), flags) in enumerate(zip(sequences, counted, strict=True)):
            of = [set(x) for x in of]
            n = math.ceil(prefix * len(of)) if prefix < 1 else int(prefix)
            places = [p for p in range(n, len(of)) if flags[p]]
            if not places:
                continue
            begun = Counter(e for x in of[:n] for e in x)
            others = sum((c for o, c in enumerate(own) if texts[o] != texts[s]), Counter())
            popular = sorted(range(EXPERTS), key=lambda e: (-others[e], e))
            begun_first = sorted(range(EXPERTS), key=lambda e: (-begun[e], -others[e], e))
            rest, asked = of[places[0] :], flags[places[0] :]
            for name, stack in (("cold", []), ("popularity", popular[::-1]),
                                ("prefix", begun_first[::-1]),
                                ("kept", used(of[: places[0]]))):  # fmt: skip
                expected[name] += played(stack, rest, asked, size)
        if found.loads["popularity"].isna().all():
            expected["popularity"] = pytest.approx(math.nan, nan_ok=True)
        assert dict(zip(STARTS[:4], got[:4], strict=True)) == expected
        assert got[4] <= min(x for x in got[:4] if not math.isnan(x))


def test_what_was_asked_for() -> None:
    of = tokens([("a", [{0}, {0}, {1}, {1, 2}]), ("a", [{3}])], EXPERTS)
    found = loads(of, np.ones(5, bool), 2)
    assert (found.prefix, found.sequences, found.tokens, found.requests) == (2, 1, 2, 3)


def test_a_conversation_that_goes_on_as_it_began_needs_no_loads() -> None:
    talk = [("a", [{0, 1}] * 6), ("a", [{2, 3}] * 6)]
    of = tokens(talk, EXPERTS)
    row = loads(of, np.ones(12, bool), 2).loads.iloc[0]
    assert (row["size"], row["cold"], row["popularity"]) == (2, 4, 4)
    assert row["prefix"] == row["kept"] == row["optimum"] == 0
