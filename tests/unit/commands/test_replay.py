"""`moe-lens replay` as a user meets it: its tables, its JSON, its mistakes, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from support.traces import layer_info, write_run

from moe_lens.numbers import percent
from moe_lens.replay import machine
from moe_lens.runtime.ceilings import Ceilings, device_name, versions
from moe_lens.terminal.replayed import print_replay

CPU = torch.device("cpu")
SIZES = ("--hidden", "16", "--intermediate", "16", "--repeats", "2", "--forwards", "1")

BLOCK = """
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

INTERRUPT = """
import sys
from moe_lens.replay import session
from moe_lens.cli import main

measured, calls = session.measured, []

def interrupted(*args, **kwargs):
    calls.append(1)
    if len(calls) == 3:
        raise KeyboardInterrupt
    return measured(*args, **kwargs)

session.measured = interrupted
sys.argv[0] = "moe-lens"
main()
"""


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine that was measured before."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch, machine.one_thread(CPU):
        patch.setenv("MOE_LENS_CACHE", str(cache))
        rates = {"bfloat16": 200e9, "float16": 50e9, "float32": 100e9}
        name, found = device_name(CPU), versions()
        then = time.time_ns() - 3 * 86_400 * 10**9
        machine.store(Ceilings(1e10, 8e9, rates, "cpu", name, 2, 1, "", found, {}, then), CPU)
    return os.environ | {"MOE_LENS_CACHE": str(cache)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", tokens=16).path


def moe_lens(
    env: dict[str, str], *words: object, code: str | None = None
) -> subprocess.CompletedProcess[str]:
    how = ["-m", "moe_lens"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *how, *map(str, words)],
        capture_output=True, text=True, timeout=120, env=env,
    )  # fmt: skip


def test_tables_and_the_answer(run: Path, env: dict[str, str]) -> None:
    done = moe_lens(env, "replay", run, *SIZES)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    text = done.stdout
    (result,) = (run / "replay").glob("*.parquet")
    assert f"\n  result    {result}\n" in text  # to be copied: on one line, however long
    assert max(len(line) for line in text.splitlines() if str(result) not in line) <= 80
    assert "nan" not in text
    assert "…" not in text
    for phase in ("train", "eval"):
        assert f"\n{phase}: 1 forward a layer\n" in text
        assert re.search(rf"\n{phase}: [\d.]+× a balanced routing; too few", text)
    rows = pq.read_table(result).to_pylist()
    assert len(rows) == 4
    flat = " ".join(text.split())
    assert "stored 3 days ago" in flat
    assert "A p90 takes 10 forwards and a p99 100" in flat
    assert "2 of 4 forwards" in flat
    assert "8 experts, top-2, hidden 16, intermediate 16" in flat


def test_json(run: Path, env: dict[str, str]) -> None:
    words = ("--policy", "drop", "--capacity-factor", "1", "--name", "mine", "--json")
    done = moe_lens(env, "replay", run, *SIZES, *words)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["result"] == str(run / "replay" / "mine.parquet")
    assert len(said["answers"]) == 2
    assert {(r["phase"], r["layer"]) for r in said["layers"]} == {
        (p, n) for p in ("train", "eval") for n in (0, 1)
    }
    assert said["about"]["policy"]["capacity_factor"] == 1
    rows = pq.read_table(run / "replay" / "mine.parquet").to_pylist()
    for layer in said["layers"]:
        (row,) = (r for r in rows if (r["phase"], r["layer"]) == (layer["phase"], layer["layer"]))
        assert layer["dropped"] == row["dropped"]
        assert layer["p50_ns"] == layer["max_ns"] == row["time_ns"]
        assert layer["p90_ns"] is layer["p99_ns"] is None  # one forward has no percentiles
        assert layer["over_balanced"] == pytest.approx(row["time_ns"] / row["balanced_ns"])


def test_where_the_dashboard_cannot_be_imported(run: Path, env: dict[str, str]) -> None:
    done = moe_lens(env, "replay", run, *SIZES, "--no-curve", code=BLOCK)
    assert done.returncode == 0, done.stderr
    assert "a balanced routing; too few to call it more or less" in " ".join(done.stdout.split())


def test_ctrl_c(run: Path, env: dict[str, str]) -> None:
    done = moe_lens(env, "replay", run, *SIZES, "--name", "n", code=INTERRUPT)
    assert done.returncode == 130
    left = run / "replay" / "n-interrupted.parquet"
    assert pq.read_table(left).num_rows == 2
    assert done.stderr == f"interrupted: what was measured so far is in {left}\n"
    assert f"{left} (interrupted: partial)\n" in done.stdout
    assert "it was interrupted before the other 1 chosen" in " ".join(done.stdout.split())
    assert "a balanced routing; too few to call it more or less" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--policy", "reroute"), 1, "no runners-up were recorded"),
        (("--preset", "gpt-5"), 1, "There is no preset 'gpt-5'."),
        (("--capacity-factor", "1"), 2, "--capacity-factor belongs to --policy drop"),
        (("--priority", "prob"), 2, "--priority belongs to --policy drop"),
        (("--policy", "drop", "--capacity-factor", "0"), 2, "must be above 0, got 0"),
        (("--policy", "drop", "--capacity-factor", "nan"), 2, "must be above 0, got nan"),
        (("--forwards", "some"), 2, "--forwards takes a number from 1 up, or all; got 'some'"),
        (("--forwards", "0"), 2, "--forwards takes a number from 1 up"),
        (("--layers", "3-1"), 2, "--layers takes numbers as 0-3,7; got '3-1'"),
        (("--layers", "9"), 1, "no layer 9: its layers are 0-1"),
        (("--steps", "x"), 2, "--steps takes one step or a range"),
        (("--phase", "decode"), 1, "has no phase 'decode': its phases are eval, train."),
        (("--hidden", "999999", "--intermediate", "999999"), 1, "Nothing was allocated"),
        (("--device", "cuda:9"), 1, "There is no device cuda:9"),
        (("--backend", "warp"), 1, "no backend 'warp'"),
        (("--top-k", "5"), 1, "--top-k 5: the trace has 2 choices a token"),
        (("--preset", "olmoe"), 1, "Did you mean olmoe-1b-7b?"),
        (("--backend", "triton"), 1, "did you mean cuda+triton?"),
        (("--name", "a", "--out", "b.parquet"), 1, "--name a and --out b.parquet both say"),
        (("--name", "a/b"), 1, "--name is the name of a file"),
        (("--out", "/proc/nowhere/x.parquet"), 1, "cannot be written"),
    ],
)  # fmt: skip
def test_mistakes_take_one_line(
    run: Path, env: dict[str, str], words: tuple[str, ...], code: int, says: str
) -> None:
    done = moe_lens(env, "replay", run, *SIZES, *words)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr
    assert done.stdout == ""
    assert not list(run.glob("replay/*.parquet"))


def test_a_trace_that_cannot_be_replayed(tmp_path: Path, env: dict[str, str]) -> None:
    counts = write_run(tmp_path / "counts", token_rows=False).path
    done = moe_lens(env, "replay", counts, *SIZES)
    assert done.returncode == 1
    assert "holds no per-token rows" in done.stderr
    assert "tokens=1.0" in done.stderr
    done = moe_lens(env, "replay", tmp_path / "nothing")
    assert done.returncode == 1
    assert "does not exist" in done.stderr
    sizes = write_run(tmp_path / "sizes").path
    done = moe_lens(env, "replay", sizes)
    assert done.returncode == 1
    assert (
        "The trace does not say how large an expert of layer 0 (model.layers.0.mlp) is, since its "
        "recorder did not know. Give --hidden and --intermediate, or --preset."
    ) in " ".join(done.stderr.split())


def about(**changes: Any) -> dict[str, Any]:
    forwards = {
        "in_trace": 9000, "with_rows": 5000, "partial": 100, "partial_used": False,
        "chosen": 48, "replayed": 12,
    }  # fmt: skip
    base = {
        "state": "complete",
        "forwards": forwards,
        "layers": {"chosen": 5, "replayed": 3, "missing": {"eval": [3, 4]}},
        "padding_rows": 321,
        "policy": {"name": "drop", "capacity_factor": 1.25, "by": "prob", "top_k": 1},
        "renormalised": True,
        "preset": {"name": "mixtral-8x7b", "experts": 8, "top_k": 2,
                   "hidden": 4096, "intermediate": 14336},
        "weights": "1/k, none were recorded",
        "shapes": [
            {"layer": n, "experts": 64, "top_k": 8, "hidden": 4096, "intermediate": 14336,
             "dtype": "bfloat16", "rank": 0, "itemsize": 2}
            for n in range(3)
        ],
        "device_name": "A device",
        "backends": {"cuda+triton": "it is quick", "cuda+loop": "it is there"},
        "clock": "a clock",
        "repeats": 5,
        "ceilings": {"matmul_flop_per_s": {"bfloat16": 788e12}, "copy_bytes_per_s": 4.1e12,
                     "read_bytes_per_s": 4.3e12},
        "beaten": [],
        "ceilings_from": "measured now, and stored",
        "tile": 128,
        "curves": [{"sum_ns": 5.0, "layer_ns": 4.0}],
        "attributed": [
            {"layer": n, "phase": "decode",
             "experts": [{"expert": 63, "rows": 5, "share": 0.5, "alike": 0,
                          "attributed_ns": 1.0}]}
            for n in range(3)
        ],
    }  # fmt: skip
    return base | changes


def layer(number: int, **changes: Any) -> dict[str, Any]:
    base = {
        "phase": "decode", "layer": number, "forwards": 12, "tokens": 768, "time_ns": 2e6,
        "p50_ns": 4_567_890.0, "p90_ns": 5e6, "p99_ns": 12_345_678.0, "max_ns": 2e7, "noise": 0.02,
        "floor_ns": 3e6, "over_floor": 1.52, "balanced_ns": 4e6, "over_balanced": 1.14,
        "same_touched_ns": 4.5e6, "over_same_touched": 1.015, "touched": 62.5, "rows_min": 1,
        "rows_median": 7.5, "rows_max": 12_000, "padded_share": 14.0, "slots": 6144,
        "dropped": 1536, "rerouted": 3, "flop_per_s": 512e12, "bytes_per_s": 2.5e12,
        "stages_ns": {"plan": 9e3, "permute": 1e5, "gate_up": 2e6, "act": 1e5, "down": 1e6,
                      "combine": 1e5},
    }  # fmt: skip
    return base | changes


@pytest.mark.parametrize("width", [80, 120])
def test_the_page_fits_and_says_what_was_measured(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    layers = [layer(0), layer(1, over_balanced=1.01, stages_ns=None), layer(2)]
    print_replay(console, about(), layers, ["decode: an answer."], "/a/b/c.parquet")
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    flat = " ".join(text.split())
    for said in (
        "12 of 9,000 forwards, 5,000 of which have per-token rows; 100 lack some tokens' rows and "
        "are left out; time was up before the other 36 chosen; time was up before a forward of "
        "eval ran in layer 3, 4; 321 rows of padding left out",
        "drop, capacity factor 1.25, by prob; top-1 of the largest weights, weights sum to 1 again",
        "64 experts, top-8, hidden 4,096, intermediate 14,336, bfloat16 (sizes of mixtral-8x7b, "
        "which has 8 experts, top-2: this is the trace's routing at that size)",
        "experts: random; gate: 1/k, none were recorded",
        "788 TFLOP/s bfloat16, 4.30 TB/s, measured now, and stored",
        "decode: 12 forwards a layer",
        "63: 50.0 %",
        "this is 1.25 of the layer's time",
        "decode: an answer.",
    ):
        assert said in flat, said
    first, second, *_ = (x.split() for x in text.splitlines() if x.split()[:1] in (["0"], ["1"]))
    assert first[1:6] == ["4.57", "5.00", "12.3", "3.00", "1.5×"]
    assert first[6:8] == ["4.00", "1.14×"]
    assert first[8:10] == ["4.50", "≈"]
    assert second[7] == "≈"
    ran = [x for x in text.splitlines() if "62.5/64" in x]
    assert len(ran) == 3
    assert "1/7.5/12,000" in ran[0]
    assert "15.0×" in ran[0]
    assert percent(0.25) in ran[0]
    assert ran[0].split()[-2:] == ["512", "2.50"]


def printed(about: dict[str, Any], layers: list[dict[str, Any]], path: str = "/r.parquet") -> str:
    out = io.StringIO()
    print_replay(Console(file=out, width=80, highlight=False), about, layers, [], path)
    return out.getvalue()


def test_of_too_few_forwards_the_slowest_is_shown() -> None:
    few = layer(0, p90_ns=None, p99_ns=None)
    text = printed(about(), [few])
    assert "p90   max  floor" in text
    row = next(line.split() for line in text.splitlines() if line.split()[:1] == ["0"])
    assert row[1:5] == ["4.57", "–", "20.0", "3.00"]
    assert "A p90 takes 10 forwards and a p99 100" in text
    both = printed(about(), [few, layer(1)])
    assert next(x.split() for x in both.splitlines() if x.split()[:1] == ["0"])[2:4] == ["–", "–"]
    assert "p99  floor" in both
    assert "A p90 takes" not in printed(about(), [layer(0)])


def test_a_long_path_stays_in_one_piece() -> None:
    path = "/" + "/".join(["a-folder-with-a-name"] * 8) + "/result.parquet"
    assert f"\n  result    {path}\n" in printed(about(), [layer(0)], path)
    partial = printed(about(state="interrupted"), [layer(0)], path)
    assert f"\n  result    {path} (interrupted: partial)\n" in partial


def test_experts_with_the_same_share_stand_together() -> None:
    def hot(*experts: tuple[int, float, int]) -> str:
        rows = [{"expert": e, "rows": 1, "share": s, "alike": n} for e, s, n in experts]
        said = about(attributed=[{"layer": 0, "phase": "decode", "experts": rows}])
        text = printed(said, [layer(0)])
        return next(x for x in text.splitlines() if x.split()[:1] == ["0"] and ":" in x).strip()

    assert hot((4, 0.5, 0), (1, 0.3, 0)) == "0      4: 50.0 %; 1: 30.0 %"
    assert hot(*((e, 0.125, 7) for e in range(5))) == "0      0, 1, 2 and 5 more: 12.5 % each"
    assert hot((3, 0.4, 0), (0, 0.3, 1), (2, 0.3, 1)) == "0      3: 40.0 %; 0, 2: 30.0 % each"
    assert hot((3, 0.4, 1), (9, 0.4, 1), (0, 0.1, 1), (2, 0.1, 1)) == (
        "0      3, 9: 40.0 % each; 0 and 1 more: 10.0 % each"
    )


def test_a_ceiling_that_was_beaten_is_said() -> None:
    beaten = [
        {"what": "matmul", "forwards": 3, "by": 1.5},
        {"what": "memory", "forwards": 1, "by": 1.1},
    ]
    flat = " ".join(printed(about(beaten=beaten), [layer(0)]).split())
    assert (
        "The bfloat16 rate that the floors are computed from was beaten in 3 forwards of a layer, "
        "by up to 1.50×: it was measured too low. Measure again with moe-lens machine."
    ) in flat
    assert "The bandwidth that the floors are computed from was beaten in 1 forward of" in flat
    assert "measured too low (or caches held the weights)" in flat
    assert "beaten" not in printed(about(), [layer(0)])


def test_layers_that_know_their_sizes(tmp_path: Path, env: dict[str, str]) -> None:
    from support.traces import meta

    from moe_lens.trace.meta import write_meta

    run = write_run(tmp_path / "run", tokens=8).path
    infos = [layer_info(n, hidden_size=24, intermediate_size=40) for n in range(2)]
    write_meta(run, meta(layers=infos))
    words = ("--repeats", "2", "--forwards", "1", "--no-curve", "--stages", "--phase", "eval")
    done = moe_lens(env, "replay", run, *words)
    assert done.returncode == 0, done.stderr
    assert "hidden 24, intermediate 40" in " ".join(done.stdout.split())
    assert "gate_up" in done.stdout
