"""The numbers that a figure draws are those of its table, found again by plain loops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go
import pytest
from support.figure_tables import STEPS, TAGS, answers

from moe_lens.figures.all_to_all import all_to_all
from moe_lens.figures.capacity_curve import capacity_curve
from moe_lens.figures.drops_by_layer import drops_by_layer
from moe_lens.figures.drops_by_tag import drops_by_tag
from moe_lens.figures.drops_over_time import drops_over_time
from moe_lens.figures.entropy_by_layer import entropy_by_layer
from moe_lens.figures.expert_companions import expert_companions
from moe_lens.figures.expert_over_time import expert_over_time
from moe_lens.figures.expert_positions import expert_positions
from moe_lens.figures.expert_tags import expert_tags
from moe_lens.figures.forwards_over_time import forwards_over_time
from moe_lens.figures.load_over_time import load_over_time
from moe_lens.figures.loss_by_tag import loss_by_tag
from moe_lens.figures.quality_by_tag import quality_by_tag
from moe_lens.figures.quality_of_dropped import quality_of_dropped
from moe_lens.figures.repetition import repetition
from moe_lens.figures.replay_layers import replay_layers
from moe_lens.figures.router_over_time import VALUES, router_over_time
from moe_lens.figures.unserved_by_position import unserved_by_position

MANY = 12
"""Layers, more than there are lines."""


def rows(question: str, **size: Any) -> list[dict[str, Any]]:
    return answers(**size)[question].to_dict("records")


def trace(made: go.Figure, name: str) -> Any:
    (found,) = [t for t in made.data if t.name == name]
    return found


def line(made: go.Figure, name: str) -> dict[float, float]:
    found = trace(made, name)
    return dict(zip((float(x) for x in found.x), map(float, found.y), strict=True))


def weighted(pairs: Iterable[tuple[float, float]]) -> float:
    pairs = list(pairs)
    return sum(v * w for v, w in pairs) / sum(w for _, w in pairs)


def test_few_layers_are_a_line_each() -> None:
    made = load_over_time(answers(layers=3)["load_over_time"])
    assert [t.name for t in made.data] == ["layer 0", "layer 1", "layer 2"]
    for row in rows("load_over_time", layers=3):
        assert line(made, f"layer {row['layer']}")[row["step"]] == row["max_over_mean"]


def test_many_layers_are_a_median_the_worst_and_a_band() -> None:
    found = rows("load_over_time", layers=MANY)
    made = load_over_time(answers(layers=MANY)["load_over_time"])
    of = {
        i: weighted((r["max_over_mean"], r["assignments"]) for r in found if r["layer"] == i)
        for i in range(MANY)
    }
    worst = max(of, key=lambda layer: of[layer])
    assert f"Layer {worst} " in made.layout.title.text
    assert f"{of[worst]:.1f}×" in made.layout.title.text
    named = [t.name for t in made.data]
    assert named == ["median layer", f"layer {worst}", None, "all 12 layers"]
    low, high = made.data[2:]
    assert high.fill == "tonexty"
    for i, step in enumerate(STEPS):
        ordered = sorted(r["max_over_mean"] for r in found if r["step"] == step)
        assert (low.y[i], high.y[i]) == (ordered[0], ordered[-1])
        assert line(made, "median layer")[step] == pytest.approx(sum(ordered[5:7]) / 2)
        (expected,) = (
            r["max_over_mean"] for r in found if (r["step"], r["layer"]) == (step, worst)
        )
        assert line(made, f"layer {worst}")[step] == expected


def test_drops_over_time_are_of_all_choices() -> None:
    made = drops_over_time(answers()["load_over_time"])
    for step in STEPS:
        here = [r for r in rows("load_over_time") if r["step"] == step]
        for name, column in (("dropped", "dropped_rate"), ("overflowed", "overflow_rate")):
            expected = weighted((r[column], r["assignments"]) for r in here)
            assert line(made, name)[step] == pytest.approx(expected)
    assert list(trace(made, "dropped, layer 2").y) == pytest.approx([0.12, 0.12, 0.12])


@pytest.mark.parametrize("value", VALUES)
def test_router_over_time_by_tag(value: str) -> None:
    made = router_over_time(answers()["router_over_time"], value)
    for tag in TAGS:
        for step in STEPS:
            here = [r for r in rows("router_over_time") if (r["step"], r["tag"]) == (step, tag)]
            expected = weighted((r[value], r["tokens"]) for r in here)
            assert line(made, tag)[step] == pytest.approx(expected)


def test_router_over_time_of_one_tag_is_by_layer() -> None:
    made = router_over_time(answers(tags=("all",))["router_over_time"], "margin")
    for row in rows("router_over_time", tags=("all",)):
        assert line(made, f"layer {row['layer']}")[row["step"]] == row["margin"]


def test_an_unknown_value_is_refused() -> None:
    with pytest.raises(ValueError, match="entropy_norm, margin, top1_prob, zloss; got 'loss'"):
        router_over_time(answers()["router_over_time"], "loss")


def test_expert_over_time() -> None:
    made = expert_over_time(answers()["expert_over_time"])
    for i, row in enumerate(rows("expert_over_time")):
        assert line(made, "load / mean")[row["step"]] == row["ratio"]
        assert trace(made, "load / mean").customdata[i] == row["routed"]
        kept = row["ratio"] * (row["routed"] - row["dropped"]) / row["routed"]
        assert line(made, "not dropped")[row["step"]] == pytest.approx(kept)
    assert "330 choices, 9.09 % dropped" in made.layout.title.text


def test_expert_tags_are_sorted_by_share() -> None:
    made = expert_tags(answers()["expert_tags"])
    ordered = sorted(rows("expert_tags"), key=lambda r: -r["share"])
    assert list(trace(made, "this expert").x) == [r["share"] for r in ordered]
    assert list(trace(made, "all experts").x) == [r["overall_share"] for r in ordered]
    assert list(made.layout.yaxis.ticktext) == [r["tag"] for r in ordered]


def test_expert_positions() -> None:
    made = expert_positions(answers()["expert_serves"])
    placed = [r for r in rows("expert_serves") if r["kind"] == "position"]
    assert len(made.data[0].y) == len(placed) == 3
    for i, row in enumerate(placed):
        assert made.data[0].y[i] == row["share"]
        assert list(made.data[0].customdata[i]) == [row["value"], row["chosen"], row["tokens"]]
        assert made.data[0].x[i] - made.data[0].width / 2 == row["value"] - 0.5
    assert made.layout.shapes[0].y0 == pytest.approx((4 + 5 + 6) / 48)


def test_companions_stand_beside_chance() -> None:
    made = expert_companions(answers()["expert_companions"])
    for i, row in enumerate(rows("expert_companions")):
        assert trace(made, "seen").x[i] == row["share"]
        # 100 tokens of the expert: the expected 25 are a quarter of them
        assert trace(made, "by chance").x[i] == pytest.approx(row["expected"] / 100)


def test_drops_by_layer_sum_over_tags() -> None:
    made = drops_by_layer(answers()["dropped_tokens"])
    for name, part, whole in (
        ("overflowed", "overflowed", "routed"),
        ("dropped", "dropped", "routed"),
        ("unserved tokens", "unserved_tokens", "tokens"),
    ):
        for layer in range(3):
            here = [r for r in rows("dropped_tokens") if r["layer"] == layer]
            expected = sum(r[part] for r in here) / sum(r[whole] for r in here)
            assert line(made, name)[layer] == pytest.approx(expected)
    assert "Layer 2 drops most" in made.layout.title.text


def test_many_layers_have_no_room_for_bars() -> None:
    table = answers(layers=30)["dropped_tokens"]
    made = drops_by_layer(table)
    assert {t.type for t in made.data} == {"scatter"}
    assert len(line(made, "dropped")) == 30


def test_what_was_only_dropped_is_not_drawn_twice() -> None:
    table = answers()["dropped_tokens"]
    made = drops_by_layer(table.assign(overflowed=table["dropped"]))
    assert [t.name for t in made.data] == ["dropped", "unserved tokens"]


def test_nothing_dropped_is_said_with_the_number_of_choices() -> None:
    table = answers()["dropped_tokens"].assign(overflowed=0, dropped=0, unserved_tokens=0)
    for figure in (drops_by_layer, drops_by_tag):
        sentence = figure(table).layout.annotations[0].text
        assert sentence == "No token was dropped: each of 1,200 choices was computed."


def test_drops_by_tag_sum_over_layers() -> None:
    made = drops_by_tag(answers()["dropped_tokens"])
    for place, tag in enumerate(made.layout.yaxis.ticktext):
        here = [r for r in rows("dropped_tokens") if r["tag"] == tag]
        expected = sum(r["dropped"] for r in here) / sum(r["routed"] for r in here)
        assert made.data[0].x[place] == pytest.approx(expected)
    assert made.layout.yaxis.ticktext[0] == "prose"


def test_the_capacity_curve_weighs_layers_by_choices() -> None:
    made = capacity_curve(answers()["capacity_sweep"])
    for factor in (0.5, 1.0, 2.0):
        here = [r for r in rows("capacity_sweep") if r["capacity_factor"] == factor]
        expected = weighted((r["dropped_share"], r["choices"]) for r in here)
        assert line(made, "all layers")[factor] == pytest.approx(expected)
        for row in here:
            assert line(made, f"layer {row['layer']}")[factor] == row["dropped_share"]
    assert "A capacity factor of 2 would drop" in made.layout.title.text
    assert made.layout.title.subtitle.text == "From the counts of every forward"


def test_the_capacity_curve_says_what_it_stands_on() -> None:
    table = answers()["capacity_sweep"]
    told = capacity_curve(table.assign(source="rows", covered=0.25)).layout.title.subtitle.text
    assert told == "From kept per-token rows; stands on 25.0 % of a layer's choices at least"


def test_unserved_by_position() -> None:
    made = unserved_by_position(answers()["unserved_by_position"])
    for position in (0, 16):
        here = [r for r in rows("unserved_by_position") if r["position"] == position]
        for name, column in (
            ("dropped choices", "dropped_rate"),
            ("unserved tokens", "unserved_rate"),
        ):
            expected = weighted((r[column], r["tokens"]) for r in here)
            assert line(made, name)[position] == pytest.approx(expected)


def test_entropy_by_layer() -> None:
    made = entropy_by_layer(answers()["router_confidence"])
    for row in rows("router_confidence"):
        assert line(made, row["tag"])[row["layer"]] == pytest.approx(row["entropy_norm"])


def test_loss_by_tag() -> None:
    made = loss_by_tag(answers()["loss_by_tag"])
    assert list(made.layout.yaxis.ticktext) == ["prose", "code"]
    for phase in ("train", "eval"):
        found = dict(zip(trace(made, phase).text, trace(made, phase).x, strict=True))
        assert found == {"code": 2.0, "prose": 3.0}


def test_quality_by_tag_has_a_column_a_number() -> None:
    made = quality_by_tag(answers()["quality_by_tag"])
    assert [t.xaxis for t in made.data] == ["x", "x2", "x3", "x4"]
    assert list(made.data[0].x) == [3.0, 2.0]
    assert list(made.data[1].x) == [1.1, 0.1]
    without = quality_by_tag(answers()["quality_by_tag"].assign(loss=None))
    assert [t.name for t in without.data] == [
        "dropped choices",
        "unserved tokens",
        "entropy / ln E",
    ]


def test_quality_of_dropped_is_compared_within_tags() -> None:
    made = quality_of_dropped(answers()["quality_of_dropped"])
    assert list(trace(made, "kept").x) == [2.0, 2.0]
    assert list(trace(made, "some choice dropped").x) == [3.0, 4.0]
    assert list(trace(made, "kept").error_x.array) == [0.1, 0.1]
    # 10 dropped tokens lose 1 more, 40 lose 2 more
    assert "loss is 1.800 higher" in made.layout.title.text


def test_repetition() -> None:
    made = repetition(answers()["repetition"])
    for row in rows("repetition"):
        assert line(made, "repeated")[row["layer"]] == row["repeated_share"]
        assert line(made, "by chance")[row["layer"]] == row["chance"]


def test_forwards_over_time() -> None:
    made = forwards_over_time(answers()["forwards_over_time"])
    for row in rows("forwards_over_time"):
        assert line(made, row["phase"])[row["step"]] == row["tokens_per_second"]
    assert made.layout.title.text == "12 forwards, 30 ms each"


def test_all_to_all_sums_over_layers() -> None:
    made = all_to_all(answers()["all_to_all"])
    assert [t.name for t in made.data] == ["dispatch"]
    assert list(made.data[0].y) == [1.5 + 2.5 + 3.5] * len(STEPS)


def test_two_forwards_of_a_replay_call_no_layer_costlier() -> None:
    table = answers()["replay_layers"]
    assert "costs" in replay_layers(table).layout.title.text
    few = replay_layers(table.assign(forwards=2)).layout.title.text
    assert few == "Too few forwards to call a layer more or less than a balanced one"
