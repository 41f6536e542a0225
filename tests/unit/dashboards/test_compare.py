"""The Compare page: its numbers against plain loops over the rows that were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.apptest import chosen, texts, turned
from support.traces import Rows, Written, write_run

pytestmark = pytest.mark.slow

EVIL = '<b>x $y$ it\'s "q" [l](y) :red[z]'


def tables(app: Any, column: str) -> list[pd.DataFrame]:
    return [d.value for d in app.dataframe if column in d.value.columns]


def ratios(load: Rows, experts: int = 8) -> dict[tuple[int, int], float]:
    """Load over the mean of its layer, of each expert."""
    routed: dict[int, list[int]] = {}
    for r in load:
        routed.setdefault(r["layer"], [0] * experts)[r["expert"]] += r["routed"]
    return {
        (layer, e): n * experts / sum(row)
        for layer, row in routed.items()
        for e, n in enumerate(row)
    }


def check(app: Any, a: Rows, b: Rows) -> None:
    """The tables of the page are those of these two lists of rows of load."""
    (table,) = tables(app, "balance_a")
    assert len(table) == 2
    for row in table.to_dict("records"):
        for side, load in (("a", a), ("b", b)):
            mine = [r for r in load if r["layer"] == row["layer"]]
            worst = max(v for (layer, _), v in ratios(load).items() if layer == row["layer"])
            dropped = sum(r["dropped"] for r in mine) / sum(r["routed"] for r in mine)
            assert row[f"balance_{side}"] == pytest.approx(worst)
            assert row[f"dropped_{side}"] == pytest.approx(dropped)
        assert row["balance_change"] == pytest.approx(row["balance_b"] - row["balance_a"])
    changes = list(table["balance_change"].abs())
    assert changes == sorted(changes, reverse=True)
    first, second = tables(app, "other")
    for found, here, there in ((first, ratios(a), ratios(b)), (second, ratios(b), ratios(a))):
        assert list(found["ratio"]) == pytest.approx(sorted(here.values(), reverse=True)[:10])
        for row in found.to_dict("records"):
            assert row["other"] == pytest.approx(there[row["layer"], row["expert"]])


def within(written: Written, first: int, last: int) -> Rows:
    return [r for r in written.rows["load"] if first <= r["step"] <= last]


def test_two_runs(opened: Any, tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)
    app = turned(opened(tmp_path / "a", tmp_path / "b"), "compare")
    assert not app.exception
    assert app.query_params == {"run": "a", "against": "b"}
    check(app, a.rows["load"], b.rows["load"])
    app = chosen(app, "Run").select("b").run()
    assert not app.exception
    assert app.query_params == {"run": "b", "against": "a"}
    assert not app.warning
    check(app, b.rows["load"], a.rows["load"])
    app = chosen(app, "Phase").select("eval").run()
    check(app, *([r for r in w.rows["load"] if r["phase"] == "eval"] for w in (b, a)))


def test_two_windows(opened: Any, tmp_path: Path) -> None:
    written = write_run(tmp_path / "a", steps=6)
    write_run(tmp_path / "b")
    app = turned(opened(tmp_path / "a", tmp_path / "b"), "compare")
    app = app.segmented_control[0].set_value("two windows of this run").run()
    assert not app.exception
    assert app.query_params == {"run": "a", "a": "0-2", "b": "3-5"}
    check(app, within(written, 0, 2), within(written, 3, 5))
    last = next(n for n in app.number_input if n.label == "B: from step")
    app = last.set_value(4).run()
    assert app.query_params == {"run": "a", "a": "0-2", "b": "4-5"}
    check(app, within(written, 0, 2), within(written, 4, 5))
    # An end that goes beyond the other takes it along.
    first = next(n for n in app.number_input if n.label == "A: from step")
    app = first.set_value(5).run()
    assert app.query_params["a"] == "5-5"
    app = app.segmented_control[0].set_value("two runs").run()
    assert app.query_params == {"run": "a", "against": "b"}


def test_one_run_has_windows_alone_and_bad_ones_are_left_out(opened: Any, tmp_path: Path) -> None:
    written = write_run(tmp_path / "a")
    app = turned(opened(tmp_path / "a", a="x", b="1-2", first_step="1"), "compare")
    assert not app.exception
    assert not app.segmented_control
    assert "a=x in the link is no window of steps, as 0-99: left out." in texts(app)
    assert "stand in place of the sidebar's steps" in texts(app)
    assert app.query_params["a"] == "1-2"
    check(app, within(written, 1, 2), within(written, 1, 2))


def test_nothing_within_the_filters_on_one_side(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    app = turned(opened(tmp_path / "a", phase="train", a="0-0", b="1-1"), "compare")
    assert not app.exception
    assert "B: step 1" in texts(app)
    assert "Nothing was recorded within the filters." in texts(app)
    assert not app.dataframe


def test_an_unknown_run_in_the_link(opened: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name)
    app = turned(opened(tmp_path / "a", tmp_path / "b", against="<b>gone"), "compare")
    assert not app.exception
    assert "There is no other run <b>gone" in texts(app)
    assert app.query_params["against"] == "b"


def test_runs_of_different_shapes(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "a", layers=3, experts=8)
    write_run(tmp_path / "b", layers=2, experts=16)
    app = turned(opened(tmp_path / "a", tmp_path / "b"), "compare")
    assert not app.exception
    said = texts(app)
    assert "Layer 2 of A has none beside it in B." in said
    assert "Layers 0 to 1 have 8 experts in A and 16 in B" in said
    assert sorted(tables(app, "balance_a")[0]["layer"]) == [0, 1]
    # No layer in common within the filters.
    app = turned(opened(tmp_path / "a", tmp_path / "b", first_layer="2"), "compare")
    assert not app.exception
    assert "Nothing was recorded within the filters." in texts(app)


def test_a_tag_that_the_other_run_lacks(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "a", tags=("code", EVIL))
    write_run(tmp_path / "b", tags=("code",))
    app = turned(opened(tmp_path / "a", tmp_path / "b", tag=EVIL), "compare")
    assert not app.exception
    assert f"b has no tag {EVIL}: nothing to compare within the filters." in texts(app)
    assert r"\<b\>" in next(i.value for i in app.info)


def test_names_of_runs_are_text(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / EVIL)
    app = turned(opened(tmp_path / "a", tmp_path / EVIL), "compare")
    assert not app.exception
    assert app.query_params["against"] == EVIL
    assert EVIL in texts(app)
    assert all("<b>" not in m.value for m in [*app.markdown, *app.caption])


@pytest.mark.parametrize("steps", [0, 1])
def test_hardly_anything_to_compare(opened: Any, tmp_path: Path, steps: int) -> None:
    written = write_run(tmp_path / "a", steps=steps, token_rows=False)
    app = turned(opened(tmp_path / "a"), "compare")
    assert not app.exception
    if steps:
        check(app, written.rows["load"], written.rows["load"])
    else:
        assert "Nothing was recorded within the filters." in texts(app)
