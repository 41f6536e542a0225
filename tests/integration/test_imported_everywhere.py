"""Every reader of a trace, on traces that were imported: what is not there is said, never made up.

Three of them: counts alone; passes whose tokens belong to no known sequence; sequences without
forwards of their own. None has weights, logits or times.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.apptest import texts, tile, turned
from support.routed import E, K, L, MadeUp, choices, layers
from support.traces import write_run
from typer.testing import CliRunner

import moe_lens
from moe_lens.cli import app as cli
from moe_lens.errors import MoeLensError
from moe_lens.importers import importing
from moe_lens.importers.source import Choices, Counted, Given, Item, Pass, Sequence, Source
from moe_lens.queries.along import fields
from moe_lens.queries.catalog import questions
from moe_lens.replay import machine
from moe_lens.report.contents import draw
from moe_lens.runtime.ceilings import Ceilings, device_name, versions

pytestmark = pytest.mark.slow

WHY = {
    "weights": "the made-up engine keeps no gate weights",
    "entropy": "the made-up engine keeps no logits",
    "times": "the made-up engine has no clock",
}
NAMES = ("counts", "passes", "sequences")
SIZES = ("--hidden", "16", "--intermediate", "8", "--forwards", "1", "--repeats", "2")
COMMANDS: dict[str, tuple[str, ...]] = {
    "info": ("info",),
    "report": ("report",),
    "html": ("report", "--html", "page.html"),
    "analyze": ("analyze",),
    "check": ("check",),
    "cache": ("cache",),
    "context": ("context", "--prefix", "2", "--after", "2"),
    "place": ("place", "--ranks", "4"),
    "replay": ("replay", *SIZES),
    "replay ep": ("replay", *SIZES, "--ep", "4"),
}
ADVICE = ("moe_lens.record(", "record(...", "tokens=1.0", "--tokens 1", "rec.loss", "rec.step")


class Telling(MadeUp):
    """Says why it lacks what it lacks."""

    def open_source(self, path: Path, given: Given) -> Source:
        found = super().open_source(path, given)
        found.lacks = dict(WHY)
        return found


def pass_of(number: int, phase: str) -> Pass:
    ids = choices(40, number)
    return Pass(f"pass {number}", number, 0, phase, {x: Choices(ids[:, x]) for x in range(L)})


def count_of(number: int) -> Counted:
    ids = choices(40, number)
    counts: dict[int, Any] = {x: np.bincount(ids[:, x].ravel(), minlength=E) for x in range(L)}
    return Counted(f"pass {number}", number, 0, "unknown", counts)


def sequence(number: int) -> Sequence:
    ids = np.random.default_rng(number).integers(0, 5, 24)
    tag = ("code", "chat")[number % 2]
    return Sequence(
        f"request {number}", choices(24, number), prompt_tokens=16, token_id_T=ids,
        request=f"r{number}", tag=tag,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("imported")
    file = folder / "file.bin"
    file.write_text("made up")
    items: dict[str, list[Item]] = {
        "counts": [count_of(i) for i in range(20)],
        "passes": [pass_of(i, ("prefill", "decode")[i % 2]) for i in range(20)],
        "sequences": [sequence(i) for i in range(12)],
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, of in items.items():
            form = Telling(of, infos=layers(L, E, K))
            patch.setattr(importing, "format_named", lambda _, form=form: form)
            importing.import_trace(file, folder / name, format="madeup")
    return {name: folder / name for name in NAMES}


@pytest.fixture(scope="module", autouse=True)
def measured_before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A machine whose ceilings are known: replays begin at once."""
    cpu = torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch, machine.one_thread(cpu):
        patch.setenv("MOE_LENS_CACHE", str(tmp_path_factory.mktemp("cache")))
        rates = {"bfloat16": 200e9, "float16": 50e9, "float32": 100e9}
        name, found = device_name(cpu), versions()
        now = time.time_ns()
        machine.store(Ceilings(1e10, 8e9, rates, "cpu", name, 2, 1, "", found, {}, now), cpu)
        yield


@pytest.fixture(scope="module")
def said(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a command prints of a run, asked once."""
    out = tmp_path_factory.mktemp("said")
    found: dict[tuple[str, str], str] = {}

    def ask(command: str, name: str) -> str:
        if (command, name) not in found:
            first, *rest = COMMANDS[command]
            before = os.getcwd()
            os.chdir(out)
            try:
                result = CliRunner().invoke(cli, [first, str(runs[name]), *rest])
            finally:
                os.chdir(before)
            error = result.exception
            if error is not None and not isinstance(error, SystemExit):
                assert isinstance(error, MoeLensError), repr(error)
                assert "\n" not in str(error)
            text = result.output + (str(error) if isinstance(error, MoeLensError) else "")
            if command == "html":
                page = (out / "page.html").read_text(encoding="utf-8").split("<script")[0]
                text += re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)  # SQL
            found[command, name] = " ".join(text.split())
        return found[command, name]

    return ask


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_speaks_of_an_import(said: Any, command: str, name: str) -> None:
    text = said(command, name)
    assert text
    assert [words for words in ADVICE if words in text] == []
    assert "nan" not in text.lower().split()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", ["report", "html"])
def test_reports_claim_nothing_about_the_recorder(said: Any, command: str, name: str) -> None:
    text = said(command, name)
    assert "routing seen in" not in text
    assert "per-token rows lost" not in text
    assert "dropped choices" not in text
    assert "imported whole from madeup: file.bin" in text
    assert "not known: imported from madeup, which does not hold that" in text
    if command == "report":
        assert "every one of" not in text
        assert "What was dropped is not known" in text
        assert f"No router entropy was recorded: imported from madeup ({WHY['entropy']})" in text
        assert "No loss was recorded: imported from madeup" in text
        assert "unserved" not in text


@pytest.mark.parametrize("name", NAMES)
def test_blank_figures_of_a_page_say_why(runs: dict[str, Path], name: str) -> None:
    with moe_lens.open(runs[name]) as trace:
        drawn = draw(trace, trace.info().runs[0], None)
    figures = {each.shown.name: each.figure for of in drawn.values() for each in of}
    notes = {
        name: " ".join(x.text.replace("<br>", " ") for x in figure.layout.annotations)
        for name, figure in figures.items()
    }
    assert [(n, t) for n, t in notes.items() for words in ADVICE if words in t] == []
    why = f"The trace has no times: imported from madeup ({WHY['times']})."
    assert notes["forwards_over_time"] == why
    assert notes["near_ties"] == f"No margins: imported from madeup ({WHY['entropy']})."
    assert "drops_by_layer" not in figures
    assert not figures["quality_by_tag"].data


@pytest.mark.parametrize("name", NAMES)
def test_info_leaves_out_what_nobody_watched(said: Any, name: str) -> None:
    text = said("info", name)
    for label in ("lost rows", "breaches", "fires", "of padding"):
        assert label not in text
    assert WHY["weights"] in text
    assert "no weights" in text


def test_steps_that_were_made_up_are_called_that(said: Any) -> None:
    for command in ("report", "html", "info"):
        assert "synthetic" in said(command, "sequences")
    for command in ("analyze", "check", "place", "replay", "replay ep"):
        assert "No engine ran these forwards" in said(command, "sequences"), command
        assert "No engine ran" not in said(command, "passes")


def test_json_says_that_steps_were_made_up(runs: dict[str, Path]) -> None:
    for command in ("analyze", "check"):
        for name in ("sequences", "passes"):
            result = CliRunner().invoke(cli, [command, str(runs[name]), "--json"])
            (said,) = {str(each["made_up_steps"]) for each in json.loads(result.output)}
            assert ("synthetic" in said) == (name == "sequences"), (command, name)


def test_analyze_says_why_in_the_words_of_the_format(said: Any) -> None:
    text = said("analyze", "sequences")
    assert f"no sums of router probabilities: imported from madeup ({WHY['entropy']})" in text
    assert "gate_entropy, dropped_gate_mass: no gate weights: imported from madeup" in text
    assert WHY["weights"] in text
    assert "repeated_first: no gate weights, which would tell a token's first choice" in text
    assert "no drops: imported from madeup, which does not hold that" in text
    assert "the layer is dropless" not in text
    assert "the formula has no value" not in text
    assert "no per-token rows: imported from madeup" in said("analyze", "counts")
    assert "not whose tokens they are: imported from madeup" in said("analyze", "passes")


def test_check_says_why_it_cannot_judge(said: Any) -> None:
    for name in NAMES:
        assert f"z_loss: no z-loss: imported from madeup ({WHY['entropy']})" in said("check", name)
        assert "drops: no drops: imported from madeup" in said("check", name)


def test_cache_tells_counts_from_rows_without_sequences(said: Any) -> None:
    assert said("cache", "counts").endswith(
        "This trace has no per-token rows: imported from madeup, which does not hold that."
    )
    assert "choices of single tokens, but not whose tokens they are" in said("cache", "passes")
    assert "resident per layer: LRU hits" in said("cache", "sequences")


def test_replay_runs_what_there_is(said: Any) -> None:
    for command in ("replay", "replay ep"):
        assert "holds no per-token rows: imported from madeup" in said(command, "counts")
        for name in ("passes", "sequences"):
            text = said(command, name)
            assert "gate: 1/k, none were recorded" in text
            assert "what was dropped is not known" in text


def test_top_k_needs_weights(runs: dict[str, Path]) -> None:
    asked = ["replay", str(runs["passes"]), "--hidden", "16", "--intermediate", "8"]
    result = CliRunner().invoke(cli, [*asked, "--top-k", "1"])
    assert isinstance(result.exception, MoeLensError)
    assert "which of their choices are the largest is not known" in str(result.exception)


# -- diff ------------------------------------------------------------------------------------------


def test_diff_of_imported_sequences(runs: dict[str, Path], tmp_path: Path) -> None:
    """Every third token of one run goes elsewhere in layer 1: flips, and no weight is invented."""
    file = tmp_path / "file.bin"
    file.write_text("made up")
    changed = [sequence(i) for i in range(12)]
    moved = 0
    for each in changed:
        ids = each.ids_TLK.astype(int)
        ids[::3, 1] = (ids[::3, 1] + 1) % E
        each.ids_TLK = ids
        moved += len(ids[::3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            importing, "format_named", lambda _: Telling(list[Item](changed), infos=layers())
        )
        importing.import_trace(file, tmp_path / "other", format="madeup")
    for by in ("token", "position"):
        found = moe_lens.diff(runs["sequences"], tmp_path / "other", by=by)
        assert int(found.layers["flips"].sum()) == moved
        assert found.layers["weight_diff_mean"].isna().all()
        assert found.layers["top1_flip_rate"].isna().all()
        assert not found.rounded
    words = ["diff", str(runs["sequences"]), str(tmp_path / "other"), "--by", "position"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "No gate weights to compare" in text
    assert WHY["weights"] in text
    assert "bf16" not in text


def test_diff_needs_rows(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(MoeLensError, match="counts holds no per-token rows: imported from madeup"):
        moe_lens.diff(runs["counts"], runs["sequences"])
    with pytest.raises(MoeLensError, match="passes holds choices of single tokens, but not whose"):
        moe_lens.diff(runs["sequences"], runs["passes"])
    write_run(tmp_path / "recorded", steps=2)
    with pytest.raises(MoeLensError, match="only runs of one architecture"):
        moe_lens.diff(runs["sequences"], tmp_path / "recorded")


# -- questions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_question_answers(runs: dict[str, Path], name: str) -> None:
    with moe_lens.open(runs[name]) as trace:
        for each in questions():
            trace.query(each)
        assert "imported" in trace._repr_html_()


def test_transitions_need_weights(runs: dict[str, Path]) -> None:
    """Without them no choice is the first: there is no row, not one of nulls."""
    for name in ("passes", "sequences"):
        with moe_lens.open(runs[name]) as trace:
            assert trace.query("layer_transitions").rows() == []


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_phase_narrows_rows_whose_tokens_are_not_known(runs: dict[str, Path], phase: str) -> None:
    """Pairs of one phase against a plain loop over its passes."""
    pairs: Counter[tuple[int, int]] = Counter()
    for i in range(20):
        if ("prefill", "decode")[i % 2] == phase:
            for token in choices(40, i)[:, 0].tolist():
                pairs.update((a, b) for a in token for b in token if a != b)
    with moe_lens.open(runs["passes"]) as trace:
        rows = trace.query("co_activation", phase=phase, layer=0).rows()
        near = trace.query("expert_companions", phase=phase, layer=0, expert=3, top=E).rows()
        assert trace.query("co_activation", tag="nobody's", layer=0).rows() == []
    assert {(r["expert"], r["other"]): r["together"] for r in rows if r["together"]} == pairs
    assert {r["companion"]: r["together"] for r in near} == {
        b: n for (a, b), n in pairs.items() if a == 3
    }


def test_choices_stay_in_the_order_of_the_trace(runs: dict[str, Path]) -> None:
    with moe_lens.open(runs["sequences"]) as trace:
        rows = trace.query("sequence_choices", first_layer=0, last_layer=0).df()
        info = trace.info().runs[0].layers[0]
    found = fields(rows, info)
    assert found["ids_NK"].tolist() == [x.tolist() for x in rows["expert_ids"]]
    assert found["ranked"] is None
    assert "weights_NK" not in found
    assert "weight_TV" not in found


# -- the dashboard ---------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path]) -> Any:
    import streamlit as st
    from streamlit.testing.v1 import AppTest

    import moe_lens_dashboards
    from moe_lens_dashboards.components import runs as listed

    st.cache_data.clear()
    st.cache_resource.clear()

    def start(name: str, **link: str) -> Any:
        places = [str(runs[name]), *(str(runs[x]) for x in NAMES if x != name)]
        monkeypatch.setenv(listed.RUNS, json.dumps(places))
        folder = Path(moe_lens_dashboards.__file__).parent
        app = AppTest.from_file(str(folder / "app.py"), default_timeout=120)
        for key, value in {"run": name, **link}.items():
            app.query_params[key] = value
        return app.run()

    return start


def everything(app: Any) -> str:
    """What a page says, charts that are blank included."""
    parts = [texts(app), *(c.value for c in app.code if "select" not in c.value)]
    for chart in app.get("plotly_chart"):
        drawn = json.loads(chart.proto.spec)["layout"].get("annotations", [])
        parts += [str(each.get("text")) for each in drawn]
    return " ".join(" ".join(parts).replace("<br>", " ").split())


@pytest.mark.parametrize("name", NAMES)
def test_every_page_speaks_of_an_import(opened: Any, name: str) -> None:
    from moe_lens_dashboards.pages import VIEWS

    start = opened(name)
    for view in VIEWS:
        app = turned(start, view.path)
        assert not app.exception, (view.name, app.exception)
        text = everything(app)
        assert [words for words in ADVICE if words in text] == [], view.name
        assert "imported from madeup: file.bin" in text, view.name


def test_tiles_show_no_zero_that_nobody_saw(opened: Any) -> None:
    app = opened("sequences")
    assert tile(app, "Overflow rate") == tile(app, "Dropped-token rate") == "–"
    assert tile(app, "Router entropy") == "–"
    assert not {"Lost rows", "Breaches"} & {m.label for m in app.metric}
    app = turned(app, "router")
    assert tile(app, "Tokens not finite") == "–"
    app = turned(app, "experts")
    assert tile(app, "Dropped") == "–"


def test_live_and_capacity_say_what_is_missing(opened: Any) -> None:
    start = opened("passes")
    text = everything(turned(start, "live"))
    assert f"The trace has no times: imported from madeup ({WHY['times']})." in text
    text = everything(turned(start, "capacity"))
    assert "What was dropped is not known: imported from madeup" in text
    assert "every choice is computed" not in text


def test_compare_has_no_column_of_nothing(opened: Any) -> None:
    app = turned(opened("passes", against="sequences"), "compare")
    assert not app.exception
    first = next(d.value for d in app.dataframe if "balance_a" in d.value)
    assert first.notna().any().all()
    assert "entropy_a" not in first
    text = everything(app)
    for letter in "AB":
        assert f"{letter}: no sums of entropy" in text
        assert f"{letter}: no drops: imported from madeup" in text


def test_a_sequence_opens(opened: Any) -> None:
    app = turned(opened("sequences", sequence="0:0"), "requests")
    assert not app.exception
    assert tile(app, "Dropped choices") == tile(app, "Loss") == "–"
    assert tile(app, "Tokens") == "24"
