"""`moe-lens check` as a user meets it: the answer, what fired, its exit code, its mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lens.metrics.alarms import ALARMS
from moe_lens.trace.synthetic import Dead, Spec, generate


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces")
    spec = Spec(layers=2, experts=16, top_k=2, steps=20, sequences=4, rows=False)
    generate(path / "quiet", spec)
    generate(path / "dead", Spec(**{**vars(spec), "planted": (Dead(3), Dead(9, layers=(1,)))}))
    return path


def moe_lens_check(*words: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "moe_lens", "check", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120)


def test_a_quiet_run(runs: Path) -> None:
    done = moe_lens_check(runs / "quiet")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "train: quiet; 6 of 7 alarms could be judged."
    assert max(map(len, lines)) <= 100
    for alarm in ALARMS:
        assert any(line.split()[:1] == [alarm] for line in lines), alarm
    assert "drops: no capacity: the layer is dropless." in done.stdout
    assert "\x1b" not in done.stdout


def test_an_alarm_sets_the_exit_code(runs: Path) -> None:
    done = moe_lens_check(runs / "dead")
    assert (done.returncode, done.stderr) == (1, "")
    whole = " ".join(done.stdout.split())
    assert whole.startswith("train: dead fired.")
    assert "layer 1: none of 5,120 tokens" in whole
    assert "chose expert 9" in whole
    assert "dead fired (3)" in whole
    assert moe_lens_check(runs / "dead", "--only", "hot,drift").returncode == 0
    assert moe_lens_check(runs / "dead", "--layers", "0", "--only", "dead").returncode == 1


def test_json_says_what_the_page_says(runs: Path) -> None:
    done = moe_lens_check(runs / "dead", "--json")
    assert done.returncode == 1
    (phase,) = json.loads(done.stdout)
    assert (phase["phase"], phase["blocks"], phase["fired"]) == ("train", 20, 3)
    assert [a["alarm"] for a in phase["alarms"]] == list(ALARMS)
    dead = phase["alarms"][0]
    assert [(f["layer"], f["expert"]) for f in dead["fired"]] == [(0, 3), (1, 3), (1, 9)]
    assert dead["judged"] == [0, 1]
    assert phase["alarms"][-1]["not_judged"] == [
        {"why": "no capacity: the layer is dropless", "layers": [0, 1]}
    ]


def test_against(runs: Path) -> None:
    done = moe_lens_check(runs / "quiet", "--against", runs / "dead", "--only", "drift")
    assert done.returncode == 1  # the experts that are dead there are not here
    assert "against the other run tokens go elsewhere" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "deaf"), "There is no alarm 'deaf'; there are dead, hot"),
        (("--phase", "test"), "There is no phase 'test'; there are train."),
        (("--layers", "7"), "There is no layer 7; there are 0, 1."),
        (("--layers", "x"), "--layers takes numbers as 0-3,7; got 'x'."),
    ],
)
def test_mistakes(runs: Path, words: tuple[str, ...], message: str) -> None:
    done = moe_lens_check(runs / "quiet", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_trace_that_cannot_be_read(tmp_path: Path) -> None:
    done = moe_lens_check(tmp_path / "nothing")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
