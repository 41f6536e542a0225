"""Working sets against loops over each sequence, and against the closed form of chance."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from support.expert_tokens import Sequence_, conversations, tokens

from moe_lens.metrics.working_set import by_chance, by_sequence, over_time


@settings(deadline=None, max_examples=40)
@given(made=conversations(6))
def test_what_each_sequence_touches_and_needs(made: list[Sequence_]) -> None:
    rows = by_sequence(tokens(made, 6)).to_dict("records")
    choices = [len(set(e)) for _, of in made for e in of]
    k = sum(choices) / len(choices)
    assert len(rows) == len(made)
    for number, ((tag, of), row) in enumerate(zip(made, rows, strict=True)):
        counts = Counter(e for needed in of for e in set(needed))
        assert (row["sequence"], row["tag"], row["tokens"]) == (number, tag, len(of))
        assert row["touched"] == len(counts)
        assert row["chance"] == pytest.approx(6 - 6 * (1 - k / 6) ** len(of))
        for share in (90, 95, 99):
            taken, needed = 0, 0
            for _, n in counts.most_common():
                if 100 * taken >= share * counts.total():
                    break
                taken, needed = taken + n, needed + 1
            assert row[f"needed_{share}"] == needed


@settings(deadline=None, max_examples=40)
@given(made=conversations(6))
def test_growth_is_the_mean_of_those_long_enough(made: list[Sequence_]) -> None:
    rows = over_time(tokens(made, 6)).to_dict("records")
    longest = max(len(of) for _, of in made)
    assert [r["tokens"] for r in rows] == [t for t in (1, 2, 4) if t < longest] + [longest]
    for row in rows:
        tau = row["tokens"]
        seen = [len(set().union(*of[:tau])) for _, of in made if len(of) >= tau]
        assert row["sequences"] == len(seen)
        assert row["touched"] == pytest.approx(sum(seen) / len(seen))
        assert (row["low"], row["high"]) == (min(seen), max(seen))


def test_no_tokens() -> None:
    assert len(over_time(tokens([], 4))) == len(by_sequence(tokens([], 4))) == 0


@pytest.mark.parametrize(
    ("experts", "top_k", "tau", "expected"),
    [(64, 8, 1, 8), (64, 8, 4, 26.5), (64, 8, 16, 56.4), (64, 8, 64, 64),
     (256, 8, 8, 57.4), (256, 8, 64, 222.4)],
)  # fmt: skip
def test_chance_has_known_values(experts: int, top_k: int, tau: int, expected: float) -> None:
    assert float(by_chance(experts, top_k, tau)) == pytest.approx(expected, abs=0.05)


def test_a_uniform_router_touches_what_chance_says() -> None:
    rng = np.random.default_rng(3)
    made = [
        ("a", [rng.choice(32, 4, replace=False).tolist() for _ in range(16)]) for _ in range(300)
    ]
    growth = over_time(tokens(made, 32)).set_index("tokens")
    # The distinct experts of a sequence vary by 2 at most; over 300 of them, 0.12.
    assert growth["touched"].to_numpy() == pytest.approx(growth["chance"].to_numpy(), abs=0.5)
