"""The race on a GPU, tried without one: all but CUDA's own paths, and gates on made-up times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_a_dry_run_on_the_cpu(tmp_path):
    """Every job runs in its process; what needs a GPU is listed; nothing is written."""
    before = sorted(BENCHMARKS.glob("results/*"))
    command = [sys.executable, str(BENCHMARKS / "gpu" / "race.py"), "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [*command, "--shapes", "olmoe", "--seconds", "150"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OUT": str(tmp_path), "MOE_LENS_RUNTIME": "reference"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for case in ("prefill, uniform", "decode, uniform", "prefill, zipf 1", "decode, zipf 1"):
        row = next(x for x in done.stdout.splitlines() if x.startswith(f"olmoe {case}"))
        assert row.count("±") >= 3, row  # ours, grouped_mm and eager at least
    for name in ("ours triton", "ours grouped_mm", "bare grouped_mm x2"):
        assert f"- {name}: " in done.stdout
    assert "olmoe prefill, cpu" in done.stdout  # its stages
    assert "no time left" not in done.stdout
    assert "checks that failed         0" in done.stdout
    assert sorted(BENCHMARKS.glob("results/*")) == before
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def result(monkeypatch):
    """The module `benchmarks/gpu/result.py`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    before = set(sys.modules)
    import result as module

    yield module
    for name in {"result", "_common"} - before:
        sys.modules.pop(name, None)


OLMOE = {"name": "olmoe", "experts": 64, "hidden": 2048, "intermediate": 1024, "top_k": 8}
COUNTS = {
    "prefill": {"tokens": 4096, "rows": 32768, "touched": 64},
    "decode": {"tokens": 64, "rows": 512, "touched": 64},
}


def race(phase, routing="uniform", what="", **us):
    """What a worker says of a case; eager is timed with launches."""
    times = {}
    for name, value in us.items():
        name = {"ours": "ours auto", "grouped": "tf grouped_mm"}.get(name, f"tf {name}")
        times[name] = dict.fromkeys(("median_us", "q25_us", "q75_us"), value)
        times[name] |= {"graph": name != "tf eager", "over_ours": value / us["ours"]}
    return {
        "kind": "race",
        "case": f"olmoe {phase}, {routing}{what}",
        "shape": OLMOE,
        "phase": phase,
        "routing": routing,
        "noise": 0.01,
        "backend": "cuda+triton: few slots",
        "times": times,
        **COUNTS[phase],
    }


def made_up(result, *events):
    """As if an H200 with round ceilings had said this."""
    made = result.Result({"shapes": ["olmoe"]}, gated=True)
    made.take({"kind": "build", "device_name": "NVIDIA H200", "versions": {"torch": "2"}})
    rates = {
        "copy_bytes_per_s": 4e12,
        "read_bytes_per_s": 4e12,
        "matmul_flop_per_s": {"bfloat16": 8e14},
    }
    made.take({"kind": "ceilings", **rates, "driver": "1", "clocks_mhz": {}})
    for event in events:
        made.take(event)
    return made


def stages(plan, permute, combine):
    values = {"plan": plan, "permute": permute, "combine": combine}
    return {
        "kind": "stages",
        "case": "olmoe prefill, uniform, stages",
        "shape": OLMOE,
        "phase": "prefill",
        "routing": "uniform",
        "backends": {"cuda+grouped_mm": {n: {"in_graph": v} for n, v in values.items()}},
        **COUNTS["prefill"],
    }


def test_everything_reached(result, tmp_path, capsys):
    made = made_up(
        result,
        *(race("prefill", r, ours=800, grouped=1000, eager=9000) for r in result.ROUTINGS),
        *(race("decode", r, ours=210, grouped=210.5, eager=900) for r in result.ROUTINGS),
        stages(8, 40, 41),
    )
    assert made.show() == 0
    assert "FAILED" not in capsys.readouterr().out
    (path,) = made.write([tmp_path])
    assert path.name.startswith("nvidia-h200-20")
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert len(kept["gates"]) == 1 + 4 + 4 + 3
    assert all(gate["passed"] for gate in kept["gates"])
    assert kept["not_reached"] == []
    # 6 * 32768 * 2048 * 1024 operations, at 800 a nanosecond
    assert kept["numbers"]["race"][0]["floors_us"]["fused"] == pytest.approx(515.4, abs=0.1)


def test_too_slow(result, capsys):
    made = made_up(
        result,
        race("prefill", ours=1100, grouped=1000),
        race("decode", ours=260, grouped=250),
        stages(13, 60, 60),
    )
    assert made.show() == 1
    gates, missing = made.gates()
    assert [gate["passed"] for gate in gates.gates] == [True] + 7 * [False]
    assert len(missing) == 4  # the other routing
    assert all("zipf 1" in what for what in missing)


def test_the_best_of_torch_compile_is_a_rival_in_decode_alone(result):
    phases = ("prefill", "decode")
    of = [race(p, what=", compiled", ours=210, grouped=250, compiled=205) for p in phases]
    gates, _ = made_up(result, *of).gates()
    (gate,) = gates.gates[1:]
    assert gate["name"] == "olmoe decode, uniform, compiled: time over tf compiled's"
    assert not gate["passed"]


def test_what_was_not_reached_is_no_success(result, capsys):
    late = {"kind": "not_reached", "what": "qwen3", "why": "no time left"}
    made = made_up(result, late, {"kind": "note", "what": "interrupted"})
    assert made.show() == 1
    out = capsys.readouterr().out
    assert out.count("not reached: olmoe") == 11
    assert "- interrupted\n- not reached: qwen3 (no time left)\n" in out


def test_a_wrong_answer_fails(result, capsys):
    wrong = {"case": "olmoe prefill, uniform", "name": "ours triton", "ok": False, "said": "far"}
    made = made_up(result, {"kind": "checked", **wrong}, race("prefill", ours=800, grouped=1000))
    assert made.show() == 1
    out = capsys.readouterr().out
    assert " wrong " in out
    assert "CHECK ours triton: far" in out
