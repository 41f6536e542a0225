"""Comparing runs whose experts are numbered otherwise."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.traces import Rows, layer_info, meta, segment

import moe_lens
from moe_lens.queries.session import open_trace
from moe_lens.terminal.difference import render
from moe_lens.trace.meta import write_meta

LAYERS, EXPERTS, ZERO, TOP_K, SEQUENCES, LENGTH = 2, 8, 1, 3, 12, 20
RENUMBERED = [np.random.default_rng(layer).permutation(EXPERTS) for layer in range(LAYERS)]


def ids(seed: int) -> np.ndarray:
    """`[N, L, K]`; some tokens choose the expert that computes nothing."""
    rng = np.random.default_rng(seed)
    shape = (SEQUENCES * LENGTH, LAYERS, EXPERTS + ZERO)
    return np.argsort(rng.random(shape), -1)[..., :TOP_K]


def write(path: Path, ids_NLK: np.ndarray) -> Path:
    layers = [layer_info(i, EXPERTS, TOP_K, zero_experts=ZERO) for i in range(LAYERS)]
    write_meta(path, meta(0, layers=layers, weights="exact"))
    tokens: Rows = []
    routing: Rows = []
    for n, of_token in enumerate(ids_NLK.tolist()):
        sequence, position = divmod(n, LENGTH)
        at: dict[str, Any] = {"step": sequence, "forward": 0, "token": position}
        tokens.append({**at, "stream": "main", "sequence": sequence, "position": position,
                       "padding": False, "token_id": n % 7})  # fmt: skip
        for layer, chosen in enumerate(of_token):
            routing.append({**at, "layer": layer, "expert_ids": chosen, "weights": [0.2] * TOP_K,
                            "margin": 0.1})  # fmt: skip
    steps = [{"step": s, "phase": "eval"} for s in range(SEQUENCES)]
    for table, rows in (("tokens", tokens), ("routing", routing), ("steps", steps)):
        segment(path, table, rows)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces")
    mine = ids(0)
    renamed = mine.copy()
    for layer, other in enumerate(RENUMBERED):
        renamed[:, layer] = np.append(other, EXPERTS)[mine[:, layer]]
    write(path / "a", mine)
    write(path / "renumbered", renamed)
    write(path / "other", ids(1))
    return path


def test_choices_are_those_that_were_written(runs: Path) -> None:
    with open_trace([runs / "a", runs / "other"]) as trace:
        rows = trace.query("diff_choices", a="a", b="other").rows()
        some = trace.query("diff_choices", a="a", b="other", most=50).df()
        one = trace.query("diff_choices", a="a", b="other", first_layer=1, last_layer=1).df()
        late = trace.query("diff_choices", a="a", b="other", first_step=10, phase="eval").df()
    mine, other = ids(0), ids(1)
    assert len(rows) == LAYERS * SEQUENCES * LENGTH
    for row in rows:
        n, layer = int(row["sequence"]) * LENGTH + int(row["position"]), int(row["layer"])
        assert row["ids_a"] == mine[n, layer].tolist()
        assert row["ids_b"] == other[n, layer].tolist()
    assert set(some.groupby(["layer", "sequence"]).size()) == {LENGTH}  # whole sequences
    assert 50 <= len(some) // LAYERS < 50 + LENGTH
    assert (one["layer"] == 1).all() and len(one) == len(rows) // 2  # noqa: PT018
    assert set(late["sequence"]) == {10, 11}


@pytest.mark.parametrize("by", ["token", "position"])
def test_renumbered_experts_agree_once_matched(runs: Path, by: Any) -> None:
    found = moe_lens.diff(runs / "a", runs / "renumbered", by=by, match_experts=True)
    assert found.overlap < 0.6
    for layer, other in enumerate(RENUMBERED):
        match = found.matched[layer]
        assert match is not None
        assert (match.expert_E == other).all()
        assert match.beyond
        # A token that chose the expert that computes nothing has one choice less: all agree.
        assert match.after == pytest.approx(1)


def test_runs_that_know_nothing_of_each_other(runs: Path) -> None:
    found = moe_lens.diff(runs / "a", runs / "other", match_experts=True)
    for match in found.matched.values():
        assert match is not None
        assert not match.beyond
        assert match.after == pytest.approx(match.after_by_chance, abs=0.06)


def test_the_page(runs: Path) -> None:
    found = moe_lens.diff(runs / "a", runs / "renumbered", match_experts=True, flips=0)
    out = io.StringIO()
    render(found, Console(file=out, width=100, highlight=False))
    text = out.getvalue()
    assert "Experts matched by the tokens they serve" in text
    after = text.split("Experts matched")[1]
    row = next(x.split() for x in after.splitlines() if x.split()[:2] == ["0", "120"])
    assert row[4] == "1.0000"
    assert row[-1] == str((RENUMBERED[0] != np.arange(EXPERTS)).sum())
    plain = moe_lens.diff(runs / "a", runs / "renumbered", flips=0)
    assert plain.matched == {}
    out = io.StringIO()
    render(plain, Console(file=out, width=100, highlight=False))
    assert "Experts matched" not in out.getvalue()
