"""`moe-lens cache` as a user meets it: answers first, tables, JSON, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.sequences import write_sequences
from support.traces import layer_info, write_run
from typer.testing import CliRunner

from moe_lens.cli import app
from moe_lens.errors import MoeLensError
from moe_lens.queries.memory import memory
from moe_lens.queries.session import open_trace
from moe_lens.trace.layout import meta_path
from moe_lens.trace.meta import read_meta, write_meta


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "run"
    write_sequences(path, sequences=9, length=8)
    meta = read_meta(meta_path(path, 0))
    meta.layers = [layer_info(i, hidden_size=100, intermediate_size=50) for i in range(3)]
    write_meta(path, meta)
    return path


def invoked(*words: object) -> str:
    done = CliRunner().invoke(app, ["cache", *map(str, words)])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def refused(*words: object) -> str:
    with pytest.raises(MoeLensError) as caught:
        invoked(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def said(run: Path, *words: object) -> dict[str, Any]:
    (phase,) = json.loads(invoked(run, "--json", *words))
    return phase


def test_the_page_begins_with_the_answer(run: Path) -> None:
    words = [sys.executable, "-m", "moe_lens", "cache", str(run), "--batch", "3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith("train: 4 of 8 experts resident per layer: LRU hits ")
    assert first.endswith(" %, chance 50.0 %.")
    for title in ("Hit rate by experts resident", "Hit rate by layer, 4 resident",
                  "Conversations and prefetch by layer", "touched by a batch of 3"):  # fmt: skip
        assert title in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "nan" not in done.stdout
    assert "\x1b" not in done.stdout


def test_the_sentence_is_the_mean_over_requests(run: Path) -> None:
    with open_trace(run) as trace:
        found = [x.memory for x in memory(trace, batch=2)]
    asked = [m.requests * m.counted for m in found]
    hits = {
        name: sum(m.rate(name, 5) * n for m, n in zip(found, asked, strict=True)) / sum(asked)
        for name in ("lru", "optimum")
    }
    loads = sum((1 - m.rate("lru", 5)) * m.requests for m in found)
    phase = said(run, "--resident", 5, "--bandwidth", 10)
    assert phase["answers"][0] == (
        f"train: 5 of 8 experts resident per layer: LRU hits {100 * hits['lru']:.1f} %, "
        f"the optimum {100 * hits['optimum']:.1f} %, chance 62.5 %."
    )
    # 3 x 100 x 50 x 2 bytes over 10 GB/s are 3 microseconds.
    assert f"{loads:.1f} experts a token over 3 layers: {3 * loads:.2f} µs" in phase["answers"][1]
    assert phase["sizes"][-1]["size"] == 7
    assert [row["size"] for row in phase["layers"]] == [5, 5, 5]
    row = next(r for r in phase["sizes"] if r["size"] == 5)
    assert row["lru"] == pytest.approx(hits["lru"])
    assert row["stall_lru_s"] == pytest.approx(3e-6 * loads)


def test_the_smallest_cache_for_a_share_of_hits(run: Path) -> None:
    with open_trace(run) as trace:
        found = [x.memory for x in memory(trace, batch=2)]
    asked = [m.requests * m.counted for m in found]

    def rate(policy: str, size: int) -> float:
        hits = (m.rate(policy, size) * n for m, n in zip(found, asked, strict=True))
        return sum(hits) / sum(asked)

    phase = said(run, "--hit-rate", 0.7)
    for policy in ("lru", "optimum"):
        size = phase["wanted"][policy]
        assert 2 < size < 8
        assert rate(policy, size) >= 0.7 > rate(policy, size - 1)
    lru, best = (phase["wanted"][x] for x in ("lru", "optimum"))
    assert phase["answers"][2] == (
        f"To hit 70.0 % LRU takes {lru} of 8 experts resident per layer, the optimum {best}."
    )
    assert said(run)["wanted"]["hit_rate"] == 0.9


def test_what_an_expert_weighs(run: Path) -> None:
    weight = {
        words: said(run, *words)["curves"][0]["expert_bytes"]
        for words in ((), ("--dtype", "int4"), ("--expert-mb", "2.5"))
    }
    assert list(weight.values()) == [30_000, 7_500, 2_500_000]


def test_without_the_size_of_an_expert_there_is_no_time(tmp_path: Path) -> None:
    write_sequences(tmp_path / "run")
    phase = said(tmp_path / "run")
    assert "not known without the size of an expert: give --expert-mb." in phase["answers"][1]
    assert all(row["stall_lru_s"] is None for row in phase["layers"])
    page = invoked(tmp_path / "run")
    assert "nan" not in page
    assert "–" in page


def test_layers_and_json_hold_every_size(run: Path) -> None:
    phase = said(run, "--layers", "0,2")
    assert [c["layer"] for c in phase["curves"]] == [0, 2]
    curve = phase["curves"][0]
    assert [r["size"] for r in curve["hit_rates"]] == list(range(2, 9))
    assert [r["size"] for r in curve["recall"]] == list(range(1, 9))
    assert curve["recall"][0]["last_layer"] is None


def test_a_forward_that_needs_all_experts(tmp_path: Path) -> None:
    write_sequences(tmp_path / "run", length=60, layers=1)
    phase = said(tmp_path / "run", "--unit", "forward")
    assert phase["answers"][0] == (
        "train: a forward needs all 8 experts of a layer at once: no cache helps it."
    )
    write_sequences(tmp_path / "few", length=2, layers=1, experts=16)
    phase = said(tmp_path / "few", "--unit", "forward", "--resident", 2)
    assert (
        "of 16 experts of a layer at once, which a cache of 2 does not hold."
        in (phase["answers"][0])
    )


def test_one_sequence_is_cut_in_two(tmp_path: Path) -> None:
    write_sequences(tmp_path / "run", sequences=1, length=20)
    phase = said(tmp_path / "run")
    assert phase["sequences"] == 1
    assert phase["tags"] == []
    curve = phase["curves"][0]
    assert abs(curve["accesses_before"] - curve["accesses_counted"]) <= 1


def test_layers_that_are_left_out_are_named(tmp_path: Path) -> None:
    write_sequences(tmp_path / "run")
    meta = read_meta(meta_path(tmp_path / "run", 0))
    meta.layers[1].router = "expert-choice"
    write_meta(tmp_path / "run", meta)
    assert said(tmp_path / "run")["not_measured"] == [1]
    assert "Not measured: layer 1; experts choose tokens there" in " ".join(
        invoked(tmp_path / "run").split()
    )
    assert said(tmp_path / "run", "--layers", 2)["not_measured"] == []
    assert "Not measured" not in invoked(tmp_path / "run", "--layers", 2)


def test_mistakes_are_one_line(run: Path, tmp_path: Path) -> None:
    assert refused(run, "--bandwidth", 0) == "--bandwidth must be above 0, got 0."
    assert refused(run, "--bandwidth", "nan") == "--bandwidth must be above 0, got nan."
    assert refused(run, "--expert-mb", -1) == "--expert-mb must be above 0, got -1."
    assert (
        refused(run, "--resident", 9) == "--resident is at most 8, the experts of a layer; got 9."
    )
    assert refused(run, "--layers", "x") == "--layers takes numbers as 0-3,7; got 'x'."
    counts = write_run(tmp_path / "counts", token_rows=False).path
    assert "--tokens 1" in refused(counts)
    words = [sys.executable, "-m", "moe_lens", "cache", str(counts)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: This trace has no per-token rows")
