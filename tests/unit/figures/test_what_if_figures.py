"""Figures of the page What if and of sets by layer: what stands out is what the rows say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from support.figure_tables import answers

from moe_lens.figures.knock_out_by_load import knock_out_by_load
from moe_lens.figures.regret_by_slice import regret_by_slice
from moe_lens.figures.sets_by_layer import sets_by_layer
from moe_lens.figures.top_k_sweep import top_k_sweep


def test_experts_stand_at_their_load_and_cost_and_causal_ones_are_marked() -> None:
    table = answers(experts=8)["expert_importance"]
    made = knock_out_by_load(table.sample(frac=1, random_state=0))
    where = {
        int(data[0]): (trace.name, x, y, text)
        for trace in made.data
        for x, y, data, text in zip(trace.x, trace.y, trace.customdata, trace.text, strict=True)
    }
    for row in table.itertuples():
        kind = (
            "dormant but causal" if row.expert == 2 else "dormant" if row.expert == 0 else "expert"
        )
        named = str(row.expert) if row.expert in (2, 5, 6, 7) else ""
        assert where[row.expert] == (kind, row.load, row.knock_out, named)
    assert (
        "Expert 7 costs most to lose: 0.0650; by load it is number 1 of 8" in made.layout.title.text
    )
    assert "1 of 8 are dormant but causal" in made.layout.title.subtitle.text


def test_the_rank_correlation_does_not_depend_on_sizes() -> None:
    table = pd.DataFrame(
        {
            "expert": range(4),
            "load": [0.1, 0.2, 0.3, 0.9],
            "knock_out": [3.0, 2.0, 1.0, -5.0],
            "knock_out_error": np.nan,
        }
    )
    assert "rank correlation of load and cost -1.00" in (
        knock_out_by_load(table).layout.title.subtitle.text.lower()
    )


def test_slices_of_tags_are_text() -> None:
    table = answers(tags=("<b>x</b>", "prose"))["route_regret"]
    made = regret_by_slice(table)
    assert list(made.layout.yaxis.ticktext) == ["&lt;b&gt;x&lt;/b&gt;", "prose"]
    assert [list(t.x) for t in made.data] == [[0.1, 1.1], [0.2, 0.2], [-0.05, -0.05]]
    assert "Regret is highest for prose: 1.1000, of a drawn route 0.2000" in made.layout.title.text


def test_the_sweep_leaves_the_runner_up_out_and_names_what_gains() -> None:
    table = answers(layers=2)["route_changes"]
    made = top_k_sweep(table)
    assert [list(t.x) for t in made.data] == [[1, 2, 3, 4]] * 2
    assert "Top-4 of layer 0 costs most: 0.4000" in made.layout.title.text
    assert "top-2 of layer 1 gains 0.0100" in made.layout.title.text
    assert [list(t.error_y.array) for t in made.data] == [[0.004] * 4] * 2


@pytest.mark.parametrize("error", [0.006, None])
def test_a_gain_within_two_errors_is_none(error: float | None) -> None:
    table = answers(layers=2)["route_changes"].assign(cost_error=error)
    assert "gains" not in top_k_sweep(table).layout.title.text


def test_sets_are_titled_by_the_layer_furthest_below_chance() -> None:
    table = answers(layers=3)["sets_by_layer"]
    made = sets_by_layer(table)
    assert made.layout.yaxis.type == "log"
    assert sets_by_layer(table.assign(possible=120)).layout.yaxis.type != "log"  # 98 to 120
    assert made.layout.title.text.startswith("500 tokens use 98 sets in layer 2, 88.9 % of")
    assert len(made.data) == 4
