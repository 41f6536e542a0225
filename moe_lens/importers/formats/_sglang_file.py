"""One rank's file of SGLang's expert distribution recorder in its modes per_pass and per_token.

Written by `_DetailAccumulator.dump` (sglang 0.5.23, srt/eplb/expert_distribution.py, lines 896 to
956), one file a rank:

    records: list of dict(forward_pass_id, rank, gatherer_key, global_physical_count, and in mode
        per_token: input_ids, positions, extend_seq_lens, forward_mode, topk_ids_of_layer,
        misc_objects)
    last_physical_to_logical_map: int64 [blocks, physical experts]

`misc_objects` is one list that all records share, and which later passes overwrite (line 551): it
is not read.

B decoder blocks, L those with experts, T tokens of a pass, K choices, P physical and E logical
experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ImportRefused
from moe_lens.importers.formats._torch_file import as_array, shown
from moe_lens.importers.source import Ints

SLOTS = 8
"""Choices of a token that the recorder has room for (`_TOP_K_NUM`, line 462)."""
MODES = range(1, 10)
"""Values of ForwardMode (srt/model_executor/forward_batch_info.py, lines 198 to 222)."""
EXTEND, DECODE, MIXED, TARGET_VERIFY, SPLIT_PREFILL = 1, 2, 3, 5, 8
_RUNS_ON = (EXTEND, MIXED)
"""Modes in which the positions of a piece are one after another."""
_IN_ALL = ("forward_pass_id", "rank", "gatherer_key", "global_physical_count")
_OF_TOKENS = ("input_ids", "positions", "extend_seq_lens", "forward_mode", "topk_ids_of_layer")


@dataclass
class Record:
    """One pass.

    Attributes:
        where: Its place, for errors.
        number: SGLang's `forward_pass_id`.
        count_BP: Choices of each physical expert.
        ids_BTK: Physical ids in 8 slots, -1 where there is none; None in mode per_pass.
        mode: ForwardMode; 0 in mode per_pass.
        token_id_T, position_T: Empty in mode per_pass.
        lengths: Tokens of each sequence's piece; None: not told.
    """

    where: str
    number: int
    count_BP: Ints
    ids_BTK: Ints | None
    mode: int
    token_id_T: NDArray[np.int64]
    position_T: NDArray[np.int64]
    lengths: list[int] | None


@dataclass
class RankFile:
    """What one rank dumped, its structure checked.

    Attributes:
        path: The file.
        rank: SGLang's expert-parallel rank (model_executor/model_runner.py, line 760): ranks that
            share all experts have the same one.
        map_BP: Logical expert of each physical one.
        records: In order.
    """

    path: Path
    rank: int
    map_BP: NDArray[np.int64]
    records: list[Record]

    @property
    def per_token(self) -> bool:
        return self.records[0].ids_BTK is not None

    @property
    def numbers(self) -> list[int]:
        return [r.number for r in self.records]

    @property
    def experts(self) -> int:
        return int(self.map_BP.max()) + 1

    def logical(self, count_BP: Ints) -> NDArray[np.int64]:
        """`[B, E]`: counts of physical experts as counts of logical ones."""
        B, E = len(count_BP), self.experts
        cell_BP = self.map_BP + (np.arange(B) * E)[:, None]
        # Sums of float64 are exact far beyond what int32 counts.
        sums = np.bincount(cell_BP.ravel(), count_BP.ravel(), B * E)
        return sums.astype(np.int64).reshape(B, E)


def read_records(path: Path, found: dict[str, Any], *, allow_gaps: bool) -> tuple[RankFile, int]:
    """What a rank dumped, and how many passes are missing in it.

    Raises:
        ImportRefused: It has not the structure of this mode, or passes are missing and
            `allow_gaps` is off.
    """
    map_BP = _map(path, found.get("last_physical_to_logical_map"))
    records = found["records"]
    if not isinstance(records, list):
        raise ImportRefused(f"{path}: 'records' is a {type(records).__name__}, not a list.")
    if not records:
        raise ImportRefused(f"{path} has no record: nothing ran between start and dump.")
    per_token = isinstance(records[0], dict) and "topk_ids_of_layer" in records[0]
    read: list[Record] = []
    rank, gaps = None, 0
    for i, raw in enumerate(records):
        record = _record(f"record {i}", path, raw, map_BP.shape, per_token)
        place = f"{path}: {record.where}"
        if not _is_int(raw["rank"]) or raw["rank"] < 0:
            raise ImportRefused(f"{place}: the rank is {shown(raw['rank'])}.")
        if raw["rank"] != rank and rank is not None:
            raise ImportRefused(f"{place} is of rank {raw['rank']}, the one before of rank {rank}.")
        rank = raw["rank"]
        if read and record.number <= read[-1].number:
            raise ImportRefused(
                f"{place}: pass {record.number} after pass {read[-1].number}: passes of a draft "
                "model stand between those of the model (record without speculative decoding)."
            )
        missing = record.number - read[-1].number - 1 if read else 0
        if missing and not allow_gaps:
            raise ImportRefused(
                f"{place}: pass {record.number} after pass {read[-1].number}: {missing} passes are "
                "missing. If that is right, say --allow-gaps."
            )
        gaps += missing
        read.append(record)
        # A pass's lists of Python numbers are eight times its arrays.
        records[i] = None
    return RankFile(path, int(rank or 0), map_BP, read), gaps


def _map(path: Path, raw: Any) -> NDArray[np.int64]:
    place = f"{path}: last_physical_to_logical_map"
    if raw is None:
        raise ImportRefused(f"{place} is missing: without it ids cannot be read.")
    map_BP = as_array(raw, 2, place).astype(np.int64)
    if not map_BP.size:
        raise ImportRefused(f"{place} is empty.")
    E = int(map_BP.max()) + 1
    for block, of_P in enumerate(map_BP):
        logical = np.unique(of_P)
        if logical[0] < 0 or len(logical) != E:
            wrong = np.flatnonzero(logical != np.arange(len(logical)))  # E may be anything
            lost = int(wrong[0]) if len(wrong) else len(logical)
            what = f"expert {int(logical[0])}" if logical[0] < 0 else f"no place for expert {lost}"
            raise ImportRefused(f"{place}, block {block}: {what} of {E} logical experts.")
    return map_BP


def _record(where: str, path: Path, raw: Any, shape: tuple[int, ...], per_token: bool) -> Record:
    place = f"{path}: {where}"
    if not isinstance(raw, dict):
        raise ImportRefused(f"{place} is a {type(raw).__name__}, not a dictionary.")
    if not per_token and "topk_ids_of_layer" in raw:
        raise ImportRefused(f"{place} is of mode per_token, the ones before of mode per_pass.")
    for key in _IN_ALL + _OF_TOKENS * per_token:
        if key not in raw:
            raise ImportRefused(
                f"{place} has no {key!r}: it is not as SGLang 0.5.23's recorder writes it in mode "
                f"{'per_token' if per_token else 'per_pass'}."
            )
    if raw["gatherer_key"] != "primary":
        raise ImportRefused(
            f"{place}: gatherer_key is {shown(raw['gatherer_key'])}, not 'primary'."
        )
    number = raw["forward_pass_id"]
    if not _is_int(number) or number < 0:
        raise ImportRefused(f"{place}: forward_pass_id is {shown(number)}.")
    count_BP = as_array(raw["global_physical_count"], 2, f"{place}: global_physical_count")
    if count_BP.shape != shape:
        raise ImportRefused(
            f"{place}: global_physical_count is of {list(count_BP.shape)}, but the map of "
            f"{list(shape)}."
        )
    if count_BP.min() < 0:
        block = int(np.argwhere(count_BP < 0)[0][0])
        raise ImportRefused(f"{place}, block {block}: a count is {int(count_BP.min())}.")
    none = np.zeros(0, np.int64)
    if not per_token:
        return Record(where, number, count_BP, None, 0, none, none, None)
    return _of_tokens(Record(where, number, count_BP, None, 0, none, none, None), place, raw)


def _of_tokens(record: Record, place: str, raw: dict[str, Any]) -> Record:
    ids_BTK = as_array(raw["topk_ids_of_layer"], 3, f"{place}: topk_ids_of_layer")
    B, T, K = ids_BTK.shape
    if len(record.count_BP) != B or K != SLOTS:
        raise ImportRefused(
            f"{place}: topk_ids_of_layer is of {[B, T, K]}, not of [{len(record.count_BP)} blocks, "
            f"tokens, {SLOTS} slots]."
        )
    record.ids_BTK = ids_BTK
    record.token_id_T = _numbers(raw["input_ids"], f"{place}: input_ids")
    record.position_T = _numbers(raw["positions"], f"{place}: positions")
    for name, got in (("input_ids", record.token_id_T), ("positions", record.position_T)):
        if len(got) != T:
            raise ImportRefused(f"{place}: {len(got):,} {name}, but {T:,} rows of ids.")
        if got.min(initial=0) < 0 or got.max(initial=0) >= 1 << 31:
            t = int(np.flatnonzero((got < 0) | (got >= 1 << 31))[0])
            raise ImportRefused(f"{place}, token {t}: {name} has {int(got[t])}.")
    record.mode = raw["forward_mode"]
    if not _is_int(record.mode) or record.mode not in MODES:
        raise ImportRefused(
            f"{place}: forward_mode is {shown(record.mode)}, not {MODES[0]} to {MODES[-1]}."
        )
    if raw["extend_seq_lens"] is not None:
        lengths = _numbers(raw["extend_seq_lens"], f"{place}: extend_seq_lens")
        if lengths.min(initial=0) < 0 or lengths.sum() != T:
            raise ImportRefused(
                f"{place}: extend_seq_lens add up to {int(lengths.sum()):,}, but there are {T:,} "
                "tokens."
            )
        record.lengths = lengths.tolist()
        _check_positions(record, place)
    return record


def _check_positions(record: Record, place: str) -> None:
    """Positions of a piece follow one another."""
    if record.mode not in _RUNS_ON or record.lengths is None or len(record.position_T) < 2:
        return
    inside_T = np.ones(len(record.position_T), bool)
    begins = np.cumsum([0, *record.lengths[:-1]])
    inside_T[begins[begins < len(inside_T)]] = False
    jumps_T = np.diff(record.position_T, prepend=record.position_T[0]) != 1
    if (jumps_T & inside_T).any():
        t = int(np.flatnonzero(jumps_T & inside_T)[0])
        raise ImportRefused(
            f"{place}, token {t}: position {int(record.position_T[t])} after "
            f"{int(record.position_T[t - 1])} within one sequence (extend_seq_lens)."
        )


def _numbers(raw: Any, place: str) -> NDArray[np.int64]:
    if not isinstance(raw, list) or not all(type(x) is int for x in raw):
        raise ImportRefused(f"{place} is no list of whole numbers.")
    try:
        return np.array(raw, np.int64)
    except OverflowError as e:
        raise ImportRefused(f"{place} has a number that no integer holds.") from e


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)
