"""The meta file: a round trip, what later versions may add, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_lens.errors import TraceError
from moe_lens.trace import layout
from moe_lens.trace.meta import Attempt, LayerInfo, Meta, read_meta, write_meta
from moe_lens.trace.schema import SCHEMA_VERSION


def full() -> Meta:
    """Every field set to something that is not its default."""
    return Meta(
        run_id="20260101-abc",
        rank=3,
        world=8,
        coordinates={"dp": 1, "ep": 3},
        counts="copy",
        model="TinyMoE",
        layers=[
            LayerInfo(0, "model.layers.1.mlp", 64, 8, block=1, score="sigmoid", normalised=False),
            LayerInfo(1, "décodeur.2", 16, None, router="expert-choice", zero_experts=2),
        ],
        never_entered=["model.layers.9.mlp"],
        sampling="1 % of sequences",
        weights="exact",
        keys=["source"],
        tags=["code", "prose — „quoted“"],
        attempts=[Attempt(0, 10, 0, 20, "failed", "ValueError: no"), Attempt(1, 30)],
        warnings={"something": 2},
        pruned={"routing": 100},
        versions={"torch": "2.10"},
        imported="sglang: dump.pt",
        steps="synthetic: one sequence at a time",
        lacks={"weights": "SGLang records none"},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_meta(tmp_path, full())
    return layout.meta_path(tmp_path, 3)


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_written_is_read_back(path: Path) -> None:
    assert read_meta(path) == full()
    default = Meta("x")
    assert all(getattr(full(), n) != v for n, v in vars(default).items() if n != "schema_version")


def test_defaults_are_read_back(tmp_path: Path) -> None:
    write_meta(tmp_path, Meta("x"))
    assert read_meta(layout.meta_path(tmp_path, 0)) == Meta("x")


def test_writing_replaces_the_whole_and_leaves_no_other_file(path: Path) -> None:
    run = path.parent.parent
    write_meta(run, Meta("short", rank=3))
    assert read_meta(path) == Meta("short", rank=3)
    assert [p.name for p in path.parent.iterdir()] == ["rank=3.json"]


def test_a_write_that_fails_leaves_the_old_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_meta(path.parent.parent, Meta("other", rank=3))
    assert read_meta(path) == full()
    assert layout.ranks(path.parent.parent) == [3]


def test_fields_of_a_later_minor_version_are_passed_over(path: Path) -> None:
    raw = json.loads(path.read_text())
    raw["layers"][0]["colour"] = "red"
    raw["attempts"][0]["mood"] = "good"
    rewrite(path, **raw, invented_later={"a": 1})
    assert read_meta(path) == full()


def test_fields_that_an_earlier_minor_version_lacked_have_their_defaults(path: Path) -> None:
    path.write_text(json.dumps({"schema_version": SCHEMA_VERSION, "run_id": "old"}))
    assert read_meta(path) == Meta("old")


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 99, "2", None, 1.5])
def test_another_format_is_refused_with_its_version(path: Path, version: Any) -> None:
    rewrite(path, schema_version=version, run_id={"changed": "altogether"}, layers="elsewhere")
    with pytest.raises(TraceError, match=f"has trace format {version};") as error:
        read_meta(path)
    assert str(path) in str(error.value)
    assert f"reads up to {SCHEMA_VERSION}" in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[1, 2]", "3", '"text"', "null", "{}", '{"run_id": "x"}', "\ufeff{}"]
)
def test_what_is_no_meta_of_ours_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(TraceError, match="is not a moe_lens meta file") as error:
        read_meta(path)
    assert str(path) in str(error.value)


def test_binary_garbage_is_refused(path: Path) -> None:
    path.write_bytes(bytes(range(256)))
    with pytest.raises(TraceError, match="is not a moe_lens meta file"):
        read_meta(path)


def test_a_file_cut_short_is_refused_wherever_it_was_cut(path: Path) -> None:
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(TraceError):
            read_meta(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": [{"layer": 0}]},
        {"layers": ["mlp"]},
        {"layers": 7},
        {"attempts": [{}]},
        {"attempts": [None]},
    ],
)
def test_a_damaged_part_is_refused(path: Path, changes: dict[str, Any]) -> None:
    rewrite(path, **changes)
    with pytest.raises(TraceError, match="is damaged"):
        read_meta(path)


def test_a_meta_without_its_run_id_is_refused(path: Path) -> None:
    path.write_text(json.dumps({"schema_version": SCHEMA_VERSION}))
    with pytest.raises(TraceError, match="is damaged"):
        read_meta(path)
