"""Grouping by tag on routings whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from support.expert_tokens import Sequence_, tokens

from moe_lens.metrics.grouping import by_tag


def made(kinds: dict[str, list[int]], each: int, length: int = 6, seed: int = 0) -> list[Sequence_]:
    """`each` sequences of each tag, whose tokens choose 2 of the tag's experts."""
    rng = np.random.default_rng(seed)
    sequences = [
        (tag, [rng.choice(pool, 2, replace=False).tolist() for _ in range(length)])
        for tag, pool in kinds.items()
        for _ in range(each)
    ]
    return [sequences[i] for i in rng.permutation(len(sequences))]


def test_tags_with_experts_of_their_own() -> None:
    found = by_tag(
        tokens(made({"a": [*range(8)], "b": [*range(8, 16)]}, 20), 16), 8, draws=2000
    ).set_index("tag")
    # Of 8 experts, 8 tokens of two choices touch 8 (1 - (3/4)^8) = 7.2. Mixed: four of each on
    # average, binomially (without replacement) spread around it.
    assert found.loc["a", "grouped"] == pytest.approx(8 * (1 - 0.75**8), abs=0.1)
    half = [_hypergeometric(j) * (16 - 8 * 0.75**j - 8 * 0.75 ** (8 - j)) for j in range(9)]
    assert found.loc["all tags", "mixed"] == pytest.approx(sum(half), abs=0.15)
    assert found.loc["all tags", "ratio"] < 0.75 < found.loc["all tags", "null_low"]
    assert found.loc["all tags", "sequences"] == 40
    assert found.loc["a", "chance"] == pytest.approx(16 * (1 - (14 / 16) ** 8))


def _hypergeometric(j: int) -> float:
    from math import comb

    return comb(20, j) * comb(20, 8 - j) / comb(40, 8)


def test_three_tags_stay_apart() -> None:
    kinds = {"a": [0, 1], "b": [2, 3, 4], "c": [5, 6, 7, 8]}
    found = by_tag(tokens(made(kinds, 12), 9), 8).set_index("tag")["grouped"]
    assert found["a"] == 2
    assert found["b"] <= 3
    assert found["c"] <= 4
    assert found["all tags"] == pytest.approx((found["a"] + found["b"] + found["c"]) / 3, abs=0.2)


def test_tags_that_mean_nothing_save_nothing() -> None:
    everything = [*range(16)]
    found = by_tag(tokens(made({"a": everything, "b": everything}, 30), 16), 8).iloc[0]
    assert found["ratio"] == pytest.approx(1, abs=4 * found["ratio_se"])
    assert found["null_low"] < 1 < found["null_high"]
    assert 0 < found["ratio_se"] < 0.02


def test_small_tags_are_left_out_of_mixed_batches_too() -> None:
    big, small = {"a": [0, 1], "b": [0, 1]}, {"rare": [2, 3]}
    found = by_tag(tokens(made(big, 5) + made(small, 3), 4), 4)
    assert found["tag"].tolist() == ["all tags", "a", "b"]
    assert (found["grouped"] == 2).all()
    assert (found["mixed"] == 2).all()
    assert found["sequences"].tolist() == [10, 5, 5]


def test_a_tag_is_drawn_as_often_as_it_has_sequences() -> None:
    many, few = made({"a": [0, 1]}, 30), made({"b": [*range(2, 16)]}, 10)
    found = by_tag(tokens(many + few, 16), 4, draws=2000).set_index("tag")["grouped"]
    assert found["a"] == 2
    # The standard error of a mean over two thousand batches of either kind is below 0.05.
    expected = (30 * found["a"] + 10 * found["b"]) / 40
    assert found["all tags"] == pytest.approx(expected, abs=0.2)
    assert expected < (found["a"] + found["b"]) / 2 - 0.5


def test_one_tag_has_no_answer() -> None:
    found = by_tag(tokens(made({"a": [0, 1]}, 9), 4), 4)
    assert len(found) == 0
    assert "ratio" in found


def test_the_seed_says_which_batches() -> None:
    here = tokens(made({"a": [*range(6)], "b": [*range(4, 10)]}, 9), 10)
    once, again, other = (by_tag(here, 4, seed=s) for s in (1, 1, 2))
    assert once.equals(again)
    assert not once.equals(other)


def test_a_batch_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="2 sequences or more; got 1"):
        by_tag(tokens([("a", [[0]])], 2), 1)
