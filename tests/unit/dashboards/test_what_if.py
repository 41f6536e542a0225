"""The page What if: its tables against plain loops, and what is missing, unfinished or damaged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.apptest import texts, turned
from support.counterfactuals import Rows, made_up, said, write
from support.traces import layer_info, meta, write_run

from moe_lens.trace.meta import write_meta
from moe_lens_dashboards.pages import VIEWS

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    write_meta(path, meta(0, layers=[layer_info(n, 8, top_k=2) for n in (0, 3)]))
    return path


def cost(rows: Rows) -> float:
    return sum(r["loss"] - r["base_loss"] for r in rows) / len(rows)


def test_the_numbers_are_those_of_a_loop(opened: Any, run: Path) -> None:
    rows = made_up(1)
    write(run, "mine", rows, said(rows))
    app = turned(opened(run, layer="3"), "what_if")
    assert not app.exception
    experts, routes, runner_up = (frame.value for frame in app.dataframe)
    assert sorted(experts["expert"]) == list(range(8))
    for got in experts.to_dict("records"):
        of = [r for r in rows if (r["layer"], r["number"]) == (3, got["expert"])]
        out = [r for r in of if r["intervention"] == "knock_out"]
        used = [r for r in out if r["affected"]]
        assert got["load"] == pytest.approx(len(used) / 15)
        assert got["knock_out"] == pytest.approx(cost(out))
        assert got["force_in"] == pytest.approx(
            cost([r for r in of if r["intervention"] == "force_in"])
        )
        if used:
            assert got["knock_out_used"] == pytest.approx(cost(used))
        assert got["word"].startswith("yes" if got["expert"] == 0 else ("but", "")[bool(used)])
    for layer in (0, 3):
        tokens: dict[tuple[int, int], Rows] = {}
        for r in rows:
            if r["layer"] == layer and r["intervention"] == "other_route":
                tokens.setdefault((r["sequence"], r["position"]), []).append(r)
        (got,) = routes[(routes["layer"] == str(layer)) & (routes["slice"] == "all")].to_dict(
            "records"
        )
        assert got["tokens"] == len(tokens) == 15
        least = [min(r["loss"] for r in of) for of in tokens.values()]
        own = [of[0]["base_loss"] for of in tokens.values()]
        gaps = [a - b for a, b in zip(own, least, strict=True)]
        assert got["regret"] == pytest.approx(sum(gaps) / 15)
        assert got["positive"] == pytest.approx(sum(x > 0 for x in gaps) / 15)
        swapped = [r for r in rows if (r["layer"], r["intervention"]) == (layer, "runner_up")]
        (got,) = runner_up[runner_up["layer"] == layer].to_dict("records")
        assert got["cost"] == pytest.approx(cost(swapped))
        assert got["worse"] == pytest.approx(
            sum(r["loss"] > r["base_loss"] for r in swapped) / len(swapped)
        )
    slices = set(routes[routes["layer"] == "all"]["slice"])
    assert {"margin 1 of 4", "entropy unknown", "code", "it's <b>prose"} <= slices
    assert len(app.get("plotly_chart")) == 4


def test_filters_narrow_it_and_the_others_are_named(opened: Any, run: Path) -> None:
    rows = made_up(2)
    write(run, "mine", rows, said(rows))
    app = turned(opened(run, first_layer="3", first_step="1"), "what_if")
    assert not app.exception
    assert set(app.dataframe[2].value["layer"]) == {3}
    assert "Not narrowed by: first step." in texts(app)


def test_the_sql_goes_to_the_sql_page(opened: Any, run: Path) -> None:
    rows = made_up(3)
    write(run, "it's mine", rows, said(rows))
    app = turned(opened(run), "what_if")
    app.button(key="sql experts 0").click().run()
    assert not app.exception
    (text,) = (area.value for area in app.text_area)
    assert "result = 'it''s mine'" in text
    assert "from counterfactual" in text


def test_an_interrupted_result_says_so_and_a_whole_one_comes_first(opened: Any, run: Path) -> None:
    rows = made_up(4)
    write(run, "a-interrupted", rows[:9], said(rows, interrupted=True))
    app = turned(opened(run), "what_if")
    assert not app.exception
    assert "This measurement was interrupted" in texts(app)
    assert "No other routes of single tokens were measured" in charts(app)
    write(run, "b", rows, said(rows))
    app = turned(opened(run), "what_if")
    assert "interrupted" not in texts(app)
    app = turned(opened(run, result="a-interrupted"), "what_if")
    assert "This measurement was interrupted" in texts(app)
    app = turned(opened(run, result="gone"), "what_if")
    assert "result=gone in the link is not here" in texts(app)
    os.utime(write(run, "c", made_up(5), said(rows) | {"model": "Newest"}), (2e9, 2e9))
    os.utime(run / "counterfactual" / "b.parquet", (1e9, 1e9))
    assert "Newest" in texts(turned(opened(run), "what_if"))
    os.utime(run / "counterfactual" / "b.parquet", (3e9, 3e9))
    assert "Newest" not in texts(turned(opened(run), "what_if"))


def test_what_was_refused_is_said(opened: Any, run: Path) -> None:
    rows = made_up(5)
    refused = {f"layer 0: top_k {k}": "no place for <b>it</b>" for k in range(7)}
    write(run, "a", rows, said(rows) | {"refused": refused})
    shown = texts(turned(opened(run), "what_if"))
    assert "Not measured: layer 0: top_k 4: no place for <b>it</b>" in shown
    assert "and 2 more" in shown


@pytest.mark.parametrize("name", ["a", "a-interrupted"])
def test_a_damaged_result_is_said_in_its_place(opened: Any, run: Path, name: str) -> None:
    rows = made_up(6)
    write(run, "z", rows, said(rows))
    path = write(run, name, rows, said(rows))
    path.write_bytes(path.read_bytes()[:300])
    app = turned(opened(run, result=name), "what_if")
    assert not app.exception
    assert "cannot be read" in texts(app)
    assert ("being measured now" in texts(app)) == (name != "a")
    app = turned(opened(run, result="z"), "what_if")
    assert "cannot be read" not in texts(app)
    assert len(app.dataframe) == 3


def test_a_file_of_another_program_is_named(opened: Any, run: Path) -> None:
    write(run, "a", made_up(7), None)
    shown = texts(turned(opened(run), "what_if"))
    assert "a.parquet is not a result of moe-lens counterfactual." in shown


def test_where_there_is_none_it_says_how(opened: Any, tmp_path: Path) -> None:
    assert next(v for v in VIEWS if v.name == "what_if").shown(None)
    path = write_run(tmp_path / "run").path
    app = turned(opened(path), "what_if")
    assert not app.exception
    assert f"moe-lens counterfactual {path} --model" in app.code[0].value


def test_an_imported_run_has_the_same_page(opened: Any, tmp_path: Path) -> None:
    path = tmp_path / "run"
    layers = [layer_info(n, 8, top_k=2) for n in (0, 3)]
    write_meta(path, meta(0, layers=layers, imported="vllm: a.npz", lacks={"weights": "none"}))
    rows = made_up(8)
    write(path, "a", rows, said(rows))
    app = turned(opened(path), "what_if")
    assert not app.exception
    assert len(app.dataframe) == 3


def charts(app: Any) -> str:
    """Annotations of the page's charts: why there is nothing to draw."""
    return "\n".join(str(c.proto.spec) for c in app.get("plotly_chart")).replace("<br>", " ")
