"""Rank files of one dump of SGLang's recorder: which belong together, which saw the same tokens.

The number in a file is the expert-parallel rank. Ranks of tensor parallelism see the same tokens;
ranks of data-parallel attention have their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from moe_lens.errors import ImportRefused
from moe_lens.importers.formats._sglang_file import RankFile, Record
from moe_lens.importers.source import Given

_CHANCE = 64
"""Equal rows of other tokens, in one layer each, above which chance is no explanation."""


@dataclass
class Ranks:
    """The files of a dump, one a rank.

    Attributes:
        files: By rank.
        copies: Ranks that have the tokens of a rank before them.
        notes: What was taken note of, and how often.
    """

    files: list[RankFile]
    copies: set[int] = field(default_factory=set)
    notes: dict[str, int] = field(default_factory=dict)


def arrange(files: list[RankFile], given: Given, *, folder: bool) -> Ranks:
    """Put the files of a dump in order.

    Args:
        files: At least one.
        given: `allow_gaps`: take ranks whose passes differ.
        folder: All files of a folder are here, so a rank that is not is missing.

    Raises:
        ImportRefused: They are not of one dump, contradict each other, or one is missing.
    """
    files = sorted(files, key=lambda f: (f.rank, f.path.name))
    for file in files[1:]:
        _check_alike(files[0], file)
    out = Ranks(files)
    out.files = _once_each(out)
    if folder:
        _check_complete(out, given)
    if sliced := _sliced(out.files):
        if len(out.files) == 1:
            raise ImportRefused(
                f"{files[0].path} counts only what came to its own experts ({sliced} ranks share "
                "them): import the folder with all ranks' files."
            )
        out.notes["rank files that count their own experts' tokens: added up"] = len(out.files)
        out.files = [_sum(out.files)]
    for i, file in enumerate(out.files):
        for other in out.files[:i]:
            if other.rank not in out.copies and _same_tokens(other, file):
                out.copies.add(file.rank)
                if different := _other_choices(other, file):
                    note = f"passes in which rank {file.rank} chose others than rank {other.rank}"
                    out.notes[f"{note} for the same tokens"] = different
                break
            if file.per_token:
                _check_own_rows(other, file)
    return out


def _check_alike(first: RankFile, file: RankFile) -> None:
    if first.per_token != file.per_token:
        raise ImportRefused(
            f"{file.path} and {first.path.name} are of other modes (per_pass, per_token): import "
            "one dump at a time."
        )
    if not np.array_equal(first.map_BP, file.map_BP):
        raise ImportRefused(
            f"{file.path} and {first.path.name} have other maps of physical to logical experts: "
            "they are not of one dump, or experts were moved while it was written."
        )


def _once_each(ranks: Ranks) -> list[RankFile]:
    """One file a rank: ranks of tensor parallelism that share all experts have one number."""
    kept: dict[int, RankFile] = {}
    for file in ranks.files:
        first = kept.setdefault(file.rank, file)
        if first is file:
            continue
        if first.numbers != file.numbers or not _same_tokens(first, file):
            raise ImportRefused(
                f"{file.path} and {first.path.name} are both of rank {file.rank} and hold other "
                "passes or tokens: import one dump at a time."
            )
        if _other_choices(first, file):
            raise ImportRefused(
                f"{file.path} and {first.path.name} are both of rank {file.rank} and hold other "
                "choices for the same tokens: stages of a pipeline? Those cannot be read together."
            )
        note = f"files of rank {file.rank} that say the same as {first.path.name}: left out"
        ranks.notes[note] = ranks.notes.get(note, 0) + 1
    return list(kept.values())


def _check_complete(ranks: Ranks, given: Given) -> None:
    files = ranks.files
    have = [f.rank for f in files]
    if have != list(range(len(have))):
        lost_rank = next(i for i, rank in enumerate(have) if rank != i)
        raise ImportRefused(
            f"{files[0].path.parent}: there is no file of rank {lost_rank}, but one of rank "
            f"{have[-1]}: bring it, or import the ranks' files one by one."
        )
    every = sorted(set().union(*(f.numbers for f in files)))
    for file in files:
        lost = set(every) - set(file.numbers)
        if lost and not given.allow_gaps:
            raise ImportRefused(
                f"{file.path}: rank {file.rank} has no pass {min(lost)}, which another rank has. "
                "If that is right, say --allow-gaps."
            )
        if lost:
            ranks.notes[f"passes of other ranks that rank {file.rank} does not have"] = len(lost)


def _sliced(files: list[RankFile]) -> int:
    """Among how many ranks the experts are divided, where files count their own part only; else 0.

    DeepEP's low-latency dispatch counts what arrives at a rank (expert_distribution.py, line 656).
    """
    if files[0].per_token:
        return 0
    n = max(len(files), 2)
    parts = range(2, files[0].map_BP.shape[1] + 1) if len(files) == 1 else (n,)
    return next((n for n in parts if all(_in_own_part(f, n) for f in files)), 0)


def _in_own_part(file: RankFile, ranks: int) -> bool:
    P = file.map_BP.shape[1]
    if P % ranks or file.rank >= ranks:
        return False
    total_P = sum(r.count_BP.sum(0, dtype=np.int64) for r in file.records)
    part = slice(file.rank * P // ranks, (file.rank + 1) * P // ranks)
    own, all_of_it = int(total_P[part].sum()), int(total_P.sum())
    # Few choices may fall into one part by chance.
    return own == all_of_it and own > 4 * P


def _sum(files: list[RankFile]) -> RankFile:
    by_number: dict[int, Record] = {}
    for file in files:
        for r in file.records:
            if r.number in by_number:
                r = replace(r, count_BP=by_number[r.number].count_BP + r.count_BP)
            by_number[r.number] = r
    return replace(files[0], records=[by_number[n] for n in sorted(by_number)])


def _pairs(a: RankFile, b: RankFile) -> list[tuple[Record, Record]]:
    of_a = {r.number: r for r in a.records}
    return [(of_a[r.number], r) for r in b.records if r.number in of_a]


def _same_tokens(a: RankFile, b: RankFile) -> bool:
    pairs = _pairs(a, b)
    if a.per_token:
        same = (
            np.array_equal(x.token_id_T, y.token_id_T)
            and np.array_equal(x.position_T, y.position_T)
            for x, y in pairs
        )
    else:
        same = (np.array_equal(a.logical(x.count_BP), b.logical(y.count_BP)) for x, y in pairs)
    return bool(pairs) and all(same)


def _other_choices(a: RankFile, b: RankFile) -> int:
    """Passes in which the counts of logical experts differ (replicas of one may)."""
    return sum(
        not np.array_equal(a.logical(x.count_BP), b.logical(y.count_BP)) for x, y in _pairs(a, b)
    )


def _check_own_rows(a: RankFile, b: RankFile) -> None:
    """Refuse a rank whose choices are those of another rank's tokens.

    With data-parallel attention and no all-to-all backend the experts see the tokens of all ranks
    in one array, and the recorder takes its first rows for this rank's (line 508 stores what comes,
    line 546 cuts it to the rank's number of tokens): right for the first rank only.
    """
    rows = 0
    for x, y in _pairs(a, b):
        assert x.ids_BTK is not None
        assert y.ids_BTK is not None
        T = min(len(x.token_id_T), len(y.token_id_T))
        other_T = x.token_id_T[:T] != y.token_id_T[:T]
        if not np.array_equal(x.ids_BTK[:, :T], y.ids_BTK[:, :T]):
            return
        rows += int(other_T.sum()) * int(x.count_BP.any(1).sum())
    if rows > _CHANCE:
        raise ImportRefused(
            f"{b.path}: rank {b.rank} has the choices of rank {a.rank} for other tokens: with "
            "data-parallel attention and no all-to-all backend SGLang's recorder stores the first "
            f"rank's rows. Import {a.path.name} alone."
        )
