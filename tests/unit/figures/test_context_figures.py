"""The figures of context draw the tables that the metrics make, number by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from support.expert_tokens import tokens
from support.figure_tables import answers

from moe_lens.figures.order_change import order_change
from moe_lens.figures.prefix_recall import prefix_recall
from moe_lens.metrics.constellation import by_beginning, foretold


def line(made: go.Figure, name: str) -> Any:
    (found,) = [t for t in made.data if t.name == name]
    return found


def test_recall_over_the_length_of_the_beginning() -> None:
    rng = np.random.default_rng(0)
    talks = [("a", [rng.choice(8, 2, replace=False).tolist() for _ in range(12)]) for _ in "abc"]
    of = tokens(talks, 8)
    beginnings = (0.5, 2, 4, 8, 12)  # a share has no place on the axis, nothing follows 12 tokens
    found = [foretold(of, np.ones(36, bool), n) for n in beginnings]
    table = by_beginning(found, 3)
    assert table["tokens"].tolist() == [2, 4, 8]
    made = prefix_recall(table)
    for column, name in (("prefix", "by the beginning"), ("popularity", "by popularity"),
                         ("oracle", "best, in hindsight"), ("chance", "by chance")):  # fmt: skip
        assert list(line(made, name).x) == [2, 4, 8]
        expected = [x.recall[column][2] for x in found if x.prefix in (2, 4, 8)]
        assert list(line(made, name).y) == expected
    longest = found[3].recall.iloc[2]
    assert made.layout.title.text == (
        f"The 3 experts that 8 tokens chose most take {100 * longest['prefix']:.1f} % of what "
        f"follows, as many popular ones {100 * longest['popularity']:.1f} %"
    )


def test_one_conversation_has_no_popularity() -> None:
    of = tokens([("a", [{0, 1}, {0, 2}, {0, 1}])], 4)
    made = prefix_recall(by_beginning([foretold(of, np.ones(3, bool), 1)], 2))
    assert {t.name for t in made.data} == {"by the beginning", "best, in hindsight", "by chance"}
    assert made.layout.title.text.endswith("take 75.0 % of what follows")


def test_changes_by_distance() -> None:
    table = answers()["by_distance"]
    made = order_change(table)
    for layer in range(3):
        of = table[table["layer"] == layer]
        assert list(line(made, f"layer {layer}").x) == [0, 1, 2, 4]
        assert list(line(made, f"layer {layer}").y) == of["set_changed"].tolist()
    assert made.layout.title.text == (
        "After a cut 51.0 % of the tokens change their experts, 4 tokens further on 21.0 %"
    )
    assert made.layout.xaxis.title.text == "tokens since the cut (from 0, 1, 2, 4, 8, … on)"
