"""`moe-lens place` as a user meets it: its tables, its JSON, its files, its mistakes."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moe_lens.cli import main
from moe_lens.replay.placement.plan import read_plan
from moe_lens.trace import synthetic


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place") / "run"
    synthetic.generate(
        folder, synthetic.stationary(steps=40, layers=2, experts=16, top_k=2, rows=True)
    )
    return folder


@dataclass
class Done:
    stdout: str
    stderr: str


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line in this process: a process of its own takes seconds to start."""

    def called(run: Path, *options: str, code: int = 0) -> Done:
        monkeypatch.setattr(sys, "argv", ["moe-lens", "place", str(run), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert (ended.value.code or 0) == code, said.err
        return Done(said.out, said.err)

    return called


def test_tables_a_verdict_and_the_plan(place: Any, run: Path) -> None:
    printed = place(run, "--ranks", "4", "--replicas", "4", "--verdict", "--by-layer").stdout
    for name in ("contiguous (now)", "lpt", "eplb", "affinity"):
        assert printed.count(f"\n  {name} ") == 3, printed
    assert "fitted to 20 forwards" in printed
    assert "even: 25.0 %" in printed
    assert "eplb: helps." in printed
    assert re.search(r"fetches\s+\d+ experts a\s+window: [\d.]+ MB, \d+ µs\.", printed)
    assert max(map(len, printed.splitlines()[:-8])) <= 80
    path = run / "placement" / "eplb-4-ranks-4-replicas.json"
    assert f"fitted to all forwards: {path}" in printed
    plan = read_plan(path)
    assert (plan.ranks, plan.slots, plan.layers) == (4, 20, (0, 1))


def test_json_and_a_plan_that_is_judged_later(place: Any, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    place(run, "--ranks", "4", "--method", "lpt", "--out", str(out))
    said = json.loads(
        place(
            run, "--ranks", "4", "--method", str(out), "--now", str(out), "--json",
            "--out", str(tmp_path / "again.json"), "--bandwidth", "10",
        ).stdout
    )  # fmt: skip
    assert said["fitted_to"] == said["judged_by"] == 20
    assert (said["now"]["method"], said["now"]["moved_bytes"]) == ("mine.json", 0)
    lpt = next(p for p in said["placements"] if p["method"] == "lpt")
    assert lpt["bytes_per_rank"] == 4 * 2 * 3 * 256 * 128 * 2
    assert lpt["moving_s"] == lpt["moved_bytes"] / 10e9
    assert said["placements"][-1]["method"] == "mine.json"
    assert (tmp_path / "again.json").read_text() == out.read_text().replace('"lpt"', '"mine.json"')


@pytest.mark.parametrize("name", ["sglang", "vllm", "vllm-ascend"])
def test_the_files_of_engines(place: Any, run: Path, name: str) -> None:
    place(run, "--ranks", "2", "--format", name)
    json.loads((run / "placement" / f"eplb-2-ranks-{name}.json").read_text())


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ((), 2, "--ranks"),
        (("--ranks", "3"), 1, "--replicas 2"),
        (("--ranks", "32"), 1, "--replicas 16"),
        (("--ranks", "4", "--nodes", "3"), 1, "nodes"),
        (("--ranks", "4", "--method", "best"), 1, "contiguous, lpt, eplb, affinity"),
        (("--ranks", "4", "--method", "absent.json"), 1, "cannot be read"),
        (("--ranks", "4", "--layers", "5"), 1, "no layer 5"),
        (("--ranks", "4", "--phase", "decode"), 1, "no forwards of phase 'decode'"),
        (("--ranks", "4", "--steps", "x"), 2, "100-199"),
        (("--ranks", "4", "--out", "."), 2, "is a folder"),
        (("--ranks", "4", "--layers", "0", "--format", "sglang"), 2, "the whole model"),
    ],
)
def test_mistakes(place: Any, run: Path, options: tuple[str, ...], code: int, says: str) -> None:
    assert says in place(run, *options, code=code).stderr


def test_a_plan_for_other_ranks_or_another_model(place: Any, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    place(run, "--ranks", "4", "--out", str(out))
    for options, says in ((("--ranks", "2"), "for 4 ranks"), (("--ranks", "4"), "another model")):
        other = tmp_path / "other"
        if not other.exists():
            synthetic.generate(other, synthetic.Spec(layers=3, experts=8))
        said = place(other, *options, "--method", str(out), code=1).stderr
        assert says in said


def test_three_forwards_are_not_enough_evidence(place: Any, tmp_path: Path) -> None:
    synthetic.generate(tmp_path / "run", synthetic.Spec(steps=3, rows=False))
    printed = place(tmp_path / "run", "--ranks", "4", "--verdict").stdout
    assert "train has too few forwards to keep some apart" in printed.replace("\n  ", " ")
    assert "eplb: not enough evidence. 3 forwards are too few" in printed


def test_a_plan_is_called_after_its_part_of_the_run_and_never_replaces_the_one_that_lies(
    place: Any, run: Path
) -> None:
    place(run, "--ranks", "8", "--phase", "train", "--layers", "0")
    path = run / "placement" / "eplb-8-ranks-train-layers-0.json"
    before = path.read_text()
    words = ("--ranks", "8", "--phase", "train", "--layers", "0", "--now", str(path))
    assert "where experts lie now" in place(run, *words, code=2).stderr
    assert path.read_text() == before
    printed = place(run, *words, "--out", str(path.with_name("next.json"))).stdout
    assert max(len(line) for line in printed.splitlines() if "(now)" in line) <= 80
    assert "may have been fitted to the forwards that judge it" in " ".join(printed.split())


def test_files_for_engines_are_not_read_back(place: Any, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "experts.json"
    place(run, "--ranks", "2", "--format", "sglang", "--out", str(out))
    said = place(run, "--ranks", "2", "--method", str(out), code=1).stderr
    assert "files for engines are not read" in said
    assert "KeyError" not in said
