"""The rows of a moe-policylang trace, some at a time: of Parquet, or of lines of JSON.

Both are written by `moe_policylang.integrations.trace_recorder.TraceRecording` (1.15.0). A row is
what one layer chose for one token. Optional columns are there for all rows or for none, but those
of single values (token ids, phases, tags), which may be null in any.

N rows, K choices of a token, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moe_lens.errors import ImportRefused

Ints = NDArray[np.int64]
Values = NDArray[Any]

MISSING = -1
"""A token id that is null; the code of a word that is null."""

LINES = {
    "prompt_id": "p",
    "token_idx": "t",
    "layer_idx": "l",
    "selected_experts": "e",
    "router_scores": "s",
    "router_softmax": "sm",
    "router_logits": "lg_l",
    "token_id": "ti",
    "phase": "ph",
    "domain_tag": "dm",
    "language_tag": "lg",
}
"""Columns as lines of JSON call them, trace_recorder.py:96-125."""

KEYS = ("prompt_id", "token_idx", "layer_idx")
LISTS = ("router_scores", "router_softmax", "router_logits")
WORDS = ("phase", "domain_tag", "language_tag")
HEADER = ("num_layers", "num_experts", "top_k", "num_entries")
"""The first line of a JSON file has these, and `model_name`."""

NOT_MADE = (pa.ArrowException, TypeError, OverflowError, UnicodeEncodeError)
"""What Arrow raises over values of JSON that it cannot make a column of."""

SOME = 32_768
"""Rows read at a time."""


@dataclass
class Rows:
    """Some rows. None: the file has no such column.

    Attributes:
        first: Number of the first, from 0.
        token_id_N: `MISSING` where null.
        word: For each of `WORDS` that is there, the code of each row's word, `[N]`.
    """

    first: int
    prompt_N: Ints
    token_N: Ints
    layer_N: Ints
    ids_NK: Values
    scores_NK: Values | None
    softmax_NE: Values | None
    logits_NE: Values | None
    token_id_N: Ints | None
    word: dict[str, Ints]

    def part(self, first: int, last: int) -> Rows:
        """Rows from `first` to before `last`, counted from 0 here."""

        def cut(x: Any) -> Any:
            return x[first:last] if isinstance(x, np.ndarray) else x

        made = {f.name: cut(getattr(self, f.name)) for f in fields(self)}
        made["first"] = self.first + first
        made["word"] = {name: cut(x) for name, x in self.word.items()}
        return Rows(**made)


def joined(parts: list[Rows]) -> Rows:
    """Rows that follow each other as one."""
    if len(parts) == 1:
        return parts[0]

    def join(arrays: list[Any]) -> Any:
        return np.concatenate(arrays) if isinstance(arrays[0], np.ndarray) else arrays[0]

    made = {f.name: join([getattr(p, f.name) for p in parts]) for f in fields(Rows)}
    made["word"] = {name: join([p.word[name] for p in parts]) for name in parts[0].word}
    return Rows(**made)


class Table:
    """A file of rows, Parquet or JSON.

    Attributes:
        header: Of a JSON file; {}: it is Parquet, which knows nothing of its model.
        words: The words behind codes, in the order in which they came.

    Raises:
        ImportRefused: It is no trace of moe-policylang, or not a whole one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.words: list[str] = []
        self._code: dict[str, int] = {}
        self.header: dict[str, Any] = {}
        self.parquet = _begins(path, b"PAR1")
        self.columns = self._of_parquet() if self.parquet else self._of_lines()
        if missing := [x for x in (*KEYS, "selected_experts") if x not in self.columns]:
            raise ImportRefused(
                f"{path} has no column {missing[0]}: it is no trace of moe-policylang, or an old "
                "one that recorded no choices (record it again with record_trace)."
            )

    def place(self, row: int) -> str:
        """Where a row stands, for errors."""
        return f"row {row}" if self.parquet else f"line {row + 2}"

    def rows(self) -> Iterator[Rows]:
        """All rows, some at a time.

        Raises:
            ImportRefused: A value is missing or of another kind; names the row.
        """
        first = 0
        for some in self._parquet_rows() if self.parquet else self._lines():
            made = self._checked(some, first)
            yield made
            first += len(made.layer_N)
        said = self.header.get("num_entries", first)
        if said != first:
            raise ImportRefused(
                f"{self.path}: {first:,} rows, but its first line speaks of {said:,}: the file is "
                "torn, or lines were taken out."
            )

    # -- Parquet ---------------------------------------------------------------------------------

    def _of_parquet(self) -> set[str]:
        try:
            return set(pq.read_schema(self.path).names)
        except (pa.ArrowException, OSError) as e:
            raise ImportRefused(f"{self.path} is no whole Parquet file ({_line(e)}).") from e

    def _parquet_rows(self) -> Iterator[dict[str, Any]]:
        names = [x for x in LINES if x in self.columns]
        try:
            # Buffers that were read ahead would stay until the file is closed.
            with pq.ParquetFile(self.path, pre_buffer=False) as file:
                for batch in file.iter_batches(SOME, columns=names, use_threads=False):
                    yield {name: batch.column(name) for name in names}
        except (pa.ArrowException, OSError) as e:
            raise ImportRefused(f"{self.path} cannot be read ({_line(e)}).") from e

    # -- JSON ------------------------------------------------------------------------------------

    def _of_lines(self) -> set[str]:
        try:
            with self.path.open("rb") as f:
                header, first = self._json(f.readline(), "line 1"), f.readline()
        except OSError as e:
            raise ImportRefused(f"{self.path} cannot be read: {e.strerror or e}.") from e
        if missing := [x for x in HEADER if not isinstance(header.get(x), int)]:
            raise ImportRefused(
                f"{self.path}: line 1 has no {missing[0]}: it is no header of moe-policylang."
            )
        self.header = header
        if not first:
            return set(LINES)
        said = self._json(first, "line 2")
        lists = {name for name in LISTS if said.get(LINES[name]) is None}
        keys = {x for x in (*KEYS, "selected_experts") if LINES[x] not in said}
        return set(LINES) - lists - keys

    def _lines(self) -> Iterator[dict[str, Any]]:
        names = [x for x in LINES if x in self.columns]
        without = {LINES[x] for x in LISTS if x not in self.columns}
        with self.path.open("rb") as f:
            f.readline()
            number, some = 2, []
            for line in f:
                some.append(said := self._json(line, f"line {number}"))
                if found := [x for x in sorted(without) if said.get(x) is not None]:
                    raise ImportRefused(
                        f"{self.path}: line {number} has {found[0]!r}, which line 2 has not."
                    )
                if len(some) == SOME // 4:
                    yield {name: [x.get(LINES[name]) for x in some] for name in names}
                    some = []
                number += 1
            if some:
                yield {name: [x.get(LINES[name]) for x in some] for name in names}

    def _json(self, line: bytes, where: str) -> dict[str, Any]:
        try:
            said = json.loads(line)
        except (ValueError, RecursionError) as e:
            torn = "" if line.endswith(b"\n") else ": the file ends in the middle of it"
            raise ImportRefused(f"{self.path}: {where} is no JSON ({_line(e)}){torn}.") from e
        if not isinstance(said, dict):
            raise ImportRefused(f"{self.path}: {where} is no JSON object.")
        return said

    # -- both ------------------------------------------------------------------------------------

    def _checked(self, some: dict[str, Any], first: int) -> Rows:
        where = _Where(self, first)
        prompt_N, token_N, layer_N = (_numbers(some[name], name, where) for name in KEYS)
        scores_NK, softmax_NE, logits_NE = (
            None if name not in some else _lists(some[name], name, pa.float32(), where)
            for name in LISTS
        )
        token_id_N = None
        if "token_id" in some:
            token_id_N = _numbers(some["token_id"], "token_id", where, null=MISSING)
            odd_N = (token_id_N < MISSING) | (token_id_N >= 1 << 31)
            if odd_N.any():
                at = int(np.argmax(odd_N))
                raise ImportRefused(f"{where(at)}: token_id is {token_id_N[at]}.")
        return Rows(
            first=first,
            prompt_N=prompt_N,
            token_N=token_N,
            layer_N=layer_N,
            ids_NK=_lists(some["selected_experts"], "selected_experts", pa.int64(), where),
            scores_NK=scores_NK,
            softmax_NE=softmax_NE,
            logits_NE=logits_NE,
            token_id_N=token_id_N,
            word={name: self._codes(some[name], name, where) for name in WORDS if name in some},
        )

    def _codes(self, column: Any, name: str, where: _Where) -> Ints:
        try:
            made = _array(column, pa.string())
        except NOT_MADE as e:
            raise ImportRefused(f"{where(0)}: {name} is no text ({_line(e)}).") from e
        if not (pa.types.is_string(made.type) or pa.types.is_large_string(made.type)):
            raise ImportRefused(f"{where(0)}: {name} is {made.type}, not text.")
        encoded = made.dictionary_encode()
        codes = [self._code.setdefault(w, len(self._code)) for w in encoded.dictionary.to_pylist()]
        self.words += list(self._code)[len(self.words) :]
        at_N = encoded.indices.fill_null(len(codes)).to_numpy()
        of_N: Ints = np.array([*codes, MISSING], np.int64)[at_N]
        return of_N


@dataclass(frozen=True)
class _Where:
    """The place of a row of some, for errors."""

    table: Table
    first: int

    def __call__(self, row: int) -> str:
        return f"{self.table.path}: {self.table.place(self.first + row)}"


def _array(column: Any, kind: pa.DataType) -> pa.Array:
    """A column as Arrow has it: of Parquet as it is, of JSON made."""
    return column if isinstance(column, pa.Array) else pa.array(column, kind)


def _numbers(column: Any, name: str, where: _Where, null: int | None = None) -> Ints:
    try:
        made = _array(column, None)
    except NOT_MADE:
        odd = (
            i for i, x in enumerate(column) if not (_is_int(x) or (x is None and null is not None))
        )
        at = next(odd, 0)
        raise ImportRefused(f"{where(at)}: {name} is {column[at]!r}, not a number.") from None
    if pa.types.is_null(made.type) and null is not None:
        return np.full(len(made), null, np.int64)
    if not pa.types.is_integer(made.type) and not pa.types.is_null(made.type):
        raise ImportRefused(f"{where(0)}: {name} is {made.type}, not an integer.")
    if made.null_count and null is None:
        raise ImportRefused(f"{where(_first_null(made))}: no {name}.")
    filled = made.fill_null(null) if made.null_count else made
    return np.asarray(filled.to_numpy(zero_copy_only=False), np.int64)


def _lists(column: Any, name: str, kind: pa.DataType, where: _Where) -> Values:
    """A list a row, all of one length, `[N, length]`."""
    try:
        # Told that they are integers, Arrow would cut a float to one.
        made = _array(column, pa.list_(kind) if pa.types.is_floating(kind) else None)
    except NOT_MADE:
        at = _odd(column, _is_float if pa.types.is_floating(kind) else _is_int)
        raise ImportRefused(
            f"{where(at)}: {name} is {_line(column[at])}, not a list of numbers."
        ) from None
    if not (pa.types.is_list(made.type) or pa.types.is_large_list(made.type)):
        raise ImportRefused(f"{where(0)}: {name} is {made.type}, not a list.")
    inner = made.type.value_type
    right = (
        pa.types.is_floating(inner) if pa.types.is_floating(kind) else pa.types.is_integer(inner)
    )
    if not right:
        raise ImportRefused(f"{where(0)}: {name} is a list of {inner}.")
    if made.null_count:
        raise ImportRefused(f"{where(_first_null(made))}: no {name}.")
    lengths_N = made.value_lengths().to_numpy()
    if (lengths_N != lengths_N[0]).any():
        at = int(np.argmax(lengths_N != lengths_N[0]))
        raise ImportRefused(
            f"{where(at)}: {lengths_N[at]} {name}, but {lengths_N[0]} in the row before."
        )
    flat = made.flatten()
    if flat.null_count:
        at = _first_null(flat) // int(lengths_N[0])
        raise ImportRefused(f"{where(at)}: a value of {name} is null.")
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(made), -1)


def _first_null(array: pa.Array) -> int:
    return int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))


def _odd(column: list[Any], good: Callable[[Any], bool]) -> int:
    """The first value that is no list of these."""
    return next(
        (i for i, x in enumerate(column) if not isinstance(x, list) or not all(map(good, x))), 0
    )


def _is_int(x: object) -> bool:
    return type(x) is int and -(1 << 63) <= x < 1 << 63


def _is_float(x: object) -> bool:
    return type(x) in (int, float)


def _begins(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as f:
            return f.read(len(magic)) == magic
    except OSError as e:
        raise ImportRefused(f"{path} cannot be read: {e.strerror or e}.") from e


def _line(error: object) -> str:
    """In one line, and short."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= 120 else f"{text[:117]}…"
