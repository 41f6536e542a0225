"""The passes of one rank's file of SGLang's recorder, as the writer takes them.

B decoder blocks, L those with experts, T tokens of a pass, K choices, S slots for them, P physical
and E logical experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ImportRefused
from moe_lens.importers.formats._sglang_file import (
    DECODE,
    EXTEND,
    SPLIT_PREFILL,
    TARGET_VERIFY,
    RankFile,
    Record,
)
from moe_lens.importers.source import UNKNOWN_PHASE, Choices, Counted, Item, Pass, Tokens

_PHASES = {
    EXTEND: "prefill",
    SPLIT_PREFILL: "prefill",
    DECODE: "decode",
    TARGET_VERIFY: "decode",
}
"""Of forward modes whose tokens are all of one phase."""


def counts_of(file: RankFile, blocks: list[int], top_k: int) -> Iterator[Item]:
    """The passes of mode per_pass; `top_k` is not looked at."""
    for r in file.records:
        count_BE = file.logical(r.count_BP)
        by_layer = {i: count_BE[b] for i, b in enumerate(blocks)}
        yield Counted(r.where, r.number, 0, UNKNOWN_PHASE, by_layer)


def passes_of(file: RankFile, blocks: list[int], top_k: int) -> Iterator[Item]:
    """The passes of mode per_token.

    Args:
        file: Its records are read one by one.
        blocks: Decoder blocks that have experts.
        top_k: K.

    Raises:
        ImportRefused: Ids that are out of range, missing, or not as many as the record counts; or
            that the last map makes one expert twice of.
    """
    sequences = 0
    identity = (file.map_BP == np.arange(file.map_BP.shape[1])).all()
    for r in file.records:
        if not len(r.token_id_T):
            continue
        ids_LTK = _checked(r, file, blocks, top_k)
        if not identity:
            ids_LTK = _logical(ids_LTK, r, file, blocks)
        tokens, sequences = _tokens(r, sequences)
        choices = {i: Choices(ids_TK) for i, ids_TK in enumerate(ids_LTK)}
        yield Pass(r.where, r.number, 0, _PHASES.get(r.mode, UNKNOWN_PHASE), choices, tokens)


def _checked(r: Record, file: RankFile, blocks: list[int], top_k: int) -> NDArray[Any]:
    """`[L, T, K]`: physical ids, which are as many of each as the record counts."""
    assert r.ids_BTK is not None
    B, P = r.count_BP.shape
    ids_BTS: NDArray[Any] = r.ids_BTK
    place = f"{file.path}: {r.where}"
    bad = (ids_BTS < -1) | (ids_BTS >= P)
    if bad.any():
        b, t, s = (int(x) for x in np.argwhere(bad)[0])
        raise ImportRefused(
            f"{place}, block {b}, token {t}: physical expert {int(ids_BTS[b, t, s])} of {P}."
        )
    ids_LTK = ids_BTS[blocks][:, :, :top_k]
    if (ids_LTK < 0).any():
        at, t, _ = (int(x) for x in np.argwhere(ids_LTK < 0)[0])
        raise ImportRefused(
            f"{place}, block {blocks[at]}, token {t}: fewer than {top_k} choices (-1)."
        )
    # Slot P takes what is no choice.
    cell_BTS = np.where(ids_BTS < 0, P, ids_BTS) + (np.arange(B) * (P + 1))[:, None, None]
    count_BP = np.bincount(cell_BTS.ravel(), minlength=B * (P + 1)).reshape(B, P + 1)[:, :P]
    if not np.array_equal(count_BP, r.count_BP):
        b, e = (int(x) for x in np.argwhere(count_BP != r.count_BP)[0])
        raise ImportRefused(
            f"{place}, block {b}: {int(count_BP[b, e])} tokens chose physical expert {e}, but its "
            f"global_physical_count is {int(r.count_BP[b, e])}: the file is damaged."
        )
    return ids_LTK


def _logical(
    ids_LTK: NDArray[Any], r: Record, file: RankFile, blocks: list[int]
) -> NDArray[np.int64]:
    map_LP = file.map_BP[blocks]
    logical_LTK: NDArray[np.int64] = map_LP[np.arange(len(blocks))[:, None, None], ids_LTK]
    if map_LP.shape[1] > file.experts:
        sorted_LTK = np.sort(logical_LTK, axis=2)
        twice_LT = (sorted_LTK[:, :, 1:] == sorted_LTK[:, :, :-1]).any(2)
        if twice_LT.any():
            at, t = (int(x) for x in np.argwhere(twice_LT)[0])
            raise ImportRefused(
                f"{file.path}: {r.where}, block {blocks[at]}, token {t}: physical experts "
                f"{ids_LTK[at, t].tolist()} are {logical_LTK[at, t].tolist()} by the file's last "
                "map: one twice, which no router does. Experts were moved during the recording."
            )
    return logical_LTK


def _tokens(r: Record, sequences: int) -> tuple[Tokens | None, int]:
    """Whose tokens these are, and the number of the next sequence."""
    T = len(r.token_id_T)
    if r.lengths is not None:
        pieces = [n for n in r.lengths if n]
    elif r.mode == DECODE:
        pieces = [1] * T
    else:
        return None, sequences
    sequence_T = np.repeat(np.arange(sequences, sequences + len(pieces)), pieces)
    return Tokens(sequence_T, r.position_T, r.token_id_T), sequences + len(pieces)
