"""The figures of expert memory draw the tables that the metrics make, number by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from support.expert_tokens import Sequence_, tokens
from support.figure_tables import answers

from moe_lens.figures.grouping import grouping
from moe_lens.figures.hit_rates import hit_rates
from moe_lens.figures.prefetch import prefetch
from moe_lens.figures.working_set import working_set
from moe_lens.metrics.memory import Memory, measure


@pytest.fixture(scope="module")
def measured() -> Memory:
    rng = np.random.default_rng(0)

    def sequences() -> list[Sequence_]:
        return [
            ("ab"[n % 2], [rng.choice(8, 2, replace=False).tolist() for _ in range(5 + n)])
            for n in range(6)
        ]

    return measure(tokens(sequences(), 8), tokens(sequences(), 8), batch=2)


def line(made: go.Figure, name: str) -> Any:
    (found,) = [t for t in made.data if t.name == name]
    return found


def test_hit_rates(measured: Memory) -> None:
    table = measured.hit_rates
    made = hit_rates(table)
    for column, name in (("lru", "LRU"), ("lfu", "LFU"), ("optimum", "optimum"),
                         ("chance", "by chance")):  # fmt: skip
        assert list(line(made, name).x) == list(range(2, 9))
        assert list(line(made, name).y) == table[column].tolist()
    row = table[table["size"] == 4].iloc[0]
    assert made.layout.title.text == (
        f"With 4 of 8 experts resident LRU hits {100 * row['lru']:.1f} %, "
        f"the optimum {100 * row['optimum']:.1f} %"
    )


def test_a_policy_without_numbers_has_no_line(measured: Memory) -> None:
    made = hit_rates(measured.hit_rates.assign(static=np.nan))
    assert len(made.data) == 5


def test_prefetch_names_the_best(measured: Memory) -> None:
    table = measured.recall
    made = prefetch(table)
    names = {"popularity": "by popularity", "prefix": "by the conversation",
             "last_layer": "by the last layer"}  # fmt: skip
    for column, name in names.items():
        assert list(line(made, name).y) == table[column].tolist()
    two = table.iloc[1]
    ties = [words for column, words in names.items() if two[column] == two[list(names)].max()]
    share = f" are {100 * two[list(names)].max():.1f} % of the choices"
    assert made.layout.title.text in [f"2 of 8 experts named {words}{share}" for words in ties]


def test_working_set(measured: Memory) -> None:
    table = measured.growth
    made = working_set(table)
    assert list(line(made, "mean of sequences").y) == table["touched"].tolist()
    assert list(line(made, "by chance").y) == table["chance"].tolist()
    assert [list(t.y) for t in made.data[2:]] == [table["low"].tolist(), table["high"].tolist()]
    # Of 5 to 10 tokens: all six sequences have 4, three have 8, one has 10.
    half = table[table["tokens"] == 8].iloc[0]
    assert f"After 8 tokens a conversation has touched {half['touched']:.1f}" in (
        made.layout.title.text
    )


def test_grouping(measured: Memory) -> None:
    table = measured.groups
    made = grouping(table)
    assert list(line(made, "of one tag").x) == table["grouped"].tolist()
    assert list(line(made, "mixed").x) == table["mixed"].tolist()
    assert list(made.layout.yaxis.ticktext) == ["all tags", "a", "b"]
    assert f"{table['ratio'].iloc[0]:.3f} times" in made.layout.title.text


def test_the_tables_made_by_hand_have_the_columns_of_these(measured: Memory) -> None:
    made = answers()
    for name in ("hit_rates", "recall", "growth", "groups"):
        assert set(made[name].columns) - {"run"} <= set(getattr(measured, name).columns), name
