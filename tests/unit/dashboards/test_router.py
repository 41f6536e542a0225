"""The Router page without a browser: means, and why a router lacks a number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support.apptest import texts, tile, turned
from support.traces import layer_info, meta, segment, write_run

import moe_lens
from moe_lens.trace.meta import write_meta
from moe_lens.trace.synthetic import Spec, generate
from moe_lens_dashboards.no_number import without

pytestmark = pytest.mark.slow


def test_means_are_those_of_a_loop(opened: Any, tmp_path: Path) -> None:
    written = write_run(tmp_path / "run", steps=4, tokens=50)
    app = turned(opened(tmp_path / "run", tag="prose"), "router")
    assert not app.exception
    rows = [r for r in written.rows["routers"] if r["tag"] == "prose"]
    tokens = sum(r["tokens"] for r in rows)

    def mean(column: str) -> float:
        return float(sum(r[column] for r in rows) / tokens)

    assert tile(app, "Router entropy") == f"{mean('entropy_sum') / math.log(8):.2f}"
    assert tile(app, "Margin") == f"{mean('margin_sum'):.3g}"
    assert tile(app, "Top-1 probability") == f"{mean('top1_prob_sum'):.2f}"
    assert tile(app, "Logit scale") == f"{math.sqrt(mean('zloss_sum')):.2f}"
    assert tile(app, "Tokens not finite") == "0"


def test_groups_stand_where_there_are_some(opened: Any, tmp_path: Path) -> None:
    for name, groups in (("grouped", 4), ("plain", None)):
        generate(tmp_path / name, Spec(experts=12, top_k=3, layers=2, steps=2, groups=groups))
    app = turned(opened(tmp_path / "grouped"), "router")
    assert not app.exception
    assert "2 layers × 4 groups of 3: 2^7.78 sets of 3 experts within reach" in texts(app)
    (shown,) = (x.value for x in app.dataframe if "token_group" in x.value)
    with moe_lens.open(tmp_path / "grouped") as trace:
        expected = trace.query("group_entropy", phase="train").df()
    assert list(shown.token_group) == pytest.approx(list(expected.token_group))
    assert list(shown.load_within) == pytest.approx(list(expected.load_within))
    app = turned(opened(tmp_path / "plain"), "router")
    assert not app.exception
    assert "Groups of experts" not in texts(app)


def test_a_router_without_logits_says_why(opened: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_meta(run, meta(layers=[layer_info(0, router="hash")]))
    row = {"layer": 0, "tag": "untagged", "phase": "train", "tokens": 7, "routed": 7}
    for table in ("load", "layers", "routers", "slices", "steps"):
        segment(run, table, [row])
    app = turned(opened(run), "router")
    assert not app.exception
    assert tile(app, "Router entropy") == "–"
    said = texts(app)
    assert "No entropy, margin, top-1 probability or z-loss in layer 0" in said
    assert "looked up by token id" in said


NUMBERS = {"tokens": 5, "entropy_norm": 0.5, "margin": 0.1, "top1_prob": 0.4, "zloss": 2.0}


@pytest.mark.parametrize(
    ("info", "missing", "says"),
    [
        ({"router": "task"}, ("margin",), "No margin in layer 0: the caller names the experts"),
        ({"router": "expert-choice"}, ("margin",), "experts choose tokens"),
        ({"selection": "logits"}, ("margin",), "not explained by the selection score"),
        ({}, ("margin",), "could not be found out from its choices"),
        ({}, ("top1_prob", "zloss"), "No top-1 probability or z-loss in layer 0: its logits"),
        ({"experts": 1, "top_k": 1}, ("entropy_norm",), "leaves nothing to decide"),
        ({"experts": 2, "top_k": 2}, ("margin",), "every expert is chosen"),
    ],
)
def test_why_there_is_no_number(info: dict[str, Any], missing: tuple[str, ...], says: str) -> None:
    row = {"layer": 0, **NUMBERS, **dict.fromkeys(missing, float("nan"))}
    sentences = without([layer_info(0, **info)], [row])
    assert len(sentences) == 1
    assert says in sentences[0]


def test_layers_that_lack_the_same_are_one_sentence() -> None:
    rows = [{"layer": i, **NUMBERS, "margin": None} for i in (0, 1, 2, 5)]
    assert "in layers 0, 1, 2, 5: " in without([layer_info(i) for i in range(6)], rows)[0]
    assert "in layers 0 to 2: " in without([layer_info(i) for i in range(6)], rows[:3])[0]
    assert without([layer_info(0)], [{"layer": 0, **NUMBERS}]) == []
    nobody = {**NUMBERS, "layer": 0, "tokens": 0, "margin": None}
    assert without([layer_info(0)], [nobody]) == []


def test_without_rows_of_tokens_near_ties_are_missing(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run", token_rows=False)
    app = turned(opened(tmp_path / "run"), "router")
    assert not app.exception
    assert "No rows of single tokens were kept." in texts(app)


@pytest.mark.parametrize(
    "shape",
    [
        {"experts": 384},
        {"tags": ("<script>alert(1)</script>", 'it\'s "q" ![x](http://y) $a$')},
        {"zero_experts": 2},
        {"steps": 0},
        {"layers": 1},
    ],
    ids=lambda shape: next(iter(shape)),
)
def test_odd_runs(opened: Any, tmp_path: Path, shape: dict[str, Any]) -> None:
    write_run(tmp_path / "run", **shape)
    app = turned(opened(tmp_path / "run"), "router")
    assert not app.exception
    assert not app.error
