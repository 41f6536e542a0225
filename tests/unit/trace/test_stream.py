"""The open stream: every completed append can be read, whatever happens to the next one."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pytest

from moe_lens.trace.reader import read_stream
from moe_lens.trace.schema import TABLES
from moe_lens.trace.stream import OpenStream

SCHEMA = TABLES["logits"].schema


def batch(first: int, rows: int = 3) -> pa.Table:
    return pa.table(
        {
            "attempt": [0] * rows,
            "step": list(range(first, first + rows)),
            "forward": [0] * rows,
            "layer": [0] * rows,
            "token": [0] * rows,
            "logits": [[0.5, 1.5, 2.5]] * rows,
        },
        schema=SCHEMA,
    )


def steps(path: Path) -> list[int]:
    table = read_stream(path)
    assert table is not None
    return list(table["step"].to_pylist())


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A disk that takes a file's first `size` bytes: the write that crosses it is cut short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_each_append_can_be_read_while_the_stream_is_open(tmp_path: Path) -> None:
    path = tmp_path / "rank=0" / "logits-00000000.arrows"
    stream = OpenStream(path, SCHEMA)
    table = read_stream(path)
    assert table is not None
    assert (table.num_rows, table.schema) == (0, SCHEMA)
    for n in range(4):
        stream.append(batch(3 * n))
        assert steps(path) == list(range(3 * n + 3))
        assert stream.rows == 3 * n + 3
        assert stream.size == path.stat().st_size
    stream.close()
    assert steps(path) == list(range(12))


def test_a_table_of_many_chunks_is_appended_whole(tmp_path: Path) -> None:
    stream = OpenStream(tmp_path / "s.arrows", SCHEMA)
    stream.append(pa.concat_tables([batch(0), batch(3), batch(6, rows=1)]))
    stream.close()
    assert steps(stream.path) == list(range(7))
    assert stream.rows == 7


def test_a_stream_that_exists_is_not_written_over(tmp_path: Path) -> None:
    first = OpenStream(tmp_path / "s.arrows", SCHEMA)
    first.append(batch(0))
    with pytest.raises(FileExistsError):
        OpenStream(tmp_path / "s.arrows", SCHEMA)
    first.close()
    assert steps(first.path) == [0, 1, 2]


@pytest.mark.parametrize("extra", [0, 1, 100])
def test_a_write_cut_short_leaves_the_batches_before_it(tmp_path: Path, extra: int) -> None:
    stream = OpenStream(tmp_path / "s.arrows", SCHEMA)
    stream.append(batch(0))
    whole = stream.size
    with files_no_larger_than(whole + extra), pytest.raises(OSError, match="too large") as error:
        stream.append(batch(3))
    assert error.value.errno == errno.EFBIG
    assert stream.path.stat().st_size == stream.size == whole
    assert stream.rows == 3
    assert steps(stream.path) == [0, 1, 2]
    stream.close()


def test_a_stream_goes_on_after_a_write_cut_short(tmp_path: Path) -> None:
    stream = OpenStream(tmp_path / "s.arrows", SCHEMA)
    stream.append(batch(0))
    with files_no_larger_than(stream.size + 100), pytest.raises(OSError, match="too large"):
        stream.append(batch(3))
    stream.append(batch(3))
    stream.close()
    assert steps(stream.path) == list(range(6))


def test_a_stream_that_cannot_begin_leaves_no_open_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[IO[Any]] = []
    path_open = Path.open

    def remember(*args: Any, **more: Any) -> IO[Any]:
        opened.append(path_open(*args, **more))
        return opened[-1]

    monkeypatch.setattr(Path, "open", remember)
    with files_no_larger_than(100), pytest.raises(OSError, match="too large"):
        OpenStream(tmp_path / "s.arrows", SCHEMA)
    (file,) = opened
    was_closed = file.closed
    file.close()
    assert was_closed
