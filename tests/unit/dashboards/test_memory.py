"""The Memory page: the numbers of the measurement, what can be chosen, what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.apptest import texts, tile, turned
from support.sequences import write_sequences
from support.traces import layer_info, write_run

from moe_lens.metrics.constellation import by_beginning
from moe_lens.numbers import percent
from moe_lens.queries.context import conversations
from moe_lens.queries.memory import memory
from moe_lens.queries.session import open_trace
from moe_lens.trace.layout import meta_path
from moe_lens.trace.meta import read_meta, write_meta

pytestmark = pytest.mark.slow


def menu(app: Any, label: str) -> Any:
    return next(s for s in app.selectbox if s.label == label)


def foretold_title(run: Path, layer: int) -> str:
    """Of the figure on beginnings: 4 of 8 experts, named by the longest beginning there is."""
    with open_trace(run) as trace:
        (of,) = conversations(trace, prefixes=(4, 8), after=4, layers=[layer])
    row = by_beginning(of.foretold, 4).iloc[-1]
    return f"The 4 experts that {row['tokens']:.0f} tokens chose most take {percent(row['prefix'])}"


def relabelled(run: Path, **changes: Any) -> None:
    """Change what meta says of every layer."""
    meta = read_meta(meta_path(run, 0))
    meta.layers = [layer_info(x.layer, x.experts, **changes) for x in meta.layers]
    write_meta(run, meta)


def test_the_page_says_what_the_measurement_says(opened: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_sequences(run, sequences=9)
    relabelled(run, hidden_size=100, intermediate_size=50)
    with open_trace(run) as trace:
        of = {x.info.layer: x.memory for x in memory(trace, batch=4)}
    app = turned(opened(run, batch="4"), "memory")
    assert not app.exception
    for layer in (0, 2):
        if layer:
            app = menu(app, "Layer").select(layer).run()
            assert not app.exception
            assert app.query_params["layer"] == "2"
        found = of[layer]
        assert tile(app, "Resident") == "4 of 8"
        assert tile(app, "LRU hits") == f"{100 * found.rate('lru', 4):.1f} %"
        assert tile(app, "Optimum") == f"{100 * found.rate('optimum', 4):.1f} %"
        assert tile(app, "Loads a token") == f"{found.misses('lru', 4):.2f}"
        # 30,000 bytes over 25 GB/s are 1.2 microseconds.
        assert tile(app, "Waits a token") == f"{1.2 * found.misses('lru', 4):.1f} µs"
        said = texts(app)
        assert f"{found.tokens} tokens of 9 sequences" in said
        assert f"The first {found.fitted} tokens fill the caches" in said
        assert f"{found.groups['ratio'].iloc[0]:.3f} times the experts" in said
        rows = app.dataframe[0].value.set_index("tag")
        for tag, part in found.conversations.groupby("tag"):
            assert rows.loc[tag, "sequences"] == len(part)
            assert rows.loc[tag, "touched"] == pytest.approx(part["touched"].mean())
        assert len(app.get("plotly_chart")) == 5
        assert foretold_title(run, layer) in texts(app)


def test_forwards_and_the_phase(opened: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run").path
    app = turned(opened(run, unit="forward"), "memory")
    assert not app.exception
    assert "Phase eval (the sidebar chooses another)" in texts(app)
    assert [m.label for m in app.metric][-2:] == ["Loads a forward", "Waits a forward"]
    assert tile(app, "Waits a forward") == "not known"
    app = turned(opened(run, phase="train", unit="sequence"), "memory")
    assert not app.exception
    assert "Phase train: " in texts(app)
    assert "unit=sequence in the link is not here: left out." in texts(app)


def test_what_is_missing_is_said(opened: Any, tmp_path: Path) -> None:
    app = turned(opened(write_run(tmp_path / "counts", token_rows=False).path), "memory")
    assert not app.exception
    assert "No rows of single tokens were kept." in texts(app)
    run = write_run(tmp_path / "run").path
    app = turned(opened(run, first_step="99"), "memory")
    assert not app.exception
    assert "Nothing was recorded within the filters." in texts(app)
    relabelled(run, router="expert-choice")
    app = turned(opened(run), "memory")
    assert not app.exception
    assert "experts choose tokens: every expert computes in every forward" in texts(app)


def test_one_sequence_has_no_batches(opened: Any, tmp_path: Path) -> None:
    write_sequences(tmp_path / "run", sequences=1)
    app = turned(opened(tmp_path / "run"), "memory")
    assert not app.exception
    assert "Batches grouped by tag" in texts(app)
    app = turned(opened(tmp_path / "run", unit="forward"), "memory")
    assert not app.exception
    assert "With one forward there is nothing to fill a cache." in texts(app)
