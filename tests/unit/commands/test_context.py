"""`moe-lens context` as a user meets it: answers first, tables, JSON, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.paired_prompts import by_id, by_last, write_prompts
from typer.testing import CliRunner

from moe_lens.cli import app
from moe_lens.errors import MoeLensError
from moe_lens.metrics.stall import expert_bytes
from moe_lens.queries.context import conversations
from moe_lens.queries.session import open_trace
from moe_lens.trace.synthetic import Spec, generate

X, Y = list(range(10, 22)), list(range(40, 50))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "run"
    prompts = [("p", "a", X + Y), ("p", "b", Y + X), ("q", "a", X), ("q", "a", X)]
    write_prompts(path, [*prompts, *[(None, None, Y + X)] * 2], [by_id, by_last])
    return path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "served"
    generate(path, Spec(phases=("serve",), topics=4, stay=1.0, topic_strength=2.0, length=48))
    return path


def invoked(*words: object) -> str:
    done = CliRunner().invoke(app, ["context", *map(str, words)])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def refused(*words: object) -> str:
    with pytest.raises(MoeLensError) as caught:
        invoked(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def said(*words: object) -> dict[str, Any]:
    return json.loads(invoked("--json", *words))


def test_the_page_begins_with_the_answers(run: Path) -> None:
    words = [sys.executable, "-m", "moe_lens", "context", str(run), "--prefix", "4,50%",
             "--after", "4"]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert text.startswith("1 pair in another order: a token keeps ")
    for title in ("The same content in another order, by layer",
                  "Parts of what a token says about its experts, by layer",
                  "Tokens whose set changed, by their distance from the cut",
                  "1 prompt twice: no token's set changed.",
                  "eval: the 4 of 8 experts of a layer that the first 4 tokens chose most",
                  "Choices after a beginning that are of the 4 experts named by",
                  "Loads of a conversation, 4 resident, LRU that begins with",
                  "never of its own or one of its pair"):  # fmt: skip
        assert title in " ".join(text.split())
    assert all(len(line) <= 100 and line == line.rstrip() for line in text.splitlines())


def test_a_trace_without_pairs_says_so_in_a_line(served: Path) -> None:
    first = invoked(served).splitlines()[0]
    assert first.startswith("No pairs: This trace has no pairs: no column 'pair' of `sequences`.")
    found = said(served)
    assert found["pairs"] is None
    assert [x["phase"] for x in found["phases"]] == ["prefill", "decode"]


def test_prompts_too_short_for_a_beginning_leave_the_pairs(run: Path) -> None:
    text = invoked(run, "--prefix", "64", "--after", "64")
    assert text.startswith("1 pair in another order")
    assert "No conversations: No sequence with rows from its first token on" in text


def test_beginnings_that_are_too_long_are_named(served: Path) -> None:
    words = ["--prefix", "500,25%,8", "--after", "8", "--phase", "prefill"]
    (phase,) = said(served, *words)["phases"]
    assert [x["beginning"] for x in phase["prefixes"]] == [8, 0.25]
    assert phase["too_long"] == [500]
    text = " ".join(invoked(served, *words).split())
    assert "No sequence goes on after the first 500 tokens." in text
    assert text.index(" 8 ") < text.index(" 25 % ")
    late = " ".join(invoked(served, "--prefix", "8", "--after", "500").split())
    assert "goes on after the first 500 tokens. So nothing is said of loads: give a" in late
    assert "The same by layer" not in late
    assert "nan" not in late


def test_phases_without_a_conversation_that_is_long_enough_are_named(tmp_path: Path) -> None:
    generate(tmp_path / "run", Spec(phases=("train", "serve"), length=40, decode=4, steps=2))
    found = said(tmp_path / "run", "--prefix", "42", "--after", "42")
    assert [x["phase"] for x in found["phases"]] == ["decode"]
    assert found["too_short"] == ["train", "prefill"]
    text = " ".join(invoked(tmp_path / "run", "--prefix", "42", "--after", "42").split())
    assert "Not measured: train, prefill. No sequence there with rows from its first" in text


def test_loads_are_means_over_conversations_and_cost_what_the_link_says(served: Path) -> None:
    with open_trace(served) as trace:
        measured = list(conversations(trace, phase="decode"))
    found = said(served, "--phase", "decode", "--bandwidth", "10", "--resident", "5")
    (phase,) = found["phases"]
    each = expert_bytes(256, 128)
    for row in phase["loads"]:
        loads = sum(
            float(x.loads.loads.set_index("size").loc[5, row["start"]]) / x.loads.sequences
            for x in measured if x.loads
        )  # fmt: skip
        assert row["loads"] == pytest.approx(loads)
        assert row["bytes"] == pytest.approx(loads * each)
        assert row["seconds"] == pytest.approx(loads * each / 10e9)
        cold = phase["loads"][0]
        assert row["saved_loads"] == pytest.approx(cold["loads"] - loads)
        assert row["saved_seconds"] == pytest.approx(cold["seconds"] - row["seconds"])
    assert {x["start"]: x["ahead"] for x in phase["loads"]} == {
        "cold": 0, "popularity": 10, "prefix": 10, "kept": 0, "optimum": 10}  # fmt: skip


def test_recall_over_layers_weighs_each_by_its_choices(served: Path) -> None:
    with open_trace(served) as trace:
        measured = list(conversations(trace, phase="prefill"))
    (phase,) = said(served, "--phase", "prefill", "--resident", "3")["phases"]
    for row in phase["prefixes"]:
        of = [y for x in measured for y in x.foretold if y.prefix == row["beginning"]]
        hits = sum(y.recall["prefix"].iloc[2] * y.choices for y in of)
        assert row["prefix"] == pytest.approx(hits / sum(y.choices for y in of))
        assert row["covering"] == pytest.approx(sum(y.covering for y in of) / len(of))


def test_without_sizes_of_experts_seconds_are_not_known(tmp_path: Path) -> None:
    generate(tmp_path / "run", Spec(hidden_size=None, length=48, steps=2))
    text = " ".join(invoked(tmp_path / "run").split())
    assert "how long that takes is not known: give --expert-mb." in text
    (phase,) = said(tmp_path / "run")["phases"]
    assert all(row["seconds"] is None for row in phase["loads"])
    (weighed,) = said(tmp_path / "run", "--expert-mb", "2")["phases"]
    assert weighed["loads"][0]["bytes"] == pytest.approx(2e6 * weighed["loads"][0]["loads"])


def test_an_alignment_from_a_file(run: Path, tmp_path: Path) -> None:
    blocks = tmp_path / "blocks.json"
    blocks.write_text(json.dumps({"p": [[0, 10, 12]], "q": []}))
    found = said(run, "--align", blocks)
    assert [x["aligned"] for x in found["pairs"]["pairs"]] == [12, 0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prefix", "0"], "--prefix takes tokens (1 or more) or shares"),
        (["--prefix", "16,x"], "got 'x'"),
        (["--prefix", "100%"], "got '100%'"),
        (["--after", "8,16"], "--after takes one beginning"),
        (["--cover", "0"], "--cover must be above 0, up to 1; got 0."),
        (["--bandwidth", "-1"], "--bandwidth must be above 0, got -1."),
        (["--expert-mb", "nan"], "--expert-mb must be above 0, got nan."),
        (["--requests", "a"], "--requests takes pairs of request ids, as a=b,c=d; got 'a'."),
        (["--requests", "a=a"], "got 'a=a'"),
        (["--requests", "r0=nobody"], "request id 'nobody'"),
        (["--align", "sideways"], "--align is one of ids, position, end, or a JSON file"),
        (["--pair", "prompt"], "no column 'prompt' of `sequences` (it has pair, variant)"),
        (["--layers", "9"], "There is no layer 9"),
        (["--prefix", "4", "--after", "4", "--resident", "1"], "--resident is from 2"),
        (["--prefix", "4", "--after", "4", "--resident", "9"], "to 8, the experts of a layer"),
    ],
)
def test_mistakes_are_a_line(run: Path, words: list[str], says: str) -> None:
    assert says in refused(run, *words)


@pytest.mark.parametrize("text", ["{", "[]", '{"p": [[1, 2]]}', '{"p": [[0, 0, "x"]]}'])
def test_files_that_hold_no_blocks(run: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "blocks.json"
    path.write_text(text)
    assert "JSON" in refused(run, "--align", path) or "must hold blocks by pair" in refused(
        run, "--align", path
    )


def test_counts_alone_are_refused(tmp_path: Path) -> None:
    generate(tmp_path / "run", Spec(rows=False, steps=2))
    assert "no per-token rows, only counts" in refused(tmp_path / "run")
