"""Heat maps: what a cell means, from one expert to 94 layers of 384."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.figure_tables import answers

from moe_lens.figures.co_activation import co_activation
from moe_lens.figures.heat import octaves
from moe_lens.figures.hottest import hottest
from moe_lens.figures.load_difference import load_difference
from moe_lens.figures.load_heatmap import load_heatmap
from moe_lens.figures.near_ties import near_ties
from moe_lens.figures.request_load import request_load
from moe_lens.figures.theme import NEVER, OCTAVES
from moe_lens.figures.transitions import transitions


def colour(ratio: float) -> float:
    """Where a ratio should stand, said another way."""
    return NEVER if ratio == 0 else min(max(math.log(ratio, 2), -OCTAVES), OCTAVES)


def test_each_cell_is_the_table_s() -> None:
    table = answers()["load_map"]
    cells = load_heatmap(table).data[0]
    for row in table.to_dict("records"):
        at = row["layer"], row["expert"]
        assert cells.z[at] == pytest.approx(colour(row["ratio"]))
        assert cells.text[at] == pytest.approx(row["ratio"])
        assert cells.customdata[at] == row["routed"]
    assert (cells.z == np.float32(NEVER)).sum() == (table["routed"] == 0).sum() == 3


def test_double_and_half_are_as_far_from_the_middle() -> None:
    assert octaves(np.array([2.0, 0.5, 1.0])).tolist() == [1.0, -1.0, 0.0]
    assert octaves(np.array([100.0, 0.001])).tolist() == [OCTAVES, -OCTAVES]
    assert octaves(np.array([0.0]))[0] == NEVER < -OCTAVES
    assert np.isnan(octaves(np.array([np.nan]))[0])


def test_94_layers_of_384_experts_stay_readable() -> None:
    table = answers(94, 384)["load_map"]
    made = load_heatmap(table)
    cells = made.data[0]
    assert cells.z.shape == (94, 384)
    assert (cells.xgap, cells.ygap) == (0, 0)  # a gap would be as wide as a cell
    plot = made.layout.height - 128
    assert plot / 94 >= 7  # pixels of a row
    assert 94 / made.layout.yaxis.dtick <= 24
    assert 384 / made.layout.xaxis.dtick <= 16
    assert len(made.to_json()) < 700_000


def test_one_layer_and_one_expert() -> None:
    made = load_heatmap(answers(1, 1)["load_map"])
    assert made.data[0].z.tolist() == [[0.0]]
    assert made.data[0].xgap == 1
    assert made.layout.height > 200


def test_layers_with_other_numbers_of_experts_leave_gaps() -> None:
    table = answers(2, 4)["load_map"]
    made = load_heatmap(table[(table["layer"] == 0) | (table["expert"] < 2)])
    assert np.isnan(made.data[0].z).tolist() == [[False] * 4, [False, False, True, True]]


def test_only_some_layers_keep_their_numbers() -> None:
    table = answers(6, 4)["load_map"]
    made = load_heatmap(table[table["layer"] >= 4])
    assert made.data[0].y.tolist() == [4, 5]


def test_a_difference_is_the_ratio_of_ratios() -> None:
    a, b = answers(2, 4)["load_map"], answers(2, 4)["load_map"].copy()
    b["ratio"] = [0.0, 0.0, *b["ratio"][2:] * 2]
    a.loc[1, "ratio"] = 0.0
    z = load_difference(a, b).data[0].z
    assert z[0, 0] == np.float32(NEVER)  # chosen before, never since
    assert z[0, 1] == 0  # never in either
    assert z[0, 2] == z[0, 3] == 1
    assert z[1, 1] == 0


def test_a_difference_names_what_it_compares() -> None:
    a = answers()["load_map"]
    assert load_difference(a, a.assign(run="<i>")).layout.title.subtitle.text == (
        "Load over the mean: &lt;i&gt; over run1"
    )
    assert "after over before" in load_difference(a, a).layout.title.subtitle.text
    assert "week 2 over week 1" in (
        load_difference(a, a, names=("week 1", "week 2")).layout.title.subtitle.text
    )


def test_co_activation_leaves_the_diagonal_out() -> None:
    table = answers()["co_activation"]
    cells = co_activation(table).data[0]
    assert np.isnan(np.diag(cells.z)).all()
    for row in table.to_dict("records"):
        at = row["expert"], row["other"]
        assert cells.z[at] == pytest.approx(colour(row["lift"]))
        assert cells.customdata[at] == row["together"]


def test_transitions_and_requests_count_from_nothing() -> None:
    table = answers()["layer_transitions"]
    made = transitions(table[table["next_expert"] != 1])
    cells, axis = made.data[0], made.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0, max(table["share"]))
    for row in table.to_dict("records"):
        here = cells.z[row["expert"], row["next_expert"]]
        assert here == pytest.approx(0 if row["next_expert"] == 1 else row["share"])
    used = answers()["request_load"]
    z = request_load(used).data[0].z
    assert [z[r["layer"], r["expert"]] for r in used.to_dict("records")] == list(used["chosen"])


def test_pairs_of_384_experts_are_no_higher_than_a_screen() -> None:
    assert co_activation(answers(1, 200)["co_activation"]).layout.height < 800


def test_near_ties_have_a_column_a_bin() -> None:
    table = answers()["near_ties"]
    made = near_ties(table)
    cells = made.data[0]
    assert cells.z.tolist() == [[1 / 8, 3 / 8, 4 / 8]] * 3
    assert [list(c) for c in cells.customdata[0]] == [
        [1, "0 to 3.2e-08"], [3, "0.00032 to 0.001"], [4, "0.1 or more"],
    ]  # fmt: skip
    axis = made.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0, 0.5)  # both, or Plotly starts at the smallest
    assert "50.0 % of 24 token-layers" in made.layout.title.text


def test_hottest_stands_by_place() -> None:
    table = answers()["hottest_experts"]
    made = hottest(table)
    for row in table.to_dict("records"):
        at = ["code", "prose"].index(row["tag"]), row["place"] - 1
        assert made.data[0].z[at] == pytest.approx(colour(row["lift"]))
        assert f"L{row['layer']} E{row['expert']}" in made.data[0].text[at]
