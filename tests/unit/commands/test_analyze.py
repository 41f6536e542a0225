"""`moe-lens analyze` as a user meets it: the answer, values beside chance, what is lacking."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.traces import write_run
from typer.testing import CliRunner

from moe_lens.cli import app
from moe_lens.errors import MoeLensError
from moe_lens.metrics.catalogue import metrics
from moe_lens.numbers import digits
from moe_lens.queries.session import open_trace
from moe_lens.trace.synthetic import Dead, Hot, Spec, generate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "run"
    planted = (Hot(0, share=0.9, layers=(2,)), Dead(1))
    generate(path, Spec(layers=5, experts=16, top_k=2, steps=2, phases=("train", "eval"),
                        capacity_factor=1.25, planted=planted))  # fmt: skip
    return path


def invoked(*words: object) -> str:
    done = CliRunner().invoke(app, ["analyze", *map(str, words)])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def refused(*words: object) -> str:
    with pytest.raises(MoeLensError) as caught:
        invoked(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def said(*words: object) -> list[dict[str, Any]]:
    phases: list[dict[str, Any]] = json.loads(invoked("--json", *words))
    return phases


def test_the_page_begins_with_the_answer(run: Path) -> None:
    words = [sys.executable, "-m", "moe_lens", "analyze", str(run), "--phase", "train"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    whole = " ".join(done.stdout.split())
    assert whole.startswith("train, 5 layers: the hottest expert takes 7.")
    assert " times the mean (layer 2, 1." in whole
    assert "; 5 dead experts; " in whole
    titles = done.stdout.splitlines()
    for title in ("balance", "confidence", "losses", "capacity", "not computed"):
        assert title in titles
    assert max(map(len, titles)) <= 100
    assert "nan" not in done.stdout
    assert "\x1b" not in done.stdout
    assert "bf16_ties, top_k_mass" in whole
    assert "no router logits of single tokens: record with tokens=1.0 and logits=True." in whole


def test_every_metric_is_there_or_said_to_be_lacking(run: Path) -> None:
    phases = said(run)
    assert [p["phase"] for p in phases] == ["train", "eval"]
    for phase in phases:
        missing = {name for row in phase["lacking"] for name in row["metrics"]}
        for layer in phase["layers"]:
            assert list(layer["metrics"]) == list(metrics())
            for name, cell in layer["metrics"].items():
                assert (cell["value"] is None) == bool(cell["lacks"]), name
                assert not cell["lacks"] or name in missing


def test_values_are_those_of_the_counts(run: Path) -> None:
    (phase,) = said(run, "--phase", "train", "--only", "max_vio,overflow_rate", "--layers", "2")
    (row,) = phase["layers"]
    with open_trace(run) as trace:
        loads = trace.sql(
            "select expert, sum(routed) as n, sum(overflowed) as over from load "
            "where layer = 2 and phase = 'train' group by expert"
        ).rows()
    n = [row["n"] for row in loads]
    assert row["metrics"]["max_vio"]["value"] == pytest.approx(max(n) * 16 / sum(n) - 1)
    assert row["metrics"]["max_vio"]["beyond"] == "high"
    over = sum(row["over"] for row in loads) / sum(n)
    cell = row["metrics"]["overflow_rate"]
    assert cell["value"] == pytest.approx(over)
    assert cell["chance_low"] <= cell["chance"] <= cell["chance_high"] < cell["value"]
    assert list(row["metrics"]) == ["max_vio", "overflow_rate"]
    assert phase["answer"] == "train, 1 layer: 2 of 2 values are beyond chance."


def test_a_value_stands_beside_chance_with_its_mark(run: Path) -> None:
    page = invoked(run, "--phase", "eval", "--only", "jain,z_loss", "--layers", "2")
    (jain,) = (line.split() for line in page.splitlines() if line.split()[:1] == ["jain"])
    cells = said(run, "--phase", "eval", "--only", "jain", "--layers", "2")[0]["layers"][0]
    cell = cells["metrics"]["jain"]
    assert jain == ["jain", f"{cell['value']:.4f}", "▼", f"{cell['chance']:.4f}"]
    (zloss,) = (line.split() for line in page.splitlines() if line.split()[:1] == ["z_loss"])
    assert zloss[-1] == "7.6872"  # (ln 16)^2; no draws, no mark
    assert len(zloss) == 3


def test_many_layers_are_one_row_of_what_they_span(run: Path) -> None:
    page = invoked(run, "--phase", "eval", "--only", "max_share,dead_experts,z_loss")
    rows = {line.split()[0]: line.split()[1:] for line in page.splitlines() if line.split()}
    layers = said(run, "--phase", "eval", "--only", "max_share")[0]["layers"]
    cells = [x["metrics"]["max_share"] for x in layers]
    values = sorted(cell["value"] for cell in cells)
    at = {cell["value"]: str(x["layer"]) for cell, x in zip(cells, layers, strict=True)}
    chance = sorted(cell["chance"] for cell in cells)[2]
    high = sum(cell["beyond"] == "high" for cell in cells)
    assert at[values[4]] == "2"  # the planted one
    assert rows["max_share"] == [
        f"{values[0]:.4f}", at[values[0]], f"{values[2]:.4f}", f"{values[4]:.4f}", "2",
        f"{chance:.4f}", str(high), "▲", "of", "5",
    ]  # fmt: skip
    assert rows["dead_experts"] == [
        "1",
        "1",
        "1",
        rows["dead_experts"][3],
        "5",
        "▲",
        "of",
        "5",
    ]  # all layers alike
    assert rows["z_loss"][-1] == "7.6872"  # nothing was drawn, so nothing is beyond it


def test_estimates_say_their_share(run: Path, tmp_path: Path) -> None:
    rows = said(run, "--phase", "eval", "--only", "overlap")[0]["layers"]
    assert {(row["looked_at"], row["tokens"]) for row in rows} == {(512, 512)}
    counts = said(run, "--phase", "eval", "--only", "max_vio")[0]["layers"]
    assert {row["looked_at"] for row in counts} == {None}
    generate(tmp_path / "long", Spec(layers=1, experts=8, top_k=2, steps=80, length=64))
    page = " ".join(invoked(tmp_path / "long", "--only", "overlap,repeated_any").split())
    (row,) = said(tmp_path / "long", "--only", "overlap")[0]["layers"]
    assert row["looked_at"] < row["tokens"]
    share = f"({100 * row['looked_at'] / row['tokens']:.1f} % of {row['tokens']:,})"
    assert f"2 metrics of single tokens: of {row['looked_at']:,} tokens {share}" in page


def test_help_gives_examples() -> None:
    text = invoked("--help")
    assert "Examples:" in text
    assert "moe-lens analyze traces/run1 --only balance --phase eval" in text


def test_groups_and_layers(run: Path) -> None:
    (phase,) = said(run, "--phase", "train", "--only", "losses", "--layers", "0,3-4")
    assert [row["layer"] for row in phase["layers"]] == [0, 3, 4]
    assert {m["group"] for m in phase["catalogue"]} == {"losses"}
    assert len(phase["catalogue"]) == sum(m.group == "losses" for m in metrics().values())


def test_only_what_is_asked_for_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_lens.queries.session import Trace

    asked = []
    query = Trace.query

    def noted(self: Trace, name: str, **parameters: object) -> Any:
        asked.append(name)
        return query(self, name, **parameters)

    monkeypatch.setattr(Trace, "query", noted)
    invoked(run, "--only", "z_loss", "--layers", "1", "--phase", "train")
    assert [name for name in asked if name != "run_totals"] == ["router_confidence"]
    asked.clear()
    invoked(run, "--only", "gini", "--layers", "1", "--phase", "train")
    assert sorted(set(asked) - {"run_totals"}) == ["expert_load", "layer_balance"]


def test_mistakes_are_one_line(run: Path, tmp_path: Path) -> None:
    assert refused(run, "--only", "max_voi").startswith(
        "There is no metric 'max_voi'. Did you mean max_vio? Groups: balance, confidence,"
    )
    assert refused(run, "--phase", "test") == "There is no phase 'test'. Phases: train, eval."
    assert refused(run, "--layers", "1,9") == "There is no layer 9. MoE layers: 0, 1, 2, 3, 4."
    assert refused(run, "--layers", "x") == "--layers takes numbers as 0-3,7; got 'x'."
    write_run(tmp_path / "a")
    assert "does not exist" in refused(tmp_path / "nowhere")


def test_a_dropless_run_of_counts_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "run", token_rows=False, phases=("eval",))
    page = " ".join(invoked(tmp_path / "run").split())
    assert "no per-token rows: record with tokens=1.0 (moe-lens record --tokens 1)" in page
    assert "overflowed_experts, capacity_slack: no capacity: the layer is dropless." in page
    assert page.startswith("eval, 2 layers: the hottest expert takes ")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (8.0, "8"), (0.12345, "0.1235"), (12.345, "12.35"), (12345.6, "12,346"),
     (2.5e-5, "2.5e-05"), (None, ""), (float("nan"), "")],
)  # fmt: skip
def test_numbers(value: float | None, text: str) -> None:
    assert digits(value) == text
