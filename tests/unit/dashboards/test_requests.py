"""The Requests page: its numbers against plain loops over the rows that were written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.apptest import texts, tile, turned
from support.sequences import Choice, write_sequences
from support.traces import write_run

from moe_lens.numbers import decimal, percent
from moe_lens_dashboards.sequence import LOST

pytestmark = pytest.mark.slow

EVIL = '<img src=x onerror=alert(1)> **{}** $x$ "q" it\'s :red[z] [l](http://y)'


def tables(app: Any, column: str) -> list[pd.DataFrame]:
    return [d.value for d in app.dataframe if column in d.value.columns]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def one(choices: list[Choice], sequence: int) -> list[Choice]:
    return [c for c in choices if c.sequence == sequence]


def dropped_rate(choices: list[Choice]) -> float:
    return sum(len(c.dropped) for c in choices) / sum(len(c.experts) for c in choices)


def test_the_sequences_and_their_order(opened: Any, tmp_path: Path) -> None:
    choices = write_sequences(tmp_path / "run")
    app = turned(opened(tmp_path / "run"), "requests")
    assert not app.exception
    (table,) = tables(app, "experts_used")
    expected = {n: dropped_rate(one(choices, n)) for n in range(5)}
    assert list(table["sequence"]) == sorted(expected, key=lambda n: -expected[n])
    for row in table.to_dict("records"):
        mine = one(choices, row["sequence"])
        assert row["dropped_rate"] == pytest.approx(expected[row["sequence"]])
        assert row["tokens"] == len({c.position for c in mine})
        assert row["experts_used"] == len({(c.layer, e) for c in mine for e in c.experts})
        assert row["loss"] == pytest.approx(mean([c.loss for c in mine if c.layer == 0]))
    order = next(s for s in app.selectbox if s.label == "Most first")
    app = order.select("tokens").run()
    assert list(tables(app, "experts_used")[0]["sequence"]) == [4, 3, 2, 1, 0]
    assert app.query_params == {"run": "run", "order": "tokens"}


def test_a_chosen_sequence_is_opened(opened: Any, tmp_path: Path) -> None:
    choices = write_sequences(tmp_path / "run")
    mine = one(choices, 3)
    app = turned(opened(tmp_path / "run", sequence="0:3"), "requests")
    assert not app.exception
    assert app.query_params["sequence"] == "0:3"
    assert tile(app, "Tokens") == str(len({c.position for c in mine}))
    assert tile(app, "Dropped choices") == percent(dropped_rate(mine))
    assert tile(app, "Loss") == decimal(mean([c.loss for c in mine if c.layer == 0]), 3)
    (table,) = tables(app, "layer 0")
    for row in table.to_dict("records"):
        here = {c.layer: c for c in mine if c.position == row["position"]}
        assert row["token_id"] == here[0].token_id
        assert row["dropped"] == sum(len(c.dropped) for c in here.values())
        for layer, c in here.items():
            text = [f"{e}{LOST * (i in c.dropped)}" for i, e in enumerate(c.experts)]
            assert row[f"layer {layer}"] == ", ".join(text)
    most = Counter((c.layer, e) for c in mine for e in c.experts).most_common(1)[0][1]
    assert f"by {most} tokens" in texts(app)


def test_filters_narrow_the_table_and_what_is_opened(opened: Any, tmp_path: Path) -> None:
    choices = write_sequences(tmp_path / "run")
    link = {"tag": "prose", "first_layer": "1", "last_layer": "1", "sequence": "0:1"}
    app = turned(opened(tmp_path / "run", **link), "requests")
    mine = [c for c in one(choices, 1) if c.layer == 1]
    assert sorted(tables(app, "experts_used")[0]["sequence"]) == [1, 3]
    assert tile(app, "Experts used") == str(len({e for c in mine for e in c.experts}))
    assert [c for c in tables(app, "layer 1")[0].columns if "layer" in c] == ["layer 1"]
    app = turned(opened(tmp_path / "run", tag="code", sequence="0:1"), "requests")
    assert "No token of sequence 1 of rank 0 is within the filters." in texts(app)


@pytest.mark.parametrize("bad", ["1", "0:x", "-1:0", "0:1:2", "0:" + "9" * 30, "<b>"])
def test_a_link_to_no_sequence(opened: Any, tmp_path: Path, bad: str) -> None:
    write_sequences(tmp_path / "run", sequences=1)
    app = turned(opened(tmp_path / "run", sequence=bad), "requests")
    assert not app.exception
    assert f"sequence={bad} in the link is no rank:sequence: left out." in texts(app)
    assert "sequence" not in app.query_params


def test_markup_in_tags_and_request_ids_is_text(opened: Any, tmp_path: Path) -> None:
    write_sequences(tmp_path / "run", tags=(EVIL,), request=EVIL)
    app = turned(opened(tmp_path / "run", sequence="0:2"), "requests")
    assert not app.exception
    assert EVIL.format(2) in set(tables(app, "experts_used")[0]["request"])
    said = next(c.value for c in app.caption if c.value.startswith("request"))
    assert EVIL.format(2) in said.replace("\\", "")
    assert r"\<img" in said
    assert r"\$x\$" in said


def test_what_was_not_recorded(opened: Any, tmp_path: Path) -> None:
    write_sequences(tmp_path / "bare", token_ids=False, losses=False)
    app = turned(opened(tmp_path / "bare", sequence="0:1"), "requests")
    assert not app.exception
    assert "The ids of the tokens were not kept." in texts(app)
    assert "No loss was recorded." in texts(app)
    assert tile(app, "Loss") == "–"
    write_run(tmp_path / "counts", token_rows=False)
    app = turned(opened(tmp_path / "counts"), "requests")
    assert not app.exception
    assert "No rows of single tokens were kept." in texts(app)
    assert len(tables(app, "loss_tokens")[0]) == 2
    assert not tables(app, "experts_used")


def test_one_layer_of_one_expert(opened: Any, tmp_path: Path) -> None:
    write_sequences(tmp_path / "run", layers=1, experts=1, top_k=1)
    app = turned(opened(tmp_path / "run", sequence="0:0"), "requests")
    assert not app.exception
    assert tile(app, "Experts used") == "1"
    assert tile(app, "Tokens") == "6"
