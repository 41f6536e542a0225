"""Figures of the granularity laboratory: lines, maps and titles are what the rows say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from support.figure_tables import answers

from moe_lens.figures.granularity_gap import granularity_gap
from moe_lens.figures.granularity_sweeps import granularity_sweeps
from moe_lens.figures.input_regions import input_regions
from moe_lens.figures.realised_sets import realised_sets


def lines(made: go.Figure) -> dict[str, dict[float, float]]:
    return {
        str(t.name): dict(zip(map(float, t.x), map(float, t.y), strict=True)) for t in made.data
    }


def column(table: pd.DataFrame, x: str, y: str) -> dict[float, float]:
    return {float(row[x]): float(row[y]) for row in table.to_dict("records")}


def test_the_gap_is_a_line_a_teacher_beside_the_authors() -> None:
    table = answers(experts=3)["gap"]
    made = granularity_gap(table.sample(frac=1, random_state=0))
    assert lines(made) == {
        "of 6e3a": column(table, "top_k", "nmse"),
        "of 6e3a, the author's": column(table, "top_k", "published"),
        "best affine map": dict.fromkeys([1.0, 2.0, 3.0], 0.36),
    }
    assert made.layout.title.text.endswith(
        "with 1 of its experts a token is off by 0.3000, with 3 by 0.1000"
    )


def test_without_the_authors_numbers_there_is_no_line_of_them() -> None:
    made = granularity_gap(answers()["gap"].assign(published=None))
    assert set(lines(made)) == {"of 8e4a", "best affine map"}


def test_an_affine_map_is_of_one_teacher() -> None:
    one = answers(experts=3)["gap"]
    both = pd.concat([one, one.assign(teacher="4e2a", teacher_top_k=2, nmse=one["nmse"] / 2)])
    made = lines(granularity_gap(both.drop(columns="published")))
    assert set(made) == {"of 4e2a", "of 6e3a"}
    assert made["of 4e2a"] == pytest.approx({k: v / 2 for k, v in made["of 6e3a"].items()})


def test_sweeps_are_a_line_for_width_and_one_for_number() -> None:
    table = answers(layers=3)["sweeps"]
    made = granularity_sweeps(table.sample(frac=1, random_state=0))
    drawn = lines(made)
    for swept, named in (("width", "wider experts"), ("experts", "more experts")):
        of = table[table["swept"] == swept]
        assert drawn[f"k = 2, {named}"] == column(of, "factor", "nmse")
        assert set(drawn[f"k = 2, {named}, the author's"].values()) == {0.25}
    assert drawn["best affine map"] == dict.fromkeys([1.0, 2.0, 4.0, 8.0], 0.36)
    assert "up to 8 times as large are off by 0.1536 at best" in made.layout.title.text


def test_a_map_has_each_point_where_it_lies() -> None:
    table = answers(layers=3, experts=4)["pictures"]
    made = input_regions(table.sample(frac=1, random_state=0))
    (heat,) = made.data
    colour: dict[int, float] = {}
    for row in table.itertuples():
        at = list(heat.y).index(row.y), list(heat.x).index(row.x)
        assert heat.text[at] == row.chosen
        colour.setdefault(row.region, float(heat.z[at]))
        assert heat.z[at] == pytest.approx(colour[row.region])
    assert len(set(np.round(list(colour.values()), 4))) == 3
    assert f"{table['picture'].iloc[0]}: at least 3 regions" in made.layout.title.text


def test_sets_stand_beside_all_that_there_are() -> None:
    made = realised_sets(answers(layers=3)["realised"].sample(frac=1, random_state=0))
    assert lines(made) == {
        "in use": {2: 20, 4: 40, 8: 60},
        "possible, C(m, k)": dict.fromkeys([2.0, 4.0, 8.0], 12_870),
    }
    assert "With 2 inputs 20 of 12,870 sets are in use (0.16 %)" in made.layout.title.text
