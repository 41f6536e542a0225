"""Whole-depth paths against a Counter of tuples, planted paths, and independent layers."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_lens.metrics.paths import MEASURES, paths, sentence


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 30)).flatmap(
        lambda shape: arrays(np.int64, shape, elements=st.integers(-1, 2))
    )
)
@settings(max_examples=40, deadline=None)
def test_paths_are_tuples(ids_LN: np.ndarray) -> None:
    tuples = [tuple(x) for x in ids_LN.T.tolist() if min(x) >= 0]
    counts = [n for _, n in Counter(tuples).most_common()]
    made = paths(ids_LN)
    assert (made.layers, made.tokens) == (len(ids_LN), len(tuples))
    values = made.values
    assert list(values) == list(MEASURES)
    assert values["distinct"] == len(counts)
    if not tuples:
        assert made.chance == {}
        return
    n = len(tuples)
    assert values["coverage"] == pytest.approx(1 - counts.count(1) / n)
    assert values["top_10"] == pytest.approx(sum(counts[:10]) / n)
    assert values["top_1_percent"] == pytest.approx(sum(counts[: -(-len(counts) // 100)]) / n)
    if counts.count(1) / n <= 0.5:
        wanted = -sum(c / n * math.log2(c / n) for c in counts)
        assert values["entropy"] == pytest.approx(wanted, abs=1e-9)
    else:
        assert math.isnan(values["entropy"])
    same = sum(c * (c - 1) for c in counts)
    if n > 1:
        assert values["effective"] == (pytest.approx(n * (n - 1) / same) if same else math.inf)


def test_layers_that_know_nothing_of_each_other() -> None:
    ids_LN = np.random.default_rng(0).integers(0, 6, (3, 2000))
    made = paths(ids_LN)
    for name in MEASURES:
        assert made.chance[name].beyond(made.values[name]) == "", name
    assert made.chance["effective"].expected == pytest.approx(216, rel=0.05)
    assert made.chance["entropy"].expected == pytest.approx(math.log2(216), abs=0.1)


def test_loads_are_kept_and_paths_are_not() -> None:
    """Four paths through eight layers, each layer used evenly: shuffled, few tokens meet again."""
    path_N = np.random.default_rng(0).integers(0, 4, 1000)
    rng = np.random.default_rng(1)
    made = paths(np.stack([rng.permutation(4)[path_N] for _ in range(8)]))
    assert made.values["distinct"] == 4
    assert made.values["effective"] == pytest.approx(4, rel=0.02)
    assert made.values["top_10"] == 1
    chance = made.chance
    # 4^8 paths, 1000 tokens.
    assert chance["distinct"].expected == pytest.approx(
        65536 * (1 - math.exp(-1000 / 65536)), abs=3
    )
    beyond = {name: chance[name].beyond(made.values[name]) for name in MEASURES}
    assert beyond == {
        "distinct": "low", "coverage": "high", "entropy": "", "effective": "low",
        "top_1_percent": "high", "top_10": "high",
    }  # fmt: skip
    assert math.isnan(chance["entropy"].expected)  # coverage of the shuffled is too low
    words = sentence(made)
    assert words.startswith("1,000 tokens take 4 (shuffled: 992) different paths through 8 layers;")
    assert "the ten commonest carry 100.0 % (shuffled: " in words


def test_a_load_that_all_share_is_no_shared_path() -> None:
    """Nine of ten tokens choose expert 0 in every layer by itself."""
    rng = np.random.default_rng(5)
    ids_LN = np.where(rng.random((4, 3000)) < 0.9, 0, rng.integers(1, 8, (4, 3000)))
    made = paths(ids_LN)
    assert made.values["top_10"] > 0.7
    for name in ("top_10", "distinct", "effective"):
        assert made.chance[name].beyond(made.values[name]) == ""


def test_one_percent_of_paths_is_rounded_up() -> None:
    """150 paths: the two commonest, of 5 and 3 tokens."""
    path_N = np.concatenate([np.repeat([0, 1], [5, 3]), np.arange(2, 150)])
    made = paths(np.stack([path_N, path_N]))
    assert made.values["distinct"] == 150
    assert made.values["top_1_percent"] == pytest.approx(8 / 156)


def test_the_order_of_experts_matters_by_layer() -> None:
    """Expert 1 then 2 is not expert 2 then 1: a sum of numbers would take them for one."""
    assert paths(np.array([[1, 2], [2, 1]])).values["distinct"] == 2
