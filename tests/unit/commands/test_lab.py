"""`moe-lens lab granularity` as a user meets it: results, going on, mistakes in one line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.laboratories import made_up
from typer.testing import CliRunner, Result

from moe_lens.cli import app
from moe_lens.errors import MoeLensError
from moe_lens.queries.laboratory import laboratory
from moe_lens.queries.session import open_trace

TINY = ["--hidden", "8", "--teacher", "4e2a", "--students", "4e2a,2e1a", "--workers", "1"]
SIX = ["--steps", "6", *TINY]
LONG = ["--steps", "1000000", *TINY]


def lab(out: Path, words: Sequence[str]) -> Result:
    return CliRunner().invoke(app, ["lab", "granularity", "--out", str(out), *words])


def refused(out: Path, *words: str) -> str:
    """The one line that the command ends with, which is no traceback."""
    done = lab(out, words)
    assert done.exit_code != 0
    if done.exit_code == 2:  # wrong usage: typer says so
        return done.output
    assert isinstance(done.exception, MoeLensError), done.exception
    assert "\n" not in str(done.exception)
    return str(done.exception)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs no training is quick: fewer routers, fewer points."""
    from moe_lens.granularity import regions

    monkeypatch.setattr(regions, "ROUTERS", 1)
    monkeypatch.setattr(regions, "SIDE", 20)
    monkeypatch.setattr(regions, "DIMENSIONS", (2, 4))


def started(out: Path, words: Sequence[str]) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "moe_lens", "lab", "granularity", "--out", str(out), *words]
    return subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def until_it_trains(out: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (out / "results.parquet").exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # the results are there right before the training


def one_of_two(out: Path) -> pd.DataFrame:
    """A folder as an interruption leaves it: the second student is missing."""
    assert lab(out, SIX).exit_code == 0
    path = out / "results.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 1), path)
    whole: pd.DataFrame = table.to_pandas()
    return whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("lab") / "a"
    return out, lab(out, SIX)


def test_all_results_can_be_read(finished: tuple[Path, Result]) -> None:
    out, done = finished
    assert done.exit_code == 0, done.output
    found = laboratory(out)
    assert found.missing == 0
    assert found.students["student"].tolist() == ["4e2a", "2e1a"]
    assert (found.about["steps"], found.about["hidden"]) == (6, 8)
    for name, rows in (("regions", 63), ("pictures", 5 * 160**2), ("configurations", 8)):
        assert len(found.table(name)) == rows, name
    page = (out / "figures.html").read_text(encoding="utf-8")
    assert page.count('class="plotly-graph-div"') == 7
    assert page.count("plotly.js v") == 1
    row = next(x for x in done.output.splitlines() if x.split()[:2] == ["4e2a", "2e1a"])
    assert f"{found.students['nmse'][1]:.3f}" in row
    assert "zero" in done.output
    assert "affine" in done.output


def test_the_students_routing_is_a_trace(finished: tuple[Path, Result]) -> None:
    out, _ = finished
    students = laboratory(out).students
    with open_trace(out / "routing") as trace:
        paths = trace.sql("select path from moe_layers order by layer").df()["path"]
        assert paths.tolist() == ["teacher 4e2a", *students["name"]]
        sets = trace.query("expert_sets", most=100_000).df()
    assert sets["tokens"].tolist() == [32_768] * 3
    assert sets["distinct_sets"].tolist()[1:] == students["sets_used"].tolist()
    said = CliRunner().invoke(app, ["analyze", str(out / "routing")])
    assert said.exit_code == 0
    assert "distinct_sets" in said.output


def test_what_is_finished_is_neither_trained_nor_counted_again(
    finished: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_lens.granularity import regions

    out, first = tmp_path / "a", finished[1]
    shutil.copytree(finished[0], out)
    before = pq.read_table(out / "results.parquet")
    count, counted = regions.region_counts, list[int]()
    monkeypatch.setattr(regions, "region_counts", lambda *x: counted.append(0) or count(*x))
    done = lab(out, SIX)
    assert done.exit_code == 0
    assert "2 of 2 students are in" in done.output
    assert pq.read_table(out / "results.parquet").equals(before)
    shown, as_before = (x.output.partition("Students of equal")[2] for x in (done, first))
    assert shown.partition("figures:")[0] == as_before.partition("figures:")[0]
    assert counted == []
    shutil.rmtree(out / "routing")
    assert lab(out, SIX).exit_code == 0
    assert (out / "routing" / "meta").is_dir()
    (out / "figures.html").unlink()  # of an end that was interrupted
    assert lab(out, SIX).exit_code == 0
    assert (out / "figures.html").stat().st_size > 1_000_000
    (out / "regions.parquet").write_bytes(b"torn")
    assert lab(out, SIX).exit_code == 0
    assert len(pq.read_table(out / "regions.parquet")) == 63
    assert len(counted) == 3


@pytest.mark.usefixtures("short")
def test_an_interrupted_one_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    whole = one_of_two(tmp_path / "a")
    done = lab(tmp_path / "a", SIX)
    assert "1 of 2 students are in" in done.output
    now = pq.read_table(tmp_path / "a" / "results.parquet").to_pandas()
    pd.testing.assert_frame_equal(now.drop(columns="seconds"), whole.drop(columns="seconds"))
    assert now["seconds"][0] == whole["seconds"][0]  # not trained again


def test_an_interrupted_paper_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """148 students; the process ends while the fourth trains, and begins again with it."""
    from moe_lens.granularity import runs, side_by_side

    seen: list[str] = []

    def counted(run: runs.Run, *args: object) -> runs.Row:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(run.name)
        return runs.execute(run, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(side_by_side, "execute", counted)
    words = ["--preset", "paper", "--steps", "1", "--hidden", "16", "--workers", "1"]
    first = lab(tmp_path / "p", [*words, "--device", "cpu"])
    assert first.exit_code == 130
    assert "3 of 148 students are kept" in first.output
    kept = laboratory(tmp_path / "p")
    assert kept.students["name"].tolist() == seen == kept.about["students"][:3]
    seen.clear()
    again = lab(tmp_path / "p", [*words, "--device", "cpu"])
    assert "3 of 148 students are in" in again.output
    assert seen == kept.about["students"][3:6]


@pytest.mark.slow
def test_kill_9_leaves_what_can_be_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "a"
    process = started(out, LONG)
    until_it_trains(out, process)
    process.kill()
    process.communicate(timeout=30)
    assert laboratory(out).missing == 2
    assert "steps: 1000000 there, 6 asked for" in refused(out, *SIX)
    again = started(out, LONG)  # its own settings are taken up
    time.sleep(0.1)
    until_it_trains(out, again)
    assert again.poll() is None
    again.kill()
    again.communicate(timeout=30)


@pytest.mark.slow
def test_ctrl_c_says_what_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "a"
    process = started(out, [*LONG[:-1], "2"])
    until_it_trains(out, process)
    time.sleep(3)  # its processes load torch meanwhile
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "0 of 2 students are kept in" in said
    assert "goes on from there" in said
    assert "Traceback" not in said


@pytest.mark.usefixtures("short")
def test_other_settings_are_refused_and_force_begins_anew(tmp_path: Path) -> None:
    out = tmp_path / "a"
    one_of_two(out)
    assert "seed: 0 there, 1 asked for" in refused(out, *SIX, "--seed", "1")
    assert "preset: quick there, relu asked for" in refused(out, *SIX, "--preset", "relu")
    assert "its teacher or its students are others" in refused(out, *SIX, "--students", "4e2a")
    assert "--force" in refused(out, "--steps", "7", *TINY)
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    done = lab(out, [*SIX, "--seed", "1", "--force"])
    assert done.exit_code == 0, done.output
    assert set(laboratory(out).students["seed"]) == {1}
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_force_leaves_alone_what_is_no_laboratorys(tmp_path: Path) -> None:
    theirs = pa.table({"mine": [1, 2]})
    pq.write_table(theirs, tmp_path / "results.parquet")
    said = refused(tmp_path, *SIX, "--force")
    assert "is not a result of moe-lens lab granularity, and is not replaced" in said
    assert "is not a result of moe-lens lab granularity" in refused(tmp_path, *SIX)
    assert pq.read_table(tmp_path / "results.parquet").equals(theirs)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("damage", ["cut", "no parquet", "empty"])
def test_damaged_results_are_refused_until_forced(tmp_path: Path, damage: str) -> None:
    made_up(tmp_path, finished=2)
    path = tmp_path / "results.parquet"
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[: len(whole) // 2], "no parquet": b"abc" * 99, "empty": b""}[damage]
    )
    assert f"{path} is not a result of moe-lens lab granularity" in refused(tmp_path, *SIX)
    done = lab(tmp_path, [*SIX, "--force"])
    assert done.exit_code == 0, done.output
    assert laboratory(tmp_path).missing == 0


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    assert "holds no results of the laboratory" in refused(tmp_path, *SIX, "--force")
    assert "holds no results of the laboratory" in refused(tmp_path / "thesis.txt", *SIX)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.txt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--students", "4e8a"], "4e8a: a token cannot use 8 of 4 experts"),
        (["--teacher", "4e0a"], "4e0a: a token uses at least 1 expert, got 0"),
        (["--hidden", "4", "--students", "16e8a"], "leave a width below 1"),
        (["--hidden", "4"], "16e8a: 5 active neurons over 8 experts a token leave a width below 1"),
        (["--students", "sixteen"], "a layer is written as 16e8a"),
        (["--students", ""], "a layer is written as 16e8a (16 experts, 8 a token); got ''"),
        (["--preset", "paper", "--students", "4e2a"], "teachers and students of its own"),
        (["--device", "cuda"], "torch finds no CUDA device here"),
        (["--steps", "0"], "'--steps': Input should be greater than or equal to 1"),
        (["--seed", "-1"], "'--seed': Input should be greater than or equal to 0"),
        (["--workers", "0"], "'--workers': Input should be greater than or equal to 1"),
        (["--preset", "tiny"], "'tiny' is not one of"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    tmp_path: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said in refused(tmp_path / "a", *words)
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "words",
    [
        ["--preset", "constant", "--teacher", "4e2a"],
        ["--preset", "relu", "--teacher", "4e4a", "--students", "4e1a,2e2a"],
        ["--teacher", "1e1a", "--students", "1e1a"],
        ["--teacher", "4e2a", "--students", "16e2a"],
    ],
)
def test_odd_layers_are_fine(tmp_path: Path, words: list[str]) -> None:
    sizes = ["--hidden", "8", "--steps", "2", "--workers", "1"]
    if "--students" not in words:
        sizes += ["--students", "4e2a,2e1a,8e2a"]
    done = lab(tmp_path / "a", [*sizes, *words])
    assert done.exit_code == 0, done.output
    assert "nan" not in done.output


def test_the_help_names_presets_and_defaults() -> None:
    said = CliRunner().invoke(app, ["lab", "granularity", "--help"], env={"COLUMNS": "120"}).output
    for each in ("quick|relu|constant|paper", "results.parquet", "--force", "arXiv 2505.06839"):
        assert each in " ".join(said.split())
    assert "Usage: " in CliRunner().invoke(app, ["lab", "--help"]).output
