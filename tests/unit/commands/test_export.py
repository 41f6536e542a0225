"""`moe-lens export` as a user meets it: what was written, what was left out, mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.side_by_side import Made
from support.traces import write_run
from typer.testing import CliRunner

from moe_lens.cli import app
from moe_lens.errors import MoeLensError
from moe_lens.trace.synthetic import Spec, generate


def export(*words: object) -> str:
    done = CliRunner().invoke(app, ["export", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_counts(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    out = tmp_path / "counts.npy"
    text = export(
        tmp_path / "run", "--format", "eplb", "--out", out, "--phase", "eval", "--steps", "0-1"
    )
    total = int(np.load(out).sum())
    assert text == f"{out}: {total:,} choices counted\n"
    assert total == 2 * 32 * 2  # layers, tokens of step 1, top-2


def test_routing_names_what_is_left_out(tmp_path: Path) -> None:
    made = Made(tmp_path / "run").draw((3,) * 8)
    for number in range(7):
        made.rows["tokens"].remove(made.token(number, 1))
    made.write()
    text = export(made.run, "--format", "npy", "--out", tmp_path / "out")
    assert text == (
        f"{tmp_path / 'out'}: 1 sequence, 6 tokens\n"
        "left out: 7 have holes between their positions: r/0, r/1, r/2, r/3, r/4, …\n"
    )
    with pytest.raises(MoeLensError, match=r"has no whole sequence of tag 'x'; its phases are"):
        export(made.run, "--format", "npy", "--tag", "x", "--out", tmp_path / "more")


def test_what_was_exported_as_arrays_names_the_folder_to_import(tmp_path: Path) -> None:
    """The folder holds an index beside the arrays, which are what can be read again."""
    generate(tmp_path / "run", Spec(steps=1, sequences=1, length=6, layers=2, experts=8))
    out, back = tmp_path / "arrays of run", tmp_path / "back"
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--format", "npy", "--out",
                                    str(out)])  # fmt: skip
    assert done.stdout == f"{out}: 1 sequence, 6 tokens\n"
    for more in ([], ["--format", "vllm"]):
        words = ["import", str(out), "--out", str(back), "--experts", "8", *more]
        refused = CliRunner().invoke(app, words).exception
        assert f"its routing is in {out / 'arrays'}. Import that folder" in str(refused)
        assert not back.exists()
    words[1] = str(out / "arrays")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.exception
    assert done.stdout.startswith(
        f"{back}: 6 tokens in 1 forward, 12 routing decisions (tokens times layers), read as vllm"
    )


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    for words, said in (
        (["--steps", "9-1"], "--steps takes one step or a range"),
        (["--layers", "x"], "--layers takes numbers"),
        (["--tag", "poem"], "no choices of tag 'poem'; its phases are eval, train"),
    ):
        with pytest.raises(MoeLensError, match=said) as e:
            export(tmp_path / "run", "--format", "eplb", "--out", tmp_path / "c.npy", *words)
        assert "\n" not in str(e.value)
