"""The report's page: its numbers against the rows written, its looks at several widths."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console
from support.replayed import timings, write
from support.traces import Written, layer_info, meta, segment, write_run

from moe_lens.queries.session import open_trace
from moe_lens.terminal.page import render
from moe_lens.terminal.ramp import coloured
from moe_lens.trace.meta import write_meta


def page(path: Path, width: int = 100, phase: str | None = None, **console: object) -> str:
    out = io.StringIO()
    with open_trace(path) as trace:
        render(trace, Console(file=out, width=width, highlight=False, **console), phase)
    return out.getvalue()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_run(tmp_path_factory.mktemp("t") / "run1", steps=6, tokens=300)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_fits_the_width_and_keeps_every_section(written: Written, width: int) -> None:
    text = page(written.path, width)
    assert max(map(len, text.splitlines())) <= width
    assert all(line == line.rstrip() for line in text.splitlines())
    for part in (
        "moe_lens · run1", "2 layers × 8 experts × top-2", "Choices by layer and expert",
        "Routers and balance by layer", "Capacity", "Hottest experts by tag", "Loss by tag",
        "Routing by tag", "Capture",
    ):  # fmt: skip
        assert part in text
    assert "…" not in text  # nothing was cut short
    assert "None" not in text
    assert "nan" not in text


def test_numbers_are_those_written(written: Written) -> None:
    text = page(written.path, 120)
    load = [r for r in written.rows["load"] if r["layer"] == 0]
    for expert in range(7):
        n = sum(r["routed"] for r in load if r["expert"] == expert)
        assert re.search(rf"layer 0 .*\D{n}\b", text), f"expert {expert}: {n}"
    train = [r for r in written.rows["load"] if r["phase"] == "train"]
    dropped = sum(r["dropped"] for r in train) / sum(r["routed"] for r in train)
    assert f"train {100 * dropped:.1f} %, eval 0" in text
    load = [r for r in written.rows["load"] if r["tag"] == "code"]
    dropped = sum(r["dropped"] for r in load) / sum(r["routed"] for r in load)
    routers = [r for r in written.rows["routers"] if r["tag"] == "code"]
    entropies = []
    for layer in (0, 1):
        mine = [r for r in routers if r["layer"] == layer]
        tokens = sum(r["tokens"] - r.get("nonfinite_tokens", 0) for r in mine)
        entropies.append(sum(r["entropy_sum"] for r in mine) / tokens / math.log(8))
    entropy, layer = r"([\d.]+)", r"[\d.]+ \(L\d\)"
    row = re.search(rf"^ *code +{entropy} +{layer} +{layer} +([\d.]+) %", text, re.M)
    assert float(row[1]) == pytest.approx(sum(entropies) / 2, abs=0.006)
    assert float(row[2]) == pytest.approx(100 * dropped, rel=0.01)
    slices = [r for r in written.rows["slices"] if (r["tag"], r["phase"]) == ("code", "eval")]
    nats = sum(r["loss_sum"] for r in slices) / sum(r["loss_tokens"] for r in slices)
    assert f"{nats:.3f}" in text
    assert f"{nats / 0.6931471805599453:.3f}" in text
    assert "eval: every one of 1,800 choices was computed" not in text  # of both layers:
    assert "eval: every one of 3,600 choices was computed" in text
    assert "routing seen in 12 of 12" in text


def test_one_phase_only(written: Written) -> None:
    text = page(written.path, phase="eval")
    assert "phase eval" in text
    assert "train" not in text


def test_colour_only_where_there_is_colour(written: Written) -> None:
    assert "\x1b[" not in page(written.path)
    assert "48;2;" in page(written.path, force_terminal=True, color_system="truecolor")
    # rich keeps the codes of a style it has drawn once, so one process draws in one colour system
    assert coloured(Console(force_terminal=True, color_system="256"))
    sixteen = page(written.path, force_terminal=True, color_system="standard")
    assert "48;" not in sixteen
    assert "× none" in sixteen  # the legend of characters


def test_many_experts_are_binned_and_it_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, layers=3, experts=256, tokens=100)
    text = page(tmp_path, 80)
    assert "A cell is the mean of 4 neighbouring experts: 256 do not fit 78 columns." in text
    assert "mean of" not in page(tmp_path, 300)


def test_a_trace_without_losses_tags_tokens_or_drops_says_so(tmp_path: Path) -> None:
    write_run(
        tmp_path, tags=("untagged",), phases=("decode",), losses=False, token_rows=False, steps=1,
        tokens=4,
    )  # fmt: skip
    text = page(tmp_path)
    assert "No loss was recorded" in text
    assert "nothing overflowed" in text
    assert "No tag chose an expert often enough" in text
    assert "too few tokens to tell a dead expert from chance" in " ".join(text.split())


def test_a_trace_of_meta_alone(tmp_path: Path) -> None:
    write_meta(tmp_path, meta())
    text = page(tmp_path)
    assert "No valid token was routed." in text
    assert "No choices were recorded." in text


def test_a_trace_without_layers(tmp_path: Path) -> None:
    write_meta(tmp_path, meta(layers=[]))
    assert "No MoE layer is known yet." in page(tmp_path)


def test_routers_without_a_distribution(tmp_path: Path) -> None:
    write_meta(tmp_path, meta(layers=[layer_info(0, top_k=None)]))
    segment(tmp_path, "load", [{"expert": 1, "routed": 5, "processed": 5}])
    segment(tmp_path, "routers", [{"tokens": 5}])
    segment(tmp_path, "layers", [{"tokens": 5}])
    segment(tmp_path, "steps", [{"tokens": 5}])
    text = page(tmp_path)
    assert "No router entropy was recorded" in text
    assert "no fixed k" in text


def test_what_went_wrong_stands_out(tmp_path: Path) -> None:
    write_run(
        tmp_path, world=2, warnings={"gate weights were NaN": 3}, never_entered=["model.x"],
        pruned={"routing": 1234},
    )  # fmt: skip
    segment(
        tmp_path, "steps",
        [{"step": 9, "lost_rows": 77, "breaches": 2, "fires_expected": 2, "fires_seen": 1}], seq=1,
    )  # fmt: skip
    text = page(tmp_path)
    for part in (
        "! 2 breaches of an invariant", "! routing seen in 9 of 10", "! 77 per-token rows lost",
        "! model.x was hooked and never ran", "! ranks missing: 1", "! gate weights were NaN (3×)",
        "1,234 rows of routing removed",
    ):  # fmt: skip
        assert part in text


def test_names_with_brackets_are_not_markup(tmp_path: Path) -> None:
    write_run(tmp_path / "run[bold]1", tags=("[red]a", "b"), model="[i]m")
    text = page(tmp_path / "run[bold]1", 120)
    for part in ("run[bold]1", "[red]a", "[i]m"):
        assert part in text


def test_replays_are_there_where_the_run_was_replayed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run").path
    assert "\nReplay\n" not in page(run)
    rows = [
        {**row, "phase": phase, "layer": n, "step": step, "time_ns": time, "again_ns": time,
         "noise_ns": noise * time, "balanced_ns": 100.0, "floor_ns": 50.0}
        for phase, noise in (("eval", 0.01), ("train", 0.9))
        for n, time in ((0, 90.0), (3, 120.0))
        for step, row in enumerate(timings(1, 2)[:2])
    ]  # fmt: skip
    name = "a-name-that-is-wider-than-the-page-" * 3
    write(run, name, rows)
    write(run, "b", rows[:2])
    for width in (60, 80, 200):
        text = page(run, width)
        assert max(map(len, text.splitlines())) <= width
        part = text[text.index("\nReplay\n") : text.index("\nCapture\n")]
        assert name in "".join(part.split())
        found = [line.split() for line in part.splitlines()]
        of_name, of_b = found.index(["b"]), found[found.index(["b"]) :]
        assert ["eval", "2", "2", "1.8–2.4×", "0.90–1.20×", "3", "(+20.0", "%)"] in found[:of_name]
        # Its noise is larger than any difference.
        assert ["train", "2", "2", "1.8–2.4×", "≈", "–"] in found[:of_name]
        assert ["eval", "1", "2", "1.8×", "0.90×", "–"] in of_b
    assert "\ntrain" not in page(run, phase="eval").split("\nReplay\n")[1]


def test_several_runs_have_a_page_each(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, steps=2)
    out = io.StringIO()
    with open_trace([tmp_path / "a", tmp_path / "b"]) as trace:
        render(trace, Console(file=out, width=100))
    assert "moe_lens · a" in out.getvalue()
    assert "moe_lens · b" in out.getvalue()
