"""`moe-lens replay --ep` as a user meets it: its page, its JSON, its mistakes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.traces import write_run

from moe_lens.cli import main
from moe_lens.commands.replay_ep import Options
from moe_lens.errors import CommandError
from moe_lens.replay.ep.all_to_all import PRESETS
from moe_lens.replay.ep.launch import _without_nproc
from moe_lens.replay.ep.session import replay_ep
from moe_lens.replay.ep.settings import Parallel
from moe_lens.replay.settings import Settings
from moe_lens.terminal.replayed_ep import print_replay_ep

SIZES = ("--hidden", "16", "--intermediate", "16", "--repeats", "2", "--forwards", "1")

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"duckdb", "streamlit", "plotly", "pandas", "transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Blocked())
sys.argv[0] = "moe-lens"
from moe_lens.cli import main
main()
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", tokens=16, steps=2).path


def moe_lens(tmp_path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *map(str, words)],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {"MOE_LENS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip


def test_the_answer_comes_first(run: Path, tmp_path: Path) -> None:
    group = ("--ep", 4, "--placement", "eplb", "--replicas", 4, "--nodes", 2, "--no-dedup")
    done = moe_lens(tmp_path, "replay", run, *SIZES, *group, "--dispatch-dtype", "fp8")
    assert (done.returncode, done.stderr) == (0, "")
    first, *_ = done.stdout.splitlines()
    assert first.startswith("train: 4 ranks, eplb with 4 replicas: the slowest rank takes")
    flat = " ".join(done.stdout.split())
    for said in (
        "4 of 3 experts each, on 2 nodes, 4 of them replicas; simulated on one device",
        "eplb+4 was fitted to this run, so it is at its best here",
        "modelled, h800 (literature): 153 GB/s a rank, 43 GB/s a rank between nodes; a token once "
        "for each choice. It is of GPUs, and experts ran on a CPU: do not add up the two",
        "train: eplb+4",
        "eval: contiguous",
    ):
        assert said in flat
    assert max(len(line) for line in done.stdout.splitlines() if str(run) not in line) <= 80
    assert "nan" not in done.stdout


def test_json(run: Path, tmp_path: Path) -> None:
    words = ("--ep", 2, "--name", "mine", "--phase", "eval", "--all-to-all", "b200", "--json")
    done = moe_lens(tmp_path, "replay", run, *SIZES, *words)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["result"] == str(run / "replay_ep" / "mine.parquet")
    assert Path(said["result"]).exists()
    assert [(r["placement"], r["layer"]) for r in said["layers"]] == [
        ("contiguous", 0), ("contiguous", 1),
    ]  # fmt: skip
    assert said["about"]["all_to_all"]["name"] == "b200"
    assert said["about"]["baseline"] is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"placement": "lpt"}, "--placement belongs to --ep"),
        ({"replicas": 0}, "--replicas belongs to --ep"),
        ({"nodes": 2}, "--nodes belongs to --ep"),
        ({"dispatch_dtype": "fp8"}, "--dispatch-dtype belongs to --ep"),
        ({"dedup": False}, "--no-dedup belongs to --ep"),
        ({"all_to_all": "b200"}, "--all-to-all belongs to --ep"),
        ({"nproc": 2}, "--nproc belongs to --ep"),
        ({"timeout": 5.0}, "--timeout belongs to --ep"),
        ({"ep": 4, "nproc": 2}, "--nproc 2 starts as many processes, and --ep 4 takes one"),
        ({"ep": 4, "placement": "p.json", "nodes": 1}, "--nodes is in the plan p.json"),
        ({"ep": 4, "placement": "p.json", "replicas": 1}, "--replicas is in the plan p.json"),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, Any], says: str) -> None:
    none: dict[str, Any] = dict.fromkeys(Options.__dataclass_fields__)
    Options(**{**none, "dedup": True}).check(stages=True)
    Options(**{**none, "dedup": False, "ep": 2, "nproc": 2}).check(stages=False)
    with pytest.raises(CommandError, match=says):
        Options(**{**none, "dedup": True, **given}).check(stages=False)
    with pytest.raises(CommandError, match="--stages is of one device"):
        Options(**{**none, "dedup": True, "ep": 2}).check(stages=True)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("replay", "RUN", "--ep", "3"), 1, "do not lie on 3 ranks in equal numbers"),
        (("replay", "RUN", "--placement", "lpt"), 2, "--placement belongs to --ep"),
        (("machine", "--all-to-all"), 2, "give --nproc, or start this with torchrun"),
        (("machine", "--nproc", "2"), 2, "--nproc belongs to --all-to-all"),
    ],
)
def test_mistakes_take_one_line(
    run: Path, tmp_path: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    sizes = SIZES if words[0] == "replay" else ()
    done = moe_lens(tmp_path, *(str(run) if w == "RUN" else w for w in words), *sizes)
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert says in line


def test_what_the_launcher_would_misread_is_not_passed_on() -> None:
    words = ["replay", "r", "--nproc", "2", "--ep", "2", "--nproc=3", "--json"]
    assert _without_nproc(words) == ["replay", "r", "--ep", "2", "--json"]


@pytest.mark.parametrize("width", [80, 120])
def test_a_real_exchange_says_what_its_times_are(run: Path, width: int) -> None:
    settings = Settings(hidden=16, intermediate=16, repeats=2, forwards=1, phase="eval")
    found = replay_ep(run, Parallel(2, all_to_all="h800-low-latency"), settings)
    text = page(found.about, found.by_layer(), width)
    assert "modelled, h800-low-latency (literature): 192 GB/s a rank, latency 38 µs" in text
    assert PRESETS["h800-low-latency"].source in text
    real = {
        "mode": "real", "all_to_all": None, "state": "interrupted",
        "world": {"backend": "gloo", "device": "cpu", "machines": 1},
        "forwards": {"in_trace": 9, "left_out": 2, "chosen": 5, "replayed": 3},
        "padding_rows": 7,
    }  # fmt: skip
    text = page(found.about | real, found.by_layer(), width)
    for said in (
        "measured, gloo between 2 processes over loopback: this says nothing of NCCL, NVLink or a "
        "network",
        "Rows and bytes are the result; times are those of this machine's processes.",
        "3 of 9 forwards; 2 lack rows of some tokens or of a rank; it was interrupted before the "
        "other 2 chosen; 7 rows of padding left out",
        "(interrupted: partial)",
    ):
        assert said in text


def page(about: dict[str, Any], layers: list[dict[str, Any]], width: int) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    print_replay_ep(console, about, layers, ["eval: an answer."], "/a/b.parquet")
    assert max(map(len, out.getvalue().splitlines())) <= width
    assert "…" not in out.getvalue()
    return " ".join(out.getvalue().split())


def test_ctrl_c_among_processes_says_where_its_rows_are(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(processes: int, arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_lens.replay.ep.launch.launch", interrupted)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["moe-lens", "replay", str(run), "--ep", "2", "--nproc", "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert str(run / "replay_ep") in capsys.readouterr().err
