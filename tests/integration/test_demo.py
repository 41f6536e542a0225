"""The demo, end to end: what its report says is what an independent count saw."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections import Counter

import pytest
from rich.console import Console
from support.demo_counted import record_demo

import moe_lens
from moe_lens.terminal.page import render


def test_the_command_trains_evaluates_and_reports(demo_output):
    run, text = demo_output
    for part in (
        "Held-out bits per byte",
        "order 2",
        "Choices by layer and expert",
        "Routing by tag",
    ):
        assert part in text
    for domain in ("python", "prose", "javascript", "cpp"):
        assert re.search(rf"{domain} ", text)
    drops = moe_lens.open(run).sql(
        "select phase, sum(dropped) as dropped, sum(overflowed) as overflowed from load "
        "group by phase order by phase"
    )
    by_phase = {r["phase"]: (r["dropped"], r["overflowed"]) for r in drops.rows()}
    assert by_phase["eval"] == (0, 0)
    assert by_phase["train"][0] == by_phase["train"][1] > 0
    health = moe_lens.open(run).query("capture_health").rows()
    assert sum(r["breaches"] for r in health) == 0
    asked = moe_lens.open(run).query("expert_importance").df()
    assert len(asked) == 4 * 16
    assert asked["knock_out"].notna().all()
    assert f"moe-lens counterfactual {run}" in text


def test_experts_of_the_trained_model_specialise_by_domain(tmp_path):
    """Beyond what permuted documents show; after 60 of the demo's 480 steps it is plain to see."""
    argv = [
        sys.executable,
        "-m",
        "moe_lens",
        "demo",
        "--steps",
        "60",
        "--no-what-if",
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    found = re.search(r"carry ([\d.]+) nats of the tag, ([\d.]+) by chance \(above all", text)
    assert found is not None
    assert float(found[1]) > 5 * float(found[2])


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """A short demo, and a plain Python count of what its experts were given."""
    found = record_demo(tmp_path_factory.mktemp("counted") / "run")
    return found.path, found.routed, found.dropped


def test_counts_and_drops_equal_an_independent_count(counted):
    run, routed, dropped = counted
    rows = moe_lens.open(run).sql(
        "select phase, layer, expert, sum(routed) as n from load where routed > 0 group by all"
    )
    assert {(r["phase"], r["layer"], r["expert"]): r["n"] for r in rows.rows()} == dict(routed)
    lost = moe_lens.open(run).sql("select phase, layer, sum(dropped) as n from load group by all")
    assert {(r["phase"], r["layer"]): r["n"] for r in lost.rows()} == dict(dropped)


def test_the_report_prints_those_numbers(counted):
    run, routed, dropped = counted
    out = io.StringIO()
    with moe_lens.open(run) as trace:
        render(trace, Console(file=out, width=120, highlight=False))
    text = out.getvalue()
    train_choices = sum(n for (phase, _, _), n in routed.items() if phase == "train")
    share = sum(n for (phase, _), n in dropped.items() if phase == "train") / train_choices
    shown = f"{100 * share:.1f}" if share >= 0.1 else f"{100 * share:.2f}"
    assert f"dropped choices: train {shown} %, eval 0" in text
    eval_choices = sum(n for (phase, _, _), n in routed.items() if phase == "eval")
    assert f"every one of {eval_choices:,} choices was computed" in text
    for layer in range(4):
        load = Counter()
        for (_, at, expert), n in routed.items():
            load[expert] += n if at == layer else 0
        ratio = max(load.values()) / (sum(load.values()) / 16)
        balance = re.search(rf"^ +{layer} +[\d,]+ .*$", text, re.MULTILINE)
        assert balance is not None
        assert f" {ratio:.2f} " in balance[0]
