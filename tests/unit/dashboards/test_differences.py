"""What differs between two sides, and the windows of a link."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.traces import layer_info

from moe_lens.queries.info import RunInfo
from moe_lens_dashboards.differences import Answers, by_layer, hottest, shapes
from moe_lens_dashboards.sides import halves, in_link, window


def answers(rows: list[tuple[int, float, float, float | None]]) -> Answers:
    """Of layer, balance, dropped rate, entropy."""
    layers = [r[0] for r in rows]
    entropy = pd.Series([r[3] for r in rows], dtype=float)
    return Answers(
        pd.DataFrame(
            {"layer": layers, "max_over_mean": [r[1] for r in rows], "max_over_mean_floor": 1.25}
        ),
        pd.DataFrame({"layer": layers, "dropped_rate": [r[2] for r in rows]}),
        pd.DataFrame({"layer": layers, "entropy_norm": entropy}),
    )


def run(*layers: tuple[int, int, int | None]) -> RunInfo:
    infos = [layer_info(*each) for each in layers]
    return RunInfo(
        run="", path="", model="", ranks=[], missing_ranks=[], layers=infos, phases=[], steps=0,
        first_step=None, last_step=None, forwards=0, tokens=0, padding_tokens=0, token_rows=0,
        sampling="", weights="", lost_rows=0, breaches=0, fires_expected=0, fires_seen=0,
        attempts=1, ending=None, unfinished=False, last_write_seconds=None,
    )  # fmt: skip


def test_layers_that_both_have_by_their_change() -> None:
    a = answers([(0, 1.0, 0.5, 0.9), (1, 4.0, 0.1, 0.9), (2, 2.0, 0.0, None), (7, 9.0, 0.0, 0.1)])
    b = answers([(0, 1.5, 0.1, 0.2), (1, 1.0, 0.1, 0.8), (2, 2.0, 0.2, 0.5), (8, 1.0, 0.0, 0.1)])
    table = by_layer(a, b, "balance")
    assert list(table["layer"]) == [1, 0, 2]
    assert list(table["balance_change"]) == [-3.0, 0.5, 0.0]
    assert list(table["floor"]) == [1.25] * 3
    assert list(by_layer(a, b, "dropped")["layer"]) == [0, 2, 1]
    entropy = by_layer(a, b, "entropy")
    assert list(entropy["layer"]) == [0, 1, 2]  # what is not known stands last
    assert math.isnan(entropy["entropy_change"].iloc[2])


def test_nothing_in_common() -> None:
    assert by_layer(answers([(0, 1, 0, 0)]), answers([(1, 1, 0, 0)]), "balance").empty


def test_the_hottest_with_their_load_on_the_other_side() -> None:
    here = pd.DataFrame({"layer": 0, "expert": [0, 1, 2], "ratio": [0.5, 2.0, 0.5]})
    there = pd.DataFrame({"layer": 0, "expert": [0, 1], "ratio": [1.5, 0.5]})
    assert hottest(here, there, 2).to_numpy().tolist() == [[0, 1, 2.0, 0.5], [0, 0, 0.5, 1.5]]
    assert math.isnan(hottest(here, there, 3)["other"].iloc[2])


def test_shapes_that_agree_are_not_spoken_of() -> None:
    assert shapes(run((0, 8, 2), (1, 8, 2)), run((0, 8, 2), (1, 8, 2))) == []


def test_how_shapes_differ() -> None:
    a = run((0, 8, 2), (1, 8, 2), (2, 8, 2), (3, 8, 2), (5, 8, 2))
    b = run((0, 8, 2), (1, 16, 2), (2, 16, None), (9, 8, 2))
    assert shapes(a, b) == [
        "Layers 3, 5 of A have none beside them in B.",
        "Layer 9 of B has none beside it in A.",
        "Layers 1 to 2 have 8 experts in A and 16 in B: "
        "an expert's number then does not mean the same expert.",
        "Layer 2 has 2 choices per token (top-k) in A and no fixed number of in B: "
        "loads over the mean then have another range.",
    ]


@pytest.mark.parametrize("text", [None, "", "3", "5-3", "-1-3", "a-b", "0-" + "9" * 16, "0-3 "])
def test_no_window(text: str | None) -> None:
    assert window(text) is None


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_halves_are_all_steps_and_a_link_brings_them_back(first: int, more: int) -> None:
    last = first + more
    a, b = halves(first, last)
    assert (a[0], b[1]) == (first, last)
    assert b[0] == a[1] + 1 or a == b == (first, first)
    assert [window(in_link(w)) for w in (a, b)] == [a, b]
