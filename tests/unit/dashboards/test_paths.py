"""The Paths page."""

from __future__ import annotations

import base64
import inspect
import json
from collections import Counter
from itertools import permutations
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest
from support.apptest import texts, turned
from support.sequences import Choice, write_sequences
from support.traces import write_run

pytestmark = pytest.mark.slow


def charts(app: Any) -> list[dict[str, Any]]:
    return [json.loads(c.proto.spec) for c in app.get("plotly_chart")]


def counts(chart: dict[str, Any]) -> dict[tuple[int, int], int]:
    """The whole numbers behind the cells of a heat map, by row and column, without zeros."""
    heat = chart["data"][0]
    y, x, cells = (decoded(heat[name]) for name in ("y", "x", "customdata"))
    return {(int(y[i]), int(x[j])): int(n) for (i, j), n in np.ndenumerate(cells) if n}


def decoded(sent: Any) -> Any:
    """An array as Plotly sends it: a list, or bytes with a type and a shape."""
    if not isinstance(sent, dict):
        return np.array(sent)
    flat = np.frombuffer(base64.b64decode(sent["bdata"]), sent["dtype"])
    return flat.reshape([int(n) for n in str(sent.get("shape", flat.size)).split(",")])


def layer(app: Any) -> Any:
    return next(s for s in app.selectbox if s.label == "Layer")


def firsts(choices: list[Choice]) -> dict[tuple[int, int, int], int]:
    """First choice of each token by layer: weights fall from slot to slot."""
    return {(c.sequence, c.position, c.layer): c.experts[0] for c in choices}


def transitions_seen(choices: list[Choice], of: int) -> Counter[tuple[int, int]]:
    first = firsts(choices)
    return Counter(
        (expert, first[sequence, position, of + 1])
        for (sequence, position, at), expert in first.items()
        if at == of
    )


def test_a_layer_is_chosen(opened: Any, tmp_path: Path) -> None:
    choices = write_sequences(tmp_path / "run", sequences=8)
    app = turned(opened(tmp_path / "run"), "paths")
    assert not app.exception
    assert layer(app).value == 0
    app = layer(app).select(1).run()
    assert not app.exception
    assert app.query_params == {"run": "run", "layer": "1"}
    co_activated, followed, _ = charts(app)
    here = [c.experts for c in choices if c.layer == 1]
    assert counts(co_activated) == Counter(pair for ids in here for pair in permutations(ids, 2))
    assert counts(followed) == transitions_seen(choices, 1)
    again = turned(opened(tmp_path / "run", layer="1"), "paths")
    assert layer(again).value == 1
    assert [c["data"] for c in charts(again)] == [c["data"] for c in charts(app)]


def test_how_often_the_token_before_is_repeated(opened: Any, tmp_path: Path) -> None:
    choices = write_sequences(tmp_path / "run", layers=1)
    app = turned(opened(tmp_path / "run"), "paths")
    chosen = {(c.sequence, c.position): set(c.experts) for c in choices}
    pairs = [(now, chosen.get((s, p - 1))) for (s, p), now in chosen.items()]
    both = [(now, before) for now, before in pairs if before is not None]
    repeated = sum(len(now & before) for now, before in both) / sum(len(now) for now, _ in both)
    assert f"{100 * repeated:.1f} % of choices repeat the token before" in texts(app)


def test_filters_of_layers_are_what_there_is_to_choose(opened: Any, tmp_path: Path) -> None:
    write_sequences(tmp_path / "run")
    app = turned(opened(tmp_path / "run", first_layer="1", layer="0"), "paths")
    assert not app.exception
    assert layer(app).options == ["1", "2"]
    assert "layer=0 in the link is not here: left out." in texts(app)
    assert "Not narrowed by" not in texts(app)


def test_nothing_follows_the_last_layer(opened: Any, tmp_path: Path) -> None:
    write_sequences(tmp_path / "run")
    app = turned(opened(tmp_path / "run", layer="2"), "paths")
    assert not app.exception
    assert "No layer follows layer 2" in texts(app)


def test_one_layer_of_one_expert(opened: Any, tmp_path: Path) -> None:
    write_sequences(tmp_path / "run", layers=1, experts=1, top_k=1)
    app = turned(opened(tmp_path / "run"), "paths")
    assert not app.exception
    assert "No layer follows layer 0" in texts(app)
    assert "No kept token chose two experts in this layer" in json.dumps(charts(app))


def test_without_token_rows(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run", token_rows=False)
    app = turned(opened(tmp_path / "run"), "paths")
    assert not app.exception
    assert "No rows of single tokens were kept." in texts(app)
    assert not charts(app)


def test_what_was_thinned_says_so(tmp_path: Path) -> None:
    def drawn(path: str, most: int | None) -> None:
        from moe_lens.figures.co_activation import co_activation
        from moe_lens_dashboards.components.filters import Filters
        from moe_lens_dashboards.components.run import OpenRun
        from moe_lens_dashboards.components.show import draw

        draw(OpenRun(path, "run", Filters()), co_activation, "co_activation", layer=0, most=most)

    path = str(write_run(tmp_path / "run").path)
    for most, said in ((5, True), (None, False), (1_000_000, False)):
        script = f"{dedent(inspect.getsource(drawn))}\ndrawn({path!r}, {most})"
        app = AppTest.from_string(script).run()
        assert not app.exception
        assert ("From at most about 5 tokens" in texts(app)) is said
