"""The app without a browser: what pages say of good, poor, changing and missing runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.apptest import button, chosen, tile
from support.traces import layer_info, meta, segment, write_run

from moe_lens.trace.meta import write_meta
from moe_lens_dashboards.components import notices, traces

pytestmark = pytest.mark.slow


def test_filters_narrow_and_are_in_the_link(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=4, tokens=100, ranks=(0, 1), world=2)
    app = opened(tmp_path / "run")
    assert not app.exception
    assert tile(app, "Tokens") == "800"
    app = chosen(app, "Rank").select(1).run()
    app = chosen(app, "From step").set_value(1).run()
    app = chosen(app, "Phase").select("eval").run()
    assert tile(app, "Tokens") == "200"
    assert app.query_params == {"run": "run", "rank": "1", "first_step": "1", "phase": "eval"}
    again = opened(tmp_path / "run", **app.query_params)
    assert tile(again, "Tokens") == "200"
    assert chosen(again, "Rank").value == 1
    reset = button(again, "Reset filters").click().run()
    assert tile(reset, "Tokens") == "800"
    assert reset.query_params == {"run": "run"}


def test_a_link_to_another_run_brings_what_fits(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "a", tags=("code", "prose"))
    write_run(tmp_path / "b", tags=("code", "maths"))
    app = opened(tmp_path / "a", tmp_path / "b", run="b", tag="prose", last_layer="0")
    assert not app.exception
    assert chosen(app, "Run").value == "b"
    assert app.query_params == {"run": "b", "last_layer": "0"}
    assert "tag\\=prose" in app.warning[0].value
    app = chosen(app, "Tag").select("maths").run()
    app = chosen(app, "Run").select("a").run()
    assert chosen(app, "Tag").value is None
    assert "tag\\=maths" in app.warning[0].value


def test_a_folder_of_runs_lists_them(opened: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name / "run")
    app = opened(tmp_path)
    assert sorted(chosen(app, "Run").options) == ["a/run", "b/run"]


def test_what_is_written_is_seen(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=2, tokens=100)
    app = opened(tmp_path / "run")
    assert tile(app, "Tokens") == "200"
    row = {"step": 2, "window": 2, "phase": "train", "tag": "code", "tokens": 50}
    segment(tmp_path / "run", "slices", [row], seq=5)
    assert tile(app.run(), "Tokens") == "250"


def test_a_run_deleted_while_it_is_open(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=2, tokens=100)
    app = opened(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    app.run()
    assert not app.exception
    assert "does not exist" in app.error[0].value.replace("\\", "")
    write_run(tmp_path / "run", steps=4, tokens=100)
    assert tile(app.run(), "Tokens") == "400"


def test_a_run_that_was_never_there(opened: Any, tmp_path: Path) -> None:
    app = opened(tmp_path / "none")
    assert not app.exception
    assert "does not exist" in app.error[0].value.replace("\\", "")


def test_no_rows_within_the_filters(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=2)
    app = opened(tmp_path / "run", first_step="100")
    assert not app.exception
    assert "Nothing was recorded within the filters" in app.info[0].value


@pytest.mark.parametrize(
    "shape",
    [
        {"layers": 2, "experts": 384},
        {"token_rows": False, "losses": False},
        {"tags": ("<script>alert(1)</script>", 'it\'s "q" ![x](http://y) :red[z] $a$')},
        {"zero_experts": 2},
        {"steps": 0},
    ],
    ids=lambda shape: next(iter(shape)),
)
def test_odd_runs(opened: Any, tmp_path: Path, shape: dict[str, Any]) -> None:
    write_run(tmp_path / "run", **shape)
    app = opened(tmp_path / "run")
    assert not app.exception
    assert not app.error


def test_one_layer_of_one_expert(opened: Any, tmp_path: Path) -> None:
    write_meta(tmp_path / "run", meta(layers=[layer_info(0, experts=1, top_k=1)]))
    row = {
        "layer": 0,
        "tag": "untagged",
        "phase": "train",
        "tokens": 7,
        "routed": 7,
        "processed": 7,
    }
    for table in ("load", "layers", "routers", "slices", "steps"):
        segment(tmp_path / "run", table, [row])
    app = opened(tmp_path / "run")
    assert not app.exception
    assert tile(app, "Tokens") == "7"
    assert tile(app, "Worst balance") == "1.0×"


def test_every_notice_has_words() -> None:
    assert all(said for said, _ in notices._HOW.values())


def test_answers_are_remembered_until_files_change(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", steps=2, tokens=100)
    app = opened(tmp_path / "run")
    asked: list[str] = []
    before = traces.Trace.query
    monkeypatch.setattr(
        traces.Trace,
        "query",
        lambda self, name, **p: (asked.append(name), before(self, name, **p))[1],
    )
    app.run()
    assert asked == []
    segment(tmp_path / "run", "steps", [{"step": 9, "phase": "train"}], seq=5)
    app.run()
    assert "load_map" in asked
