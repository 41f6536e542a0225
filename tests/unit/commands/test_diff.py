"""`moe-lens diff` as a user meets it: its page, its widths, its mistakes."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from support.traces import write_run

import moe_lens
from moe_lens.terminal.difference import render


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces")
    write_run(path / "a", seed=0)
    write_run(path / "b", seed=1)
    write_run(path / "same", seed=0, weights="exact")
    write_run(path / "short", tokens=5)
    return path


def moe_lens_diff(*words: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "moe_lens", "diff", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("width", [72, 100, 140])
def test_the_page_says_what_the_api_says(runs: Path, width: int) -> None:
    found = moe_lens.diff(runs / "a", runs / "b", flips=3)
    out = io.StringIO()
    render(found, Console(file=out, width=width, highlight=False))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert f"{int(found.layers.flips.sum())} of {int(found.layers.tokens.sum())} token-" in text
    for row in found.layers.itertuples():
        lines = [x for x in text.splitlines() if x.split()[:1] == [str(row.layer)]]
        assert lines[0].split()[1] == "128"
        assert f"{100 * row.flip_rate:.1f} %" in lines[0]
        assert f"{row.overlap:.4f}" in lines[0]
        assert lines[width < 80].split()[-1] == str(row.first_flips)  # what has no room is below
    first = found.flips.iloc[0]
    assert f"sequence {first.sequence}, position {first.position}, layer {first.layer}" in text
    assert "may be of" in text  # these weights are rounded
    assert "nan" not in text


def test_the_command(runs: Path) -> None:
    done = moe_lens_diff(runs / "a", runs / "b", "--flips", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sequence 0  ") == 2
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    by = moe_lens_diff(runs / "a", runs / "b", "--by", "position").stdout
    assert "aligned by sequence and position" in by
    same = moe_lens_diff(runs / "a", runs / "same").stdout
    assert "0 of 256 token-layers have other experts (0)" in same
    assert "The first decisions that differ" not in same


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["a", "short"], 1, "are not of the same tokens: 108 tokens are in a alone"),
        (["a", "a"], 1, "compared with itself"),
        (["a", "nowhere"], 1, "does not exist"),
        (["a", "b", "--by", "step"], 2, "'step' is not one of"),
        (["a"], 2, "Missing argument"),
    ],
)
def test_a_mistake_is_one_error_and_a_code(
    runs: Path, words: list[str], code: int, says: str
) -> None:
    known = {p.name for p in runs.iterdir()} | {"nowhere"}
    done = moe_lens_diff(*[runs / w if w in known else w for w in words])
    assert done.returncode == code
    assert says in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
