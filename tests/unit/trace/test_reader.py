"""The snapshot of a run's files: what is listed, what is merged, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.traces import arrow, meta, segment, stream, write_run

from moe_lens.errors import TraceError
from moe_lens.trace import layout, reader
from moe_lens.trace.meta import Attempt, write_meta
from moe_lens.trace.reader import open_run, read_stream, superseded_from


def rows(n: int, first: int = 0) -> list[dict[str, object]]:
    return [{"step": first + i, "layer": 0, "expert": i % 8, "routed": 1} for i in range(n)]


def test_lists_ranks_segments_and_streams(tmp_path: Path) -> None:
    write_run(tmp_path, ranks=(0, 1), world=2, open_tables=("load",))
    files = open_run(tmp_path)
    assert sorted(files.metas) == [0, 1]
    assert files.missing_ranks == []
    assert [p.name for p in files.segments["load"][1]] == ["seg-00000000.parquet"]
    assert files.streams["load"][1].num_rows > 0
    assert set(files.streams) == {"load"}
    assert files.unfinished
    on_disk = sum(p.stat().st_size for p in (tmp_path / "load").rglob("*.parquet"))
    assert files.bytes["load"] > on_disk  # the streams count too


def test_a_closed_run_is_finished(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert not open_run(tmp_path).unfinished


def test_temporary_files_are_not_segments(tmp_path: Path) -> None:
    write_run(tmp_path)
    folder = layout.segment_dir(tmp_path, "load", 0)
    (folder / ".seg-00000001.tmp").write_bytes(b"PAR1 half written")
    assert len(open_run(tmp_path).segments["load"][0]) == 1


def test_a_stream_whose_segment_exists_is_not_read_twice(tmp_path: Path) -> None:
    write_meta(tmp_path, meta())
    segment(tmp_path, "load", rows(5), seq=3)
    stream(tmp_path, "load", rows(5), seq=3)
    stream(tmp_path, "load", rows(2), seq=4)
    assert open_run(tmp_path).streams["load"][0].num_rows == 2


def test_a_stream_that_vanishes_starts_the_listing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_meta(tmp_path, meta())
    path = stream(tmp_path, "load", rows(5), seq=0)
    true_listing = layout.streams

    def listing_then_seal(run: Path, rank: int) -> dict[tuple[str, int], Path]:
        listed = true_listing(run, rank)
        if path.exists():  # the writer seals right after the reader looked, and opens the next
            path.unlink()
            stream(tmp_path, "load", rows(6), seq=1)
        return listed

    monkeypatch.setattr(reader.layout, "streams", listing_then_seal)
    assert open_run(tmp_path).streams["load"][0].num_rows == 6


def test_a_stream_cut_anywhere_gives_its_complete_batches(tmp_path: Path) -> None:
    path = stream(tmp_path, "load", rows(6), batches=3)
    whole = path.read_bytes()
    seen = set()
    last = 0
    for size in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:size])
        table = read_stream(path)
        found = 0 if table is None else table.num_rows
        assert found >= last
        assert table is None or table.equals(arrow("load", rows(6)).slice(0, found))
        seen.add(found)
        last = found
    path.write_bytes(whole)
    complete = read_stream(path)
    assert complete is not None
    assert complete.num_rows == 6
    assert {0, 2, 4} <= seen <= {0, 2, 4, 6}


def test_a_stream_without_a_complete_schema_is_nothing(tmp_path: Path) -> None:
    path = stream(tmp_path, "load", rows(1))
    path.write_bytes(path.read_bytes()[:20])
    assert read_stream(path) is None
    path.write_bytes(b"")
    assert read_stream(path) is None


def test_a_missing_stream_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_stream(tmp_path / "gone.arrows")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"", "empty"),
        (lambda data: data[: len(data) // 2], "cut off"),
        (lambda data: data[:5], "do not start"),
        (lambda data: b"hello, I am no Parquet file", "do not start"),
        (lambda data: data[:-8] + (10**6).to_bytes(4, "little") + b"PAR1", "footer says 1,000,000"),
    ],
)
def test_a_damaged_segment_is_named(tmp_path: Path, damage, says: str) -> None:
    write_run(tmp_path)
    bad = segment(tmp_path, "load", rows(100), seq=1)
    bad.write_bytes(damage(bad.read_bytes()))
    with pytest.raises(TraceError, match=says) as error:
        open_run(tmp_path)
    assert "seg-00000001.parquet" in str(error.value)
    assert "skip_damaged=True" in str(error.value)

    files = open_run(tmp_path, skip_damaged=True)
    assert list(files.damaged) == [bad]
    assert len(files.segments["load"][0]) == 1


def test_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="does not exist"):
        open_run(tmp_path / "nowhere")


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"")
    with pytest.raises(TraceError, match="is a file; a trace is a folder"):
        open_run(path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="empty folder"):
        open_run(tmp_path)


def test_a_foreign_folder(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c", "d", "e", "f", "g"):
        (tmp_path / name).touch()
    with pytest.raises(TraceError, match=r"not a moe_lens trace.*a\.txt, b\.txt.*and 2 more"):
        open_run(tmp_path)


def test_a_folder_of_traces_names_them(tmp_path: Path) -> None:
    write_run(tmp_path / "run1")
    write_run(tmp_path / "run2")
    with pytest.raises(TraceError, match=r"folder of traces.*run1, run2"):
        open_run(tmp_path)


def test_a_trace_without_meta(tmp_path: Path) -> None:
    stream(tmp_path, "load", rows(1))
    with pytest.raises(TraceError, match="no meta"):
        open_run(tmp_path)


def test_a_newer_format(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = layout.meta_path(tmp_path, 0)
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 9}))
    with pytest.raises(TraceError, match=r"format 9.*Upgrade"):
        open_run(tmp_path)


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, ranks=(0, 2), world=4)
    segment(tmp_path, "load", rows(1), rank=7)  # rows of a rank whose meta was lost
    assert open_run(tmp_path).missing_ranks == [1, 3, 7]


def test_ranks_of_different_runs_are_refused(tmp_path: Path) -> None:
    write_meta(tmp_path, meta(0, run_id="a"))
    write_meta(tmp_path, meta(1, run_id="b"))
    with pytest.raises(TraceError, match=r"different runs \(rank 0: a, rank 1: b\)"):
        open_run(tmp_path)


def test_a_copy_counts_for_rows_but_not_for_sums(tmp_path: Path) -> None:
    write_meta(tmp_path, meta(0, world=2))
    write_meta(tmp_path, meta(1, world=2, counts="copy"))
    files = open_run(tmp_path)
    assert files.ranks("load") == [0]
    assert files.ranks("routing") == [0, 1]


@pytest.mark.parametrize(
    ("firsts", "expected"),
    [
        ([0], {}),
        ([0, 5], {0: 5}),
        ([0, 5, 3], {0: 3, 1: 3}),
        ([0, 3, 5], {0: 3, 1: 5}),
        ([0, None], {}),
        ([0, None, 4], {0: 4, 1: 4}),
    ],
)
def test_the_first_step_that_a_later_attempt_overtook(
    firsts: list[int | None], expected: dict[int, int]
) -> None:
    attempts = [Attempt(i, 0, first_step=first) for i, first in enumerate(firsts)]
    assert superseded_from(meta(attempts=attempts)) == expected
