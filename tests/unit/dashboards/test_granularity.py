"""The page Granularity: sets counted in a plain loop, the laboratory's part, what is missing."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.apptest import button, texts, turned
from support.laboratories import made_up
from support.traces import layer_info, meta, write_run

from moe_lens.queries.session import open_trace
from moe_lens.trace.meta import write_meta
from moe_lens.trace.synthetic import Domain, Spec, generate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "run"
    generate(path, Spec(layers=2, experts=8, top_k=2, steps=4, sequences=4, length=16,
                        domains=(Domain("code"), Domain("prose"))))  # fmt: skip
    return path


def test_the_sets_are_those_that_a_loop_counts(opened: Any, run: Path) -> None:
    with open_trace(run) as trace:
        rows = trace.sql("select layer, expert_ids from routing").rows()
    app = turned(opened(run), "granularity")
    assert not app.exception
    table = app.dataframe[0].value
    assert len(table) == 2
    for got in table.to_dict("records"):
        sets = Counter(tuple(sorted(r["expert_ids"])) for r in rows if r["layer"] == got["layer"])
        n, once = sum(sets.values()), sum(c == 1 for c in sets.values())
        twice = sum(c == 2 for c in sets.values())
        assert (got["experts"], got["top_k"], got["share"]) == (8, 2, 0.25)
        assert got["bits"] == pytest.approx(math.log2(28))
        assert got["used"] == len(sets)
        assert got["coverage"] == pytest.approx(1 - once / n)
        assert got["at_least"] == round(min(28, len(sets) + once * (once - 1) / (2 * (twice + 1))))
        pairs = sum(c * (c - 1) for c in sets.values())
        assert got["effective"] == round(n * (n - 1) / pairs)
        assert got["chance"] == pytest.approx(28, abs=0.51)  # 256 tokens see nearly all 28
    assert "256 tokens, the same in every layer" in texts(app)
    assert "groups" not in table
    # Where nobody has a laboratory: how to get one.
    assert app.code[-1].value == f"moe-lens lab granularity --out {run.parent / 'granularity'}"


def test_filters_narrow_it_and_specialisation_is_a_click_away(opened: Any, run: Path) -> None:
    app = turned(opened(run, first_layer="1", tag="code"), "granularity")
    assert not app.exception
    assert app.dataframe[0].value["layer"].tolist() == [1]
    app = button(app, "What experts are chosen for").click().run()
    assert not app.exception
    assert app.header[0].value == "Specialisation"


def test_counts_alone_show_what_the_router_could_reach(opened: Any, tmp_path: Path) -> None:
    path = tmp_path / "run"
    layers = [
        layer_info(0, 256, top_k=8, groups=8, top_groups=4, hidden_size=64, intermediate_size=32),
        layer_info(1, 8, top_k=None, router="dynamic-k"),
        layer_info(2, 8, top_k=2, router="expert-choice", zero_experts=2),
    ]
    write_meta(path, meta(0, layers=layers))
    app = turned(opened(path), "granularity")
    assert not app.exception
    first, second, third = app.dataframe[0].value.to_dict("records")
    assert first["groups"] == "4 of 8"
    assert first["bits"] == pytest.approx(math.log2(7.161e13), abs=1e-3)  # DeepSeek-V3
    assert first["finer"] == 8
    assert math.isnan(second["share"])
    assert math.isnan(second["bits"])
    assert third["share"] == pytest.approx(0.2)
    shown = texts(app)
    assert "No rows of single tokens were kept." in shown
    assert "Not computed in layer 1: reachable bits: no fixed number of choices" in shown


def test_sets_that_are_all_different_say_why_they_have_no_effective_number(
    opened: Any, tmp_path: Path
) -> None:
    generate(tmp_path / "run", Spec(layers=1, experts=256, top_k=8, steps=1, sequences=1, length=8))
    app = turned(opened(tmp_path / "run"), "granularity")
    assert not app.exception
    assert app.dataframe[0].value["used"].tolist() == [8]
    said = "effective sets: no two tokens chose the same set of experts."
    assert f"Not computed in layer 0: {said}" in texts(app)


def test_an_imported_run_says_why_it_has_no_rows(opened: Any, tmp_path: Path) -> None:
    path = tmp_path / "run"
    write_meta(path, meta(0, imported="eplb: a.json", lacks={"tokens": "counts alone"}))
    app = turned(opened(path), "granularity")
    assert not app.exception
    assert "counts alone" in texts(app)
    assert "record" not in texts(app)


def test_steps_without_rows(opened: Any, run: Path) -> None:
    app = turned(opened(run, first_step="99"), "granularity")
    assert not app.exception
    assert "Nothing was recorded within the filters." in texts(app)


def test_a_laboratory_comes_first_on_the_page_of_its_routing(opened: Any, tmp_path: Path) -> None:
    plan, rows = made_up(tmp_path / "a lab")
    write_run(tmp_path / "a lab" / "routing", steps=1)
    write_run(tmp_path / "other", steps=1)
    app = turned(opened(tmp_path, run="routing"), "granularity")
    assert not app.exception
    assert [s.value.split(":")[0] for s in app.subheader] == [
        "Laboratory",
        "Sets of experts that tokens choose in this run",
    ]
    students = app.dataframe[0].value
    assert len(students) == len(plan.runs)
    by_name = {(r.student, r.width): r.nmse for r in rows}
    for got in students.to_dict("records"):
        assert got["nmse"] == by_name[got["student"], got["width"]]
    assert "published" not in students
    assert f"Preset {plan.preset}, linear experts, hidden size 32" in texts(app)
    assert len(app.get("plotly_chart")) == 6  # gap, sweeps, sets, two pictures; those of the run
    app = turned(opened(tmp_path, run="other", picture="<b>teacher</b>"), "granularity")
    assert not app.exception
    assert app.subheader[0].value.startswith("Sets of experts")
    assert "<b>teacher</b>: at least 3 regions" in texts(app)


def test_the_authors_numbers_stand_beside_the_preset_paper(opened: Any, tmp_path: Path) -> None:
    made_up(tmp_path / "lab", "paper")
    write_run(tmp_path / "lab" / "routing", steps=1)
    app = turned(opened(tmp_path), "granularity")
    assert not app.exception
    students = app.dataframe[0].value
    (got,) = students[
        (students["teacher"] == "16e8a")
        & (students["student"] == "8e4a")
        & (students["larger"] == "")
    ].to_dict("records")
    assert got["published"] == 0.17
    assert "github.com/eboix/secret_moe" in texts(app)


def test_an_unfinished_laboratory_shows_what_it_has(opened: Any, tmp_path: Path) -> None:
    made_up(tmp_path / "begun", finished=0)
    made_up(tmp_path / "half", finished=2)
    write_run(tmp_path / "run", steps=1)
    app = turned(opened(tmp_path, laboratory="half"), "granularity")
    assert not app.exception
    shown = texts(app)
    assert "10 of 12 students are still to be trained" in shown
    assert "Regions and sets are counted when all students are trained." in shown
    assert len(app.dataframe[-1].value) == 2
    app = turned(opened(tmp_path), "granularity")
    assert not app.exception
    assert "12 of 12 students are still to be trained" in texts(app)


@pytest.mark.parametrize("file", ["results", "pictures"])
def test_a_damaged_laboratory_is_said_in_its_place(opened: Any, tmp_path: Path, file: str) -> None:
    made_up(tmp_path / "lab")
    write_run(tmp_path / "lab" / "routing", steps=1)
    (tmp_path / "lab" / f"{file}.parquet").write_bytes(b"PAR1")
    app = turned(opened(tmp_path), "granularity")
    assert not app.exception
    assert f"{file}.parquet is not a result of moe-lens lab granularity" in texts(app)
    assert any(s.value.startswith("Sets of experts") for s in app.subheader)
