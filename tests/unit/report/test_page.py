"""The HTML report as text: its size, its numbers, what it escapes, what it does without data."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.replayed import timings, write
from support.traces import Written, layer_info, meta, segment, write_run

from moe_lens.queries.catalog import question
from moe_lens.queries.session import open_trace
from moe_lens.report.contents import SECTIONS
from moe_lens.report.page import page
from moe_lens.trace.meta import write_meta

EVIL = '"><script>alert(1)</script>&'
FIGURES = [s for figures in SECTIONS.values() for s in figures if not s.needs_rows]
"""Of a run that was not replayed."""


def moe_lens(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe_lens", *map(str, words)], capture_output=True, text=True
    )


def text_of(path: Path, phase: str | None = None) -> str:
    with open_trace(path) as trace:
        return page(trace, phase)


def unpacked(text: str, name: str) -> str:
    found = re.search(rf'id="{name}">([A-Za-z0-9+/=]+)</script>', text)
    assert found is not None
    return gzip.decompress(base64.b64decode(found[1])).decode()


def drawings(text: str) -> dict[str, Any]:
    """Figure by the name of its place in the page."""
    names = re.findall(r'id="figure-(\d+)" data-name="(\w+)"', text)
    figures = json.loads(unpacked(text, "figures"))["figures"]
    assert [int(n) for n, _ in names] == list(range(len(figures)))
    return dict(zip((name for _, name in names), figures, strict=True))


def array(spec: dict[str, str]) -> Any:
    kinds = {"f8": "<f8", "f4": "<f4", "i1": "<i1", "i2": "<i2", "i4": "<i4"}
    values = np.frombuffer(base64.b64decode(spec["bdata"]), kinds[spec["dtype"]])
    return values.reshape([int(n) for n in spec.get("shape", str(len(values))).split(",")])


def facts(text: str) -> dict[str, str]:
    pairs = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text)
    return {html.unescape(a): html.unescape(b) for a, b in pairs}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_run(tmp_path_factory.mktemp("t") / "run1", steps=6, tokens=300)


def test_numbers_are_those_written(written: Written) -> None:
    text = text_of(written.path)
    cells = array(drawings(text)["load_heatmap"]["data"][0]["customdata"])
    for layer in range(2):
        for expert in range(8):
            load = [r for r in written.rows["load"] if r["layer"] == layer]
            assert cells[layer][expert] == sum(r["routed"] for r in load if r["expert"] == expert)
    train = [r for r in written.rows["load"] if r["phase"] == "train"]
    dropped = sum(r["dropped"] for r in train) / sum(r["routed"] for r in train)
    assert f"train {100 * dropped:.1f} %, eval 0" in facts(text)["drops"]
    assert facts(text)["recorded"].startswith("6 steps, 6 forwards")


def test_a_phase_alone(written: Written) -> None:
    text = text_of(written.path, "eval")
    assert facts(text)["counted"] == "phase eval"
    cells = array(drawings(text)["load_heatmap"]["data"][0]["customdata"])
    load = [r for r in written.rows["load"] if (r["phase"], r["layer"]) == ("eval", 0)]
    assert cells[0][2] == sum(r["routed"] for r in load if r["expert"] == 2)
    assert "phase = &#x27;eval&#x27;" in text
    assert (
        "No token was dropped"
        in drawings(text)["drops_by_layer"]["layout"]["annotations"][0]["text"]
    )


def test_every_figure_shows_its_sql(written: Written) -> None:
    text = text_of(written.path)
    sql = [html.unescape(found) for found in re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)]
    assert sql == [question(shown.question).sql for shown in FIGURES]


def test_it_has_the_facts_and_checks_of_the_terminal_report(written: Written) -> None:
    printed = " ".join(moe_lens("report", written.path, "--width", 200).stdout.split())
    text = text_of(written.path)
    found = facts(text)
    assert found.pop("counted") == "all phases"
    assert {"model", "routers", "recorded", "phases", "tokens", "load", "drops"} <= set(found)
    for label, fact in found.items():
        assert f"{label} {fact}" in printed
    for check in re.findall(r"<li(?: class=bad)?>(.*?)</li>", text):
        assert html.unescape(check) in printed


def test_groups_and_shared_weights_are_among_the_facts(written: Written, tmp_path: Path) -> None:
    assert not {"groups", "shared weights"} & set(facts(text_of(written.path)))
    names = [f"0/{e}" for e in range(8)]
    own, shared = layer_info(0, groups=4, top_groups=2), layer_info(1, identities=[*names])
    path = write_run(tmp_path / "run").path
    write_meta(path, meta(layers=[own, shared]))
    found = facts(text_of(path))
    # 2 of 8 experts always lie in 2 groups: the limit takes nothing
    within = "2^4.81 sets of 2 experts within reach, of 2^4.81"
    assert found["groups"] == f"1 layer × 4 groups of 2, a token's from 2 of them: {within}"
    assert found["shared weights"] == "8 experts in 16 places of 2 layers"


def test_the_layers_table_is_that_of_layer_balance(written: Written) -> None:
    text = text_of(written.path)
    table = re.search(r'<table class="layers">(.*?)</table>', text)
    assert table is not None
    rows = re.findall(r"<tr>(<td>.*?)</tr>", table[1])
    tokens = sum(r["tokens"] for r in written.rows["layers"] if r["layer"] == 0)
    assert len(rows) == 2
    assert rows[0].startswith(f"<td>0</td><td>{tokens:,}</td>")


def test_text_from_the_trace_is_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run <1>", steps=4, tokens=300, tags=(EVIL, "code"), model=EVIL).path
    text = text_of(run)
    assert "<script>alert" not in text
    assert "<h1>run &lt;1&gt;</h1>" in text
    assert "<script>alert" not in json.loads(json.dumps(unpacked(text, "figures")))
    assert facts(text)["model"] == EVIL


def test_nothing_is_asked_of_a_network(written: Written) -> None:
    text = text_of(written.path)
    shell = re.sub(r'id="(plotly|figures)">[^<]+<', "", text)
    assert "default-src 'none'" in shell
    assert not re.findall(r"(?:src|href|action)=|@import|url\(|fetch\(", shell)


def test_94_layers_of_384_experts_fit_into_3_megabytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_meta(tmp_path, meta(0, layers=[layer_info(i, 384, 8) for i in range(94)]))
    keys = {"attempt": 0, "phase": "train"}
    load, routers, layers = [], [], []
    for step in range(3):
        at = {**keys, "window": step, "step": step}
        for layer in range(94):
            counts = rng.poisson(np.exp(rng.normal(5, 1, 384)))
            load += [
                {**at, "layer": layer, "tag": "all", "expert": e, "routed": n, "processed": n}
                for e, n in enumerate(counts.tolist())
                if n
            ]
            tokens = int(counts.sum()) // 8
            layers.append({**at, "layer": layer, "forwards": 1, "tokens": tokens})
            routers.append({**at, "layer": layer, "tag": "all", "tokens": tokens,
                            "entropy_sum": tokens * rng.random()})  # fmt: skip
    steps = [{**keys, "window": s, "step": s, "host_ns": 10**9, "tokens": 999} for s in range(3)]
    for table, rows in (("load", load), ("routers", routers), ("layers", layers), ("steps", steps)):
        segment(tmp_path, table, rows)
    text = text_of(tmp_path)
    assert array(drawings(text)["load_heatmap"]["data"][0]["z"]).shape == (94, 384)
    assert len(text.encode()) < 3_000_000


def test_a_replayed_run_shows_what_it_costs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r").path
    assert "replay_layers" not in drawings(text_of(run))
    write(run, "mine", timings(4))
    drawn = drawings(text_of(run))["replay_layers"]
    assert [t["name"] for t in drawn["data"]][:2] == ["this routing", "balanced twin"]


def test_runs_stand_one_after_the_other(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, seed=i).path for i, name in enumerate(("a", "b"))]
    with open_trace(paths) as trace:
        text = page(trace)
    assert re.findall(r"<h1>(.*?)</h1>", text) == ["a", "b"]
    assert text.count('id="figure-') == 2 * len(FIGURES)
    titles = [
        f["layout"]["title"]["text"] for f in json.loads(unpacked(text, "figures"))["figures"]
    ]
    assert len(titles) == 2 * len(FIGURES)


def test_a_run_without_rows_and_losses_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", token_rows=False, losses=False).path
    found = drawings(text_of(run))
    for name in ("near_ties", "repetition", "unserved_by_position", "loss_by_tag"):
        assert found[name]["data"] == []
        assert "record" in found[name]["layout"]["annotations"][0]["text"]


def test_a_run_that_has_seen_nothing_has_a_page(tmp_path: Path) -> None:
    write_meta(tmp_path, meta(0))
    found = drawings(text_of(tmp_path))
    assert all(figure["data"] == [] for figure in found.values())


def test_one_layer_and_one_expert(tmp_path: Path) -> None:
    write_meta(tmp_path, meta(0, layers=[layer_info(0, 1, 1)]))
    at = {"attempt": 0, "window": 0, "step": 0, "phase": "eval"}
    load = {"layer": 0, "tag": "all", "expert": 0, "routed": 9, "processed": 9}
    segment(tmp_path, "load", [{**at, **load}])
    segment(tmp_path, "layers", [{**at, "layer": 0, "forwards": 1, "tokens": 9}])
    segment(tmp_path, "steps", [{**at, "tokens": 9, "host_ns": 1000}])
    assert array(drawings(text_of(tmp_path))["load_heatmap"]["data"][0]["text"]).tolist() == [[1.0]]


def test_long_runs_are_bucketed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", layers=1, steps=450, tokens=8, token_rows=False).path
    text = text_of(run)
    (line, *_) = drawings(text)["load_over_time"]["data"]
    assert "$every = 2" in text
    assert array(line["x"]).tolist() == list(range(0, 450, 2))


def test_the_command_writes_a_file_in_place_of_the_page(written: Written, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    done = moe_lens("report", written.path, "--html", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"Wrote {re.escape(str(file))} \(2\.\d+ MB\)\.\n", done.stdout)
    assert file.read_text("utf-8").startswith("<!DOCTYPE html>")


def test_a_file_that_cannot_be_written(written: Written, tmp_path: Path) -> None:
    done = moe_lens("report", written.path, "--html", tmp_path / "no" / "r.html")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: cannot write .*No such file.*\n", done.stderr)
