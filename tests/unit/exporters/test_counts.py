"""Counts for engines: against a loop over the recorded tokens, and as the engines read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.traces import Written, layer_info, write_run

from moe_lens.errors import ExportRefused
from moe_lens.exporters.exporting import export_trace
from moe_lens.exporters.selection import Selection
from moe_lens.trace.meta import read_meta, write_meta


def looped(written: Written, keep: Callable[[dict[str, Any]], bool], experts: int = 8) -> Any:
    """`[L, E]`: choices of the tokens to keep, from the rows of routing."""
    count_LE = np.zeros((2, experts), np.int64)
    phase_of = {r["step"]: r["phase"] for r in written.rows["steps"]}
    tag_of = {(r["rank"], r["step"], r["token"]): r["tag"] for r in written.rows["tokens"]}
    for r in written.rows["routing"]:
        said = {**r, "phase": phase_of[r["step"]], "tag": tag_of[r["rank"], r["step"], r["token"]]}
        if keep(said):
            for expert in r["expert_ids"]:
                if expert < experts:
                    count_LE[r["layer"], expert] += 1
    return count_LE


@pytest.mark.parametrize(
    ("selection", "keep"),
    [
        (Selection(), lambda r: True),
        (Selection(phase="eval"), lambda r: r["phase"] == "eval"),
        (Selection(steps=range(1, 3)), lambda r: 1 <= r["step"] < 3),
        (Selection(tag="code"), lambda r: r["tag"] == "code"),
        (
            Selection(phase="train", steps=range(2, 9), tag="prose"),
            lambda r: r["phase"] == "train" and r["step"] >= 2 and r["tag"] == "prose",
        ),
    ],
)
def test_eplb_has_what_a_loop_counts(
    tmp_path: Path, selection: Selection, keep: Callable[[dict[str, Any]], bool]
) -> None:
    run = write_run(tmp_path / "run", ranks=(0, 1), world=2, zero_experts=2, open_tables=("load",))
    done = export_trace(tmp_path / "run", tmp_path / "c.npy", "eplb", selection=selection)
    weight_LE = np.load(tmp_path / "c.npy")
    assert weight_LE.dtype == np.int64
    assert weight_LE.tolist() == looped(run, keep).tolist()
    assert done.choices == weight_LE.sum()


def test_a_copy_counts_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ranks=(0, 1), world=2)
    write_meta(tmp_path / "run", replace(run.metas[1], counts="copy"))
    export_trace(tmp_path / "run", tmp_path / "c.npy", "eplb")
    assert np.load(tmp_path / "c.npy").tolist() == looped(run, lambda r: r["rank"] == 0).tolist()


def _blocks(run: Path, *blocks: int | None) -> None:
    meta = read_meta(run / "meta" / "rank=0.json")
    meta.layers = [replace(x, block=b) for x, b in zip(meta.layers, blocks, strict=True)]
    write_meta(run, meta)


def test_sglang_has_a_row_for_every_decoder_block(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    _blocks(tmp_path / "run", 1, 3)
    out = tmp_path / "c.json"
    export_trace(tmp_path / "run", out, "sglang", blocks=6)
    said = json.loads(out.read_text())
    expected = np.zeros((6, 8), np.int64)
    expected[[1, 3]] = looped(run, lambda r: True)
    assert said == {"logical_count": expected.tolist()}
    export_trace(tmp_path / "run", out, "sglang", force=True)
    assert len(json.loads(out.read_text())["logical_count"]) == 4
    with pytest.raises(ExportRefused, match=r"decoder block 3, but --blocks says 3 of them\."):
        export_trace(tmp_path / "run", out, "sglang", blocks=3, force=True)
    with pytest.raises(ExportRefused, match="is of the whole model: leave out --layers"):
        export_trace(
            tmp_path / "run", out, "sglang", selection=Selection(frozenset({0})), force=True
        )
    _blocks(tmp_path / "run", 1, None)
    with pytest.raises(ExportRefused, match=r"does not know in which .* \(layer 1\), and engines"):
        export_trace(tmp_path / "run", out, "sglang", force=True)


def test_layers_of_other_sizes_are_exported_one_size_at_a_time(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    meta = read_meta(tmp_path / "run" / "meta" / "rank=0.json")
    meta.layers = [layer_info(0), layer_info(1, experts=16)]
    write_meta(tmp_path / "run", meta)
    with pytest.raises(ExportRefused, match=r"number of experts \(\[8, 16\]\)"):
        export_trace(tmp_path / "run", tmp_path / "c.npy", "eplb")
    one = Selection(layers=frozenset({0}))
    export_trace(tmp_path / "run", tmp_path / "c.npy", "eplb", selection=one)
    assert np.load(tmp_path / "c.npy").tolist() == looped(run, lambda r: True)[:1].tolist()
    with pytest.raises(ExportRefused, match="has no layer 7: its layers go up to 1"):
        seven = Selection(layers=frozenset({7}))
        export_trace(tmp_path / "run", tmp_path / "d.npy", "eplb", selection=seven)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    for selection, said in (
        (Selection(phase="decode"), "no choices of phase 'decode'; its phases are eval, train"),
        (Selection(steps=range(50, 60)), "no choices of steps 50 to 59"),
        (Selection(tag="poem"), "no choices of tag 'poem'"),
    ):
        with pytest.raises(ExportRefused, match=said):
            export_trace(tmp_path / "run", tmp_path / "c.npy", "eplb", selection=selection)
    assert not (tmp_path / "c.npy").exists()


def test_nothing_is_overwritten_or_left_in_half(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    out = tmp_path / "c.npy"
    out.write_text("mine")
    with pytest.raises(ExportRefused, match="is there already: replace it with --force"):
        export_trace(tmp_path / "run", out, "eplb")
    assert out.read_text() == "mine"
    with pytest.raises(ExportRefused, match="has no choices"):
        export_trace(tmp_path / "run", out, "eplb", selection=Selection(tag="no"), force=True)
    assert out.read_text() == "mine"
    export_trace(tmp_path / "run", out, "eplb", force=True)
    assert np.load(out).shape == (2, 8)
    with pytest.raises(ExportRefused, match=r"end it in \.json"):
        export_trace(tmp_path / "run", tmp_path / "c.txt", "sglang")
    with pytest.raises(ExportRefused, match="and npy is a folder: name another"):
        export_trace(tmp_path / "run", out, "npy", force=True)
    with pytest.raises(ExportRefused, match="no format is called 'csv': it is one of eplb"):
        export_trace(tmp_path / "run", out, "csv")
    with pytest.raises(ExportRefused, match="--without-last is of sequences"):
        export_trace(tmp_path / "run", out, "eplb", without_last=True)
    with pytest.raises(ExportRefused, match="--blocks is of engines' formats: eplb has MoE layers"):
        export_trace(tmp_path / "run", out, "eplb", blocks=9, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.npy", "run"]
