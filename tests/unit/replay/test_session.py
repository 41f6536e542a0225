"""A replay from end to end, and how it ends early."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from support.models import build
from support.traces import layer_info, meta, segment, write_run

import moe_lens
from moe_lens.errors import ReplayError
from moe_lens.replay import measure, results, session, settings
from moe_lens.replay.floors import Ceiling, Shape, fused
from moe_lens.replay.policies import Policy
from moe_lens.replay.presets import preset
from moe_lens.replay.session import Progress, replay
from moe_lens.replay.settings import Settings
from moe_lens.trace.meta import write_meta
from moe_lens.trace.schema import REPLAY

SMALL: dict[str, Any] = {"hidden": 16, "intermediate": 16, "dtype": "float32", "repeats": 2}
QUICK: dict[str, Any] = {**SMALL, "forwards": 1, "curve": False}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Mixtral, small: one batch with padding."""
    run = tmp_path_factory.mktemp("recorded") / "run"
    model = build("mixtral")
    ids = torch.randint(0, 96, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec, rec.step(phase="eval"):
        model(input_ids=ids, attention_mask=mask)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", tokens=16).path


def test_what_was_recorded_is_what_runs(recorded: Path) -> None:
    found = replay(recorded, Settings(repeats=2, stages=True))
    assert found.path.parent == recorded / "replay"
    table = pq.read_table(found.path)
    assert table.schema.equals(REPLAY.schema)
    assert table.num_rows == len(found.rows) == 3
    assert table["tokens"].to_pylist() == [27, 27, 27]
    assert found.about["padding_rows"] == 9
    load = pq.read_table(recorded / "load").to_pylist()
    for row in table.to_pylist():
        rows = [x["processed"] for x in load if x["layer"] == row["layer"] and x["processed"]]
        assert (row["touched"], row["slots"]) == (len(rows), sum(rows)) == (len(rows), 54)
        assert (row["rows_min"], row["rows_max"]) == (min(rows), max(rows))
        assert row["rows_median"] == np.median(rows)
        shape = Shape(8, 64, 48, *_dtype(found.about))
        work = fused(27, 54, len(rows), shape)
        assert (row["flop"], row["bytes"]) == (work.flop, work.bytes)
        rate = found.about["ceilings"]["matmul_flop_per_s"][shape.dtype]
        assert row["floor_ns"] == pytest.approx(work.floor_ns(Ceiling(10e9, rate)))
        for name in ("time", "again", "balanced", "same_touched", *REPLAY_STAGES):
            assert row[f"{name}_ns"] > 0
        assert row["noise_ns"] >= 0
    assert results.about(found.path) == found.about
    said = found.about
    assert said["state"] == "complete"
    assert said["weights"] == "recorded"
    assert said["policy"]["name"] == "recorded"
    assert said["backends"] == {"cpu": "the weights are on the CPU"} or "cpu" in said["backends"]
    assert {(s["experts"], s["top_k"]) for s in said["shapes"]} == {(8, 2)}
    assert len(said["attributed"]) == 3
    (answer,) = found.answers()
    assert re.match(r"eval: [\d.]+× a balanced routing; too few to call it more or less", answer)


REPLAY_STAGES = ("plan", "permute", "gate_up", "act", "down", "combine")


def _dtype(about: dict[str, Any]) -> tuple[str, int]:
    return about["shapes"][0]["dtype"], about["shapes"][0]["itemsize"]


def test_another_size_and_policy(run: Path) -> None:
    rules = Policy("drop", 1.0, "prob")
    found = replay(run, Settings(**{**QUICK, "policy": rules}))
    assert found.path.name.startswith("drop-1-prob-16x16-float32-")
    table = pq.read_table(found.path)
    assert pc.sum(table["dropped"]).as_py() > 0
    assert max(r["rows_max"] for r in found.rows) <= 4  # ceil(16 * 2 / 8)
    assert {r["slots"] for r in found.rows} == {32}
    # The trace has no sizes of its own, so a preset's are taken; experts stay the trace's.
    olmoe = settings.shape_of(layer_info(0), Settings(preset=preset("olmoe-1b-7b")), torch.bfloat16)
    assert olmoe == Shape(8, 2048, 1024, "bfloat16", 2)


def test_forwards_in_which_nothing_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3, tokens=4)
    rows = run.rows["routing"]
    for row in rows:
        if row["step"] == 0:
            row["dropped"] = [0, 1]
        elif row["step"] == 1:
            row["expert_ids"], row["weights"] = [], []
    segment(run.path, "routing", rows)
    found = replay(run.path, Settings(**{**SMALL, "forwards": None, "stages": True}))
    by_step = {r["step"]: r for r in found.rows if r["layer"] == 0}
    assert [by_step[s]["slots"] - by_step[s]["dropped"] for s in range(3)] == [0, 0, 8]
    assert [by_step[s]["touched"] == 0 for s in range(3)] == [True, True, False]
    assert by_step[0]["rows_min"] == by_step[0]["rows_max"] == by_step[0]["flop"] == 0
    assert by_step[0]["dropped"] == 8


def test_a_name_and_another_place(run: Path, tmp_path: Path) -> None:
    assert replay(run, Settings(**QUICK), name="mine").path == run / "replay" / "mine.parquet"
    out = tmp_path / "elsewhere" / "result.parquet"
    assert replay(run, Settings(**QUICK), out=out).path == out
    assert out.exists()
    for name in ("a/b", "..", "", ".hidden"):
        with pytest.raises(ReplayError, match="--name"):
            replay(run, Settings(**QUICK), name=name)


def test_every_layer_gets_the_same_forwards_and_no_more_than_asked(run: Path) -> None:
    found = replay(run, Settings(**{**SMALL, "forwards": 2, "curve": False}))
    by_layer = {n: {(r["step"]) for r in found.rows if r["layer"] == n} for n in (0, 1)}
    assert by_layer == {0: {0, 1, 2, 3}, 1: {0, 1, 2, 3}}
    assert found.about["forwards"]["replayed"] == 4


def test_time_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", steps=400, tokens=4).path
    looks = itertools.count()  # a clock that other processes on the machine do not move
    monkeypatch.setattr(session.time, "monotonic", lambda: 0.01 * next(looks))
    found = replay(run, Settings(**{**QUICK, "forwards": None, "seconds": 1.0}))
    assert next(looks) < 150
    steps = {n: [r["step"] for r in found.rows if r["layer"] == n] for n in (0, 1)}
    assert steps[0] == steps[1]
    assert 2 <= len(steps[0]) < 400
    assert found.about["state"] == "complete"
    assert found.about["forwards"]["chosen"] == 400


def test_one_layer_of_one_forward_in_any_case(run: Path) -> None:
    found = replay(run, Settings(**{**QUICK, "forwards": 2, "seconds": 1e-6}))
    assert [(r["step"], r["layer"]) for r in found.rows] == [(0, 0)]
    missing = {found.rows[0]["phase"]: [1]}
    assert found.about["layers"]["missing"].items() >= missing.items()
    assert found.about["layers"].items() >= {"chosen": 2, "replayed": 1}.items()
    assert found.about["forwards"]["replayed"] == 1


def test_ctrl_c_keeps_what_was_measured(run: Path) -> None:
    complete = replay(run, Settings(**QUICK), name="n").path
    before = complete.read_bytes()

    def stop(now: Progress) -> None:
        if now.now.endswith("layer 1"):
            raise KeyboardInterrupt

    found = replay(run, Settings(**QUICK), name="n", on_progress=stop)
    assert found.interrupted
    assert found.path == run / "replay" / "n-interrupted.parquet"
    assert results.about(found.path)["state"] == "interrupted"
    assert pq.read_table(found.path).num_rows == 2
    assert complete.read_bytes() == before
    # A complete one in its place removes it.
    assert replay(run, Settings(**QUICK), name="n").path == complete
    assert not found.path.exists()


def test_ctrl_c_before_anything_was_measured(run: Path) -> None:
    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay(run, Settings(**QUICK), on_progress=stop)
    assert list((run / "replay").iterdir()) == []


@pytest.mark.parametrize("every", [0.0, 1e9])
def test_a_replay_that_fails_leaves_what_it_measured(
    run: Path, every: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_SAVE_EVERY_S", every)

    def die(now: Progress) -> None:
        if now.done == 1 and now.now.endswith("layer 0"):
            raise MemoryError

    with pytest.raises(MemoryError):
        replay(run, Settings(**QUICK), name="n", on_progress=die)
    left = run / "replay" / "n-interrupted.parquet"
    assert results.about(left)["state"] == "interrupted"
    assert pq.read_table(left).num_rows == 3


def test_threads_are_given_back(run: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        replay(run, Settings(**QUICK))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_shapes_that_exceed_memory_are_refused_before_any_work(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: object, **__: object) -> None:
        raise AssertionError("weights were made")

    monkeypatch.setattr(session.MoELayer, "random", nothing)
    huge = {**QUICK, "hidden": 10**6, "intermediate": 10**6}
    with pytest.raises(ReplayError, match=r"takes 96,000.0 GB, .* free. Nothing was allocated"):
        replay(run, Settings(**huge))


@pytest.mark.parametrize(
    ("path", "said"),
    [("model.layers.0.mlp", r"layer 0 \(model\.layers\.0\.mlp\) is,"), ("0", "layer 0 is,")],
)
def test_a_layer_without_sizes_is_named(path: str, said: str) -> None:
    info = dataclasses.replace(layer_info(0), path=path)
    with pytest.raises(ReplayError, match=f"how large an expert of {said}"):
        settings.shape_of(info, Settings(), torch.float32)


def test_a_name_and_a_file_are_one_too_many(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match=r"--name mine and --out .* give one of them"):
        replay(run, Settings(**QUICK), name="mine", out=tmp_path / "x.parquet")
    assert not (run / "replay").exists()


def test_measuring_the_machine_takes_none_of_the_seconds(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = [0.0]
    clock, ceilings_of = time.monotonic, session.machine.ceilings_of
    monkeypatch.setattr(session.time, "monotonic", lambda: clock() + late[0])

    def slow(device: torch.device) -> Any:
        late[0] = 10_000.0
        return ceilings_of(device)

    monkeypatch.setattr(session.machine, "ceilings_of", slow)
    found = replay(run, Settings(**{**QUICK, "forwards": 2, "seconds": 1_000.0}))
    assert found.about["forwards"]["replayed"] == 4  # every one that was chosen
    assert found.about["seconds"] < 1_000


def test_a_ceiling_that_was_measured_too_low_is_found_out(
    run: Path, cache: Path, ceilings: Any
) -> None:
    assert replay(run, Settings(**QUICK)).about["beaten"] == []
    low = dataclasses.replace(ceilings, matmul_flop_per_s={"float32": 1e3})
    with session.machine.one_thread(torch.device("cpu")):
        session.machine.store(low, torch.device("cpu"))
    found = replay(run, Settings(**QUICK))
    (beaten,) = found.about["beaten"]
    assert (beaten["what"], beaten["forwards"]) == ("matmul", len(found.rows))
    fastest = max(row["flop"] / row["time_ns"] for row in found.rows)
    assert beaten["by"] == pytest.approx(1e9 * fastest / 1e3)


def test_no_place_to_write(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "measured", None)  # not reached
    (run / "replay").write_text("a file")
    with pytest.raises(ReplayError, match=r"replay cannot be written.*--out"):
        replay(run, Settings(**QUICK))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(run: Path) -> None:
    run.chmod(0o555)
    try:
        with pytest.raises(ReplayError, match=r"cannot be written \(Permission denied\).*--out"):
            replay(run, Settings(**QUICK))
    finally:
        run.chmod(0o755)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden": None}, "not say how large an expert of layer 0 .* Give --hidden, or --preset"),
        ({"hidden": None, "intermediate": None}, "Give --hidden and --intermediate"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "abacus"}, "'abacus' is no device"),
        ({"device": "meta"}, "runs on cpu and cuda"),
        ({"policy": Policy("reroute", 1.0)}, "no runners-up"),
        ({"policy": Policy(top_k=3)}, "--top-k 3: the trace has 2 choices"),
        ({"layers": frozenset({7})}, "no layer 7"),
    ],
)
def test_refused(run: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ReplayError, match=says):
        replay(run, Settings(**{**QUICK, **changes}))
    assert not (run / "replay").exists()  # refused before any work


def test_what_is_no_result(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="is a folder: the result is a file"):
        replay(run, Settings(**QUICK), out=tmp_path)
    with pytest.raises(ReplayError, match="is not a result of moe-lens replay"):
        results.about(run / "meta" / "rank=0.json")
    foreign = next((run / "load" / "rank=0").glob("*.parquet"))
    with pytest.raises(ReplayError, match="is not a result of moe-lens replay"):
        results.about(foreign)


def test_weights_that_were_not_recorded_are_one_over_k(run: Path, tmp_path: Path) -> None:
    rows = write_run(tmp_path / "other", tokens=4, steps=2).rows["routing"]
    other = tmp_path / "other"
    segment(other, "routing", [{**r, "weights": []} for r in rows])
    write_meta(other, meta(layers=[layer_info(i) for i in range(2)]))
    assert replay(other, Settings(**QUICK)).about["weights"] == "1/k, none were recorded"


@pytest.mark.parametrize(
    ("name", "said"),
    [("notes.txt", "its name ends in .parquet"), ("theirs.parquet", "It is not written over")],
)
def test_files_of_others_are_not_written_over(
    run: Path, tmp_path: Path, name: str, said: str
) -> None:
    theirs = tmp_path / name
    theirs.write_text("mine")
    with pytest.raises(ReplayError, match=said):
        replay(run, Settings(**QUICK), out=theirs)
    assert theirs.read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"forwards": 0}, "forwards is 1 or more"),
        ({"repeats": 1}, "repeats is 2 or more"),
        ({"preset": "mixtral-8x7b"}, "preset is a Preset"),
    ],
)
def test_what_is_no_setting(words: dict[str, Any], said: str) -> None:
    with pytest.raises(ReplayError, match=said):
        Settings(**words)
    assert Settings(layers=[1, 1]).layers == frozenset({1})  # type: ignore[arg-type]


def test_a_part_of_the_run_does_not_replace_the_whole(run: Path) -> None:
    whole = replay(run, Settings(**QUICK)).path
    parts = [
        replay(run, Settings(**{**QUICK, **part})).path
        for part in ({"layers": frozenset({1})}, {"steps": range(1)}, {"backend": "reference"})
    ]
    assert len({whole, *parts}) == 4
    assert whole.exists()
    assert replay(run, Settings(**QUICK)).path == whole


def test_twins_that_are_the_same_work_are_a_sample_of_noise(
    recorded: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {"time": 1e-3, "again": 1e-3, "balanced": 1.5e-3, "same_touched": 1e-3}

    def timed(works: dict[str, Any], repeats: int, device: object, **_: object) -> Any:
        return {name: [taken[name]] * repeats for name in works}

    monkeypatch.setattr(measure, "interleaved", timed)
    seen = set()
    for place in (recorded, run):  # every expert is chosen in the one, and not in the other
        found = replay(place, Settings(**QUICK), out=run.parent / "out.parquet")
        experts = found.about["shapes"][0]["experts"]
        for row in found.rows:
            seen.add(row["touched"] == experts)
            assert row["noise_ns"] == pytest.approx(5e5 if row["touched"] == experts else 0)
    assert seen == {True, False}
