"""The command line as a user meets it: a process, its output, its exit code."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from support.replayed import timings
from support.replayed import write as write_replay
from support.traces import segment, stream, write_run

COMMANDS = ("demo", "record", "info", "report", "query", "recover", "dashboard", "diff",
            "replay", "machine", "cache", "place", "analyze", "check", "export", "import",
            "context", "counterfactual", "precision")  # fmt: skip


def moe_lens(*words: object, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe_lens", *map(str, words)],
        capture_output=True, text=True, timeout=120, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "run1"
    write_run(path, steps=4, tokens=200)
    return path


def cpu_seconds_of(work: Callable[[], subprocess.CompletedProcess[str]]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def typer_alone() -> subprocess.CompletedProcess[str]:
    """What typer loads for any subcommand, and Python: pydantic is the most of it."""
    words = [sys.executable, "-c", "import typer._adapters, typer.main"]
    return subprocess.run(words, capture_output=True, text=True)


@pytest.mark.parametrize("command", [(), *((c,) for c in COMMANDS)])
def test_help_is_quick_and_gives_an_example(command: tuple[str, ...]) -> None:
    # In process CPU time, beside the least that could be: others may have the caches, or the core.
    tries = []
    while len(tries) < 6 and min(tries, default=9.0) >= 2.5:
        least = cpu_seconds_of(typer_alone)
        tries.append(cpu_seconds_of(lambda: moe_lens(*command, "--help")) / least)
    assert min(tries) < 2.5
    done = moe_lens(*command, "--help")
    assert "Example" in done.stdout or not command
    assert "moe-lens " + (command[0] if command else "demo") in done.stdout
    if not command:
        assert all(name in done.stdout for name in COMMANDS)


def test_version() -> None:
    from importlib.metadata import version

    assert moe_lens("--version").stdout == f"moe-lens {version('moe-lens')}\n"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["info", "nowhere"], 1, "nowhere does not exist"),
        (["report", "nowhere"], 1, "nowhere does not exist"),
        (["query", "nowhere", "expert_load"], 1, "nowhere does not exist"),
        (["recover", "nowhere"], 1, "nowhere does not exist"),
        (["query", "RUN", "selct 1"], 1, 'syntax error at or near "selct"'),
        (["query", "RUN", "expert_lod"], 1, "Did you mean expert_load?"),
        (["query", "RUN", "expert_load", "--param", "x=1"], 1, "no parameter 'x'"),
        (["query", "RUN", "expert_load", "--param", "phase"], 2, "NAME=VALUE, got 'phase'"),
        (["query", "RUN"], 2, "--list shows"),
        (["query", "RUN", "expert_load", "--out", "no/such/folder/x.csv"], 1, "No such file"),
        (["report", "RUN", "--phase", "evil"], 2, "Phases of this trace: eval, train"),
        (["info", "--no-such-option"], 2, "No such option"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_a_mistake_is_one_error_and_a_code(
    run: Path, words: list[str], code: int, says: str
) -> None:
    done = moe_lens(*[run if w == "RUN" else w for w in words])
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_info(run: Path) -> None:
    out = moe_lens("info", run).stdout
    assert "2 layers × 8 experts × top-2" in out
    assert "800 (and 12 of padding)" in out


def test_query_lists_the_stored_questions() -> None:
    out = moe_lens("query", "--list").stdout
    assert "layer_balance\n    Balance of each layer" in out
    assert "--param phase=… (text) only this phase" in out


def test_query_writes_every_format(run: Path, tmp_path: Path) -> None:
    sql = (
        "select layer, cast(sum(routed) as bigint) as n, 1/0 as inf from load group by 1 order by 1"
    )
    table = moe_lens("query", run, sql).stdout.splitlines()
    assert table[0].split() == ["layer", "n", "inf"]
    assert len(table) == 3
    frame = pd.read_csv(io.StringIO(moe_lens("query", run, sql, "--format", "csv").stdout))
    rows = json.loads(moe_lens("query", run, sql, "--format", "json").stdout)
    assert frame["n"].tolist() == [r["n"] for r in rows] == [1600, 1600]
    assert rows[0]["inf"] is None  # JSON has no infinity
    for suffix in ("csv", "json", "parquet"):
        assert moe_lens("query", run, sql, "--out", tmp_path / f"x.{suffix}").returncode == 0
    assert pq.read_table(tmp_path / "x.parquet")["n"].to_pylist() == [1600, 1600]
    assert json.loads((tmp_path / "x.json").read_text()) == rows
    piped = subprocess.run(
        [sys.executable, "-m", "moe_lens", "query", run, sql, "--format", "parquet"],
        capture_output=True, check=True,
    )  # fmt: skip
    assert pq.read_table(io.BytesIO(piped.stdout))["n"].to_pylist() == [1600, 1600]


def test_a_question_about_replays_says_where_there_are_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r").path
    done = moe_lens("query", run, "replay_layers")
    assert done.returncode == 0
    assert done.stdout.startswith("run")
    said = f"{run} holds no result of a replay: moe-lens replay {run} makes one.\n"
    assert done.stderr == said
    assert moe_lens("query", run, "expert_load").stderr == ""
    write_replay(run, "mine", timings(1))
    done = moe_lens("query", run, "replay_layers", "--param", "phase=decode")
    assert done.stderr == ""  # there is one, of which the parameters leave nothing


def test_no_hottest_expert_names_the_parameter(tmp_path: Path) -> None:
    synthetic = write_run(tmp_path / "few", tokens=4, steps=1).path
    done = moe_lens("query", str(synthetic), "hottest_experts")
    assert len(done.stdout.splitlines()) == 1  # the names of the columns
    assert done.stderr == (
        "No tag chose an expert 100 times: lower it with --param min_routed=1.\n"
    )
    some = moe_lens("query", str(synthetic), "hottest_experts", "--param", "min_routed=1")
    assert len(some.stdout.splitlines()) > 1
    assert not some.stderr


def test_the_help_names_every_command() -> None:
    done = moe_lens("--help")
    examples = done.stdout.split("Options:")[0]
    for name in ("import", "export", "counterfactual", "precision", "context", "lab"):
        assert f"moe-lens {name} " in examples
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_query_takes_parameters(run: Path) -> None:
    words = ("--param", "phase=eval", "--param", "by_tag=false", "--format", "json")
    rows = json.loads(moe_lens("query", run, "dropped_tokens", *words).stdout)
    assert {r["tag"] for r in rows} == {"all"}
    sql = "select $a + 1 as a, $b as b"
    done = moe_lens("query", run, sql, "--param", "a=2", "--param", "b=x", "--format", "json")
    assert json.loads(done.stdout) == [{"a": 3, "b": "x"}]


def test_a_long_table_says_what_it_leaves_out(run: Path) -> None:
    out = moe_lens("query", run, "from tokens", "--rows", 5).stdout
    assert len(out.splitlines()) == 7
    assert out.endswith("… and 795 more rows\n")


def test_report_in_a_pipe_is_plain(run: Path) -> None:
    done = moe_lens("report", run, env={**os.environ, "TERM": "xterm-256color"})
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_recover_seals_and_says_so(tmp_path: Path) -> None:
    write_run(tmp_path)
    stream(tmp_path, "steps", [{"step": 50}, {"step": 51}], seq=1)
    assert moe_lens("recover", tmp_path).stdout == "rank 0: steps: 2 rows sealed\n"
    assert "nothing was left open" in moe_lens("recover", tmp_path).stdout


def test_a_damaged_trace(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = segment(tmp_path, "load", [{}], seq=1)
    path.write_bytes(path.read_bytes()[:50])
    done = moe_lens("report", tmp_path)
    assert done.returncode == 1
    assert "--skip-damaged" in done.stderr
    done = moe_lens("report", tmp_path, "--skip-damaged")
    assert done.returncode == 0
    assert "left out" in done.stdout


def test_a_reader_that_hangs_up_is_no_traceback(run: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "moe_lens", "query", run, "from range(300000)", "--rows", "300000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(60) in (0, 1)  # 0 where the pipe had swallowed it all


def test_ctrl_c_ends_a_long_query(run: Path) -> None:
    forever = "select sum(a.range * b.range % 7) from range(10000000) a, range(100000) b"
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_lens", "query", run, forever],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell's background job would have it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode in (130, -signal.SIGINT)  # a shell shows both as 130
    assert "Traceback" not in err
