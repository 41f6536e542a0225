"""The Experts page without a browser: its numbers, its link, and odd runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.apptest import texts, tile, turned
from support.traces import Written, layer_info, meta, segment, write_run

from moe_lens.trace.meta import write_meta
from moe_lens_dashboards.chosen import chosen, ranked
from moe_lens_dashboards.components.clicks import cell
from moe_lens_dashboards.views import experts

pytestmark = pytest.mark.slow

MARKUP = ("<script>alert(1)</script>", 'it\'s "q" ![x](http://y) :red[z] $a$')


def routed(written: Written, **where: Any) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for row in written.rows["load"]:
        if all(row[k] == v for k, v in where.items()):
            found[row["layer"], row["expert"]] += row["routed"]
    return found


def heading(app: Any) -> str:
    return str(next(s.value for s in app.subheader if s.value.startswith("Layer ")))


def frames(app: Any) -> list[pd.DataFrame]:
    return [each.value for each in app.dataframe]


def test_the_hottest_expert_is_opened(opened: Any, tmp_path: Path) -> None:
    written = write_run(tmp_path / "run", steps=4, tokens=200)
    app = turned(opened(tmp_path / "run"), "experts")
    assert not app.exception
    counts = routed(written)
    layers = {0: 0, 1: 0}
    for (layer, _), n in counts.items():
        layers[layer] += n
    ratios = {(at, e): counts[at, e] * 8 / layers[at] for at in layers for e in range(8)}
    layer, expert = max(ratios, key=lambda each: ratios[each])
    assert heading(app) == f"Layer {layer}, expert {expert}"
    assert tile(app, "Choices") == f"{counts[layer, expert]:,}"
    assert tile(app, "Load") == f"{ratios[layer, expert]:.1f}×"
    assert tile(app, "Place in its layer") == "1/8"
    table = frames(app)[0]
    assert next((r.layer, r.expert) for r in table.itertuples()) == (layer, expert)
    assert {(r.layer, r.expert): r.routed for r in table.itertuples()} == {
        each: counts[each] for each in ratios
    }
    assert table["ratio"].tolist() == sorted(ratios.values(), reverse=True)


def test_the_link_names_the_expert_and_filters_narrow_it(opened: Any, tmp_path: Path) -> None:
    written = write_run(tmp_path / "run", steps=4, tokens=200)
    app = turned(opened(tmp_path / "run", tag="code"), "experts")
    app.query_params["layer"], app.query_params["expert"] = "1", "2"
    app.run()
    counts = routed(written, layer=1, tag="code")
    assert heading(app) == "Layer 1, expert 2"
    assert tile(app, "Choices") == f"{counts[1, 2]:,}"
    assert tile(app, "Place in its layer") == (
        f"{1 + sum(n > counts[1, 2] for n in counts.values())}/8"
    )
    rows = [
        r for r in written.rows["load"] if (r["layer"], r["expert"], r["tag"]) == (1, 2, "code")
    ]
    share = sum(r["dropped"] for r in rows) / counts[1, 2]
    assert share > 0
    assert tile(app, "Dropped").startswith(
        f"{100 * share:.2f}" if share < 0.1 else f"{100 * share:.1f}"
    )


def test_a_long_table_stops_and_says_so(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "_LISTED", 3)
    write_run(tmp_path / "run", steps=4, tokens=200)
    app = turned(opened(tmp_path / "run", layer="0", expert="7"), "experts")
    assert not app.exception
    assert len(frames(app)[0]) == 3
    assert "The first 3 of 16." in texts(app)
    assert heading(app) == "Layer 0, expert 7"  # the coldest: not in the table, and opened


def test_the_dead_and_since_when(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=4, tokens=200)
    app = turned(opened(tmp_path / "run"), "experts")
    dead = frames(app)[-1]
    # Nobody ever chooses the last of each layer.
    assert {(r.layer, r.expert) for r in dead.itertuples() if r.state == "dead"} == {(0, 7), (1, 7)}


def test_tokens_too_few_to_say_who_is_dead(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=1, tokens=4)
    app = turned(opened(tmp_path / "run"), "experts")
    assert "2 of 2 layers have too few tokens" in texts(app)


def test_a_run_without_rows_of_tokens_says_how_to_keep_them(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run", token_rows=False)
    app = turned(opened(tmp_path / "run"), "experts")
    assert not app.exception
    assert "No rows of single tokens were kept." in texts(app)


def test_rows_without_token_ids_say_how_to_keep_them(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    app = turned(opened(tmp_path / "run"), "experts")
    assert "The ids of the tokens were not kept." in texts(app)


def test_token_ids_that_chose_it(opened: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    written = write_run(run, steps=2, tokens=64)
    for row in written.rows["tokens"]:
        row["token_id"] = 100 + row["token"] % 3
    keep = [{k: v for k, v in r.items() if k != "rank"} for r in written.rows["tokens"]]
    segment(run, "tokens", keep)
    app = turned(opened(run), "experts")
    app.query_params["layer"], app.query_params["expert"] = "0", "1"
    app.run()
    times: Counter[int] = Counter()
    for row in written.rows["routing"]:
        if row["layer"] == 0 and 1 in row["expert_ids"]:
            times[100 + row["token"] % 3] += 1
    table = next(f for f in frames(app) if "lift" in f)
    assert dict(zip(table["value"], table["chosen"], strict=True)) == dict(times)


@pytest.mark.parametrize(
    "shape",
    [{"experts": 384}, {"tags": MARKUP}, {"zero_experts": 2}, {"steps": 0}],
    ids=lambda shape: next(iter(shape)),
)
def test_odd_runs(opened: Any, tmp_path: Path, shape: dict[str, Any]) -> None:
    write_run(tmp_path / "run", **shape)
    app = turned(opened(tmp_path / "run"), "experts")
    assert not app.exception
    assert not app.error


def test_one_layer_of_one_expert(opened: Any, tmp_path: Path) -> None:
    write_meta(tmp_path / "run", meta(layers=[layer_info(0, experts=1, top_k=1)]))
    row = {"layer": 0, "tag": "untagged", "phase": "train", "tokens": 7, "routed": 7}
    for table in ("load", "layers", "routers", "slices", "steps"):
        segment(tmp_path / "run", table, [row])
    app = turned(opened(tmp_path / "run"), "experts")
    assert not app.exception
    assert heading(app) == "Layer 0, expert 0"
    assert tile(app, "Choices") == "7"
    assert tile(app, "Place in its layer") == "1/1"


MAP = pd.DataFrame(
    {
        "layer": [0, 0, 1, 1],
        "expert": [0, 1, 0, 1],
        "ratio": [0.5, 1.5, 2.0, 0.0],
        "routed": [1, 3, 8, 0],
    }
)


def test_a_link_that_fits_no_expert_shows_the_hottest_and_says_so() -> None:
    for layer, expert in (("9", "0"), ("x", "y"), ("0", None), (None, "1"), ("00", "0")):
        found = chosen(ranked(MAP), layer, expert)
        assert (found.layer, found.expert, found.row) == (1, 0, 0)
        assert "is not in this view" in found.problem
    found = chosen(ranked(MAP), "0", "0")
    assert (found.layer, found.expert, found.row, found.place, found.of) == (0, 0, 2, 2, 2)
    assert found.problem == ""


@pytest.mark.parametrize("sent", [None, [], [1], [1, 2, 3], ["1", "2"], [1.5, 2], [True, 1], {}])
def test_what_is_no_cell_chooses_nothing(sent: Any) -> None:
    assert cell(sent) is None


def test_a_cell_is_two_whole_numbers() -> None:
    assert cell([3, 7.0]) == (3, 7)
