"""Which sequences of a trace belong together, and which of their tokens are the same content.

The table `sequences` says the first, in a column that the user declared or in its request ids;
token ids say the second, or the user does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.errors import QueryError
from moe_lens.lacking import not_there
from moe_lens.metrics.alignment import Block, blocks_at, common_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moe_lens.metrics.chance import Ints
    from moe_lens.queries.info import RunInfo
    from moe_lens.queries.session import Trace

KEY, VARIANT = "pair", "variant"
"""Columns of `sequences` that name a pair, and order it."""
ALIGN = ("ids", "position", "end")
Align = str | Mapping[str, Sequence[Sequence[int]]]

HOW = (
    "Declare it: moe_lens.record(..., keys=['pair', 'variant']) and rec.step(keys={'pair': [...], "
    "'variant': [...]}); or name request ids: --requests first=second."
)


def named_pairs(
    trace: Trace, run: RunInfo, key: str, variant: str, requests: Sequence[tuple[str, str]]
) -> pd.DataFrame:
    """Which sequences belong together: pair, rank and sequence of a and b, whether variants are."""
    known = _sequences(trace)
    groups = _by_request(known, requests) if requests else _by_key(known, run, key, variant)
    named = [
        {"pair": name, "rank_a": a["rank"], "sequence_a": a["sequence"],
         "rank_b": b["rank"], "sequence_b": b["sequence"],
         "same": variant in b and b[variant] is not None and b[variant] == a[variant]}
        for name, (a, *rest) in groups for b in rest
    ]  # fmt: skip
    return pd.DataFrame(named)


def texts(
    trace: Trace, key: str, requests: Sequence[tuple[str, str]]
) -> dict[tuple[int, int], str]:
    """Of each (rank, sequence) that belongs to a pair: what its pair is called."""
    known = _sequences(trace)
    of_request: dict[str, str] = {}
    for a, b in requests:
        of_request[a] = of_request[b] = of_request.get(a) or of_request.get(b) or a
    if requests:
        named = known["request"].map(of_request)
    elif key in known.columns and key not in _OURS:
        named = known[key]
    else:
        return {}
    known = known[named.notna()]
    return dict(zip(zip(known["rank"], known["sequence"], strict=True),
                    named.dropna().map(str), strict=True))  # fmt: skip


def numbered(rows: pd.DataFrame, of_pair: Mapping[tuple[int, int], str]) -> Ints:
    """Of each sequence, as the rows' `rank` and `sequence` first name it: the number of its text.

    Args:
        rows: Rows of tokens.
        of_pair: Of `texts`; a sequence that is not in it has a text of its own.
    """
    heads = rows.drop_duplicates(["rank", "sequence"])
    where = list(zip(heads["rank"], heads["sequence"], strict=True))
    named = pd.Series([of_pair.get(x, x) for x in where], dtype=object)
    return np.asarray(pd.factorize(named)[0], np.int64)


def _sequences(trace: Trace) -> pd.DataFrame:
    known = trace.table("sequences").df().drop_duplicates(["rank", "sequence"], keep="last")
    return known.sort_values(["rank", "sequence"])


def _by_request(
    known: pd.DataFrame, requests: Sequence[tuple[str, str]]
) -> list[tuple[str, list[dict[str, Any]]]]:
    rows = {str(x["request"]): x for x in known.to_dict("records") if x["request"] is not None}
    for name in (x for pair in requests for x in pair):
        if name not in rows:
            raise QueryError(
                f"No sequence with rows has the request id {name!r} ({len(rows)} have one)."
            )
        if (n := int((known["request"] == name).sum())) > 1:
            raise QueryError(
                f"The request id {name!r} is of {n} sequences: which is meant is not clear. Pair "
                "them by a key of their own (--pair)."
            )
    return [(f"{a}={b}", [_texts(rows[a]), _texts(rows[b])]) for a, b in requests]


def _by_key(
    known: pd.DataFrame, run: RunInfo, key: str, variant: str
) -> list[tuple[str, list[dict[str, Any]]]]:
    own = [x for x in known.columns if x not in _OURS]
    if key not in own:
        there = f" (it has {', '.join(own)})" if own else ""
        how = f": {not_there(run, 'sequences')}." if run.imported else f". {HOW}"
        raise QueryError(f"This trace has no pairs: no column {key!r} of `sequences`{there}{how}")
    if variant not in own and variant != VARIANT:
        raise QueryError(
            f"There is no column {variant!r} of `sequences` to order pairs by (it has "
            f"{', '.join(own)})."
        )
    rows = known[known[key].notna()]
    by = [variant, "rank", "sequence"] if variant in own else ["rank", "sequence"]
    groups = [
        (str(name), [_texts(x) for x in of.to_dict("records")])
        for name, of in rows.sort_values(by).groupby(key) if len(of) > 1
    ]  # fmt: skip
    if not groups:
        raise QueryError(
            f"No two sequences with rows share a value of {key!r}: there is nothing to compare."
            + ("" if run.imported else " Record with tokens=1.0, so that both of a pair are kept.")
        )
    return groups


_OURS = frozenset(
    ("run", "rank", "attempt", "sequence", "step", "forward", "tag", "request", "parent")
)


def _texts(row: dict[Any, Any]) -> dict[str, Any]:
    return {str(k): None if v is None or v != v else v for k, v in row.items()}


def groups(named: pd.DataFrame) -> list[tuple[int, tuple[int, int]]]:
    """Numbers of pairs, the same for all of one value, and their sequences."""
    number = named.groupby("pair", sort=False).ngroup()
    return [
        (int(n), (row[f"rank_{side}"], row[f"sequence_{side}"]))
        for n, row in zip(number, named.to_dict("records"), strict=True) for side in "ab"
    ]  # fmt: skip


def aligned_positions(
    run: RunInfo, named: pd.DataFrame, own: pd.DataFrame, align: Align
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Aligned positions of a stream, and what is said of each pair."""
    has_ids = not own["token_id"].isna().any()
    if align == "ids" and not has_ids:
        how = "record with moe_lens.record(..., token_ids=True), or declare another alignment"
        why = not_there(run, "token ids", otherwise=f"{how}: --align position, end, or blocks")
        raise QueryError(f"Pairs are aligned by token ids, and these rows have none: {why}.")
    if not isinstance(align, str) and (unknown := sorted({*align} - {*named["pair"]})):
        raise QueryError(f"Blocks are given of {unknown[0]!r}, which is no pair that is looked at.")
    known = {
        key: of.sort_values("position") for key, of in own.groupby(["rank", "sequence"])
    }  # fmt: skip
    nothing = own.iloc[:0]
    parts_, said = [], []
    for number, row in enumerate(named.to_dict("records")):
        a, b = (known.get((row[f"rank_{x}"], row[f"sequence_{x}"]), nothing) for x in "ab")
        blocks = _blocks(a, b, row["pair"], align, has_ids)
        whole = _is_whole(blocks, a, b, row["same"]) and (align == "ids" or row["same"])
        # Without ids nothing says where the two begin to differ: each token may be after it.
        from_0 = not isinstance(align, str) or has_ids
        position_a = _positions(blocks, "a")
        parts_.append(pd.DataFrame({
            "number": number, "pair": row["pair"], "same": whole,
            "rank_a": row["rank_a"], "sequence_a": row["sequence_a"],
            "rank_b": row["rank_b"], "sequence_b": row["sequence_b"],
            "position": position_a, "position_b": _positions(blocks, "b"),
            "distance": np.concatenate(
                [np.full(x.size, -1) if from_0 and x.a == x.b == 0 else np.arange(x.size)
                 for x in blocks]
                or [np.empty(0)]).astype(np.int64),
        }))  # fmt: skip
        said.append({**row, "same": whole, "tokens_a": len(a), "tokens_b": len(b),
                     "aligned": len(position_a), "blocks": len(blocks)})  # fmt: skip
    return pd.concat(parts_, ignore_index=True), pd.DataFrame(said)


def _blocks(
    a: pd.DataFrame, b: pd.DataFrame, pair: str, align: Align, has_ids: bool
) -> list[Block]:
    end_a, end_b = (int(x["position"].max()) + 1 if len(x) else 0 for x in (a, b))
    size = min(end_a, end_b)
    shift = end_b - end_a if align == "end" else 0
    if align in ("position", "end") and not has_ids:
        return [Block(max(0, -shift), max(0, shift), size)]
    if isinstance(align, str):
        # Positions without a row are alike nowhere.
        ids_a, ids_b = _filled(a, end_a, -1), _filled(b, end_b, -2)
        return common_blocks(ids_a, ids_b) if align == "ids" else blocks_at(ids_a, ids_b, shift)
    made = []
    for block in align.get(pair, ()):
        if len(block) != 3 or min(block) < 0 or block[0] + block[2] > end_a or (
            block[1] + block[2] > end_b
        ):  # fmt: skip
            raise QueryError(
                f"The pair {pair!r} has {end_a} and {end_b} tokens; a block is [first position in "
                f"the first, first in the second, tokens], got {list(block)}."
            )
        made.append(Block(*block))
    return made


def _filled(rows: pd.DataFrame, end: int, nothing: int) -> Ints:
    out_N = np.full(end, nothing, np.int64)
    out_N[rows["position"].to_numpy(np.int64)] = rows["token_id"].to_numpy(np.int64)
    return out_N


def _positions(blocks: list[Block], side: str) -> NDArray[np.int64]:
    return np.concatenate(
        [getattr(x, side) + np.arange(x.size) for x in blocks] or [np.empty(0)]
    ).astype(np.int64)


def _is_whole(blocks: list[Block], a: pd.DataFrame, b: pd.DataFrame, same: bool) -> bool:
    """All rows of both are one block: from the first token, or of what is said to be the same."""
    if len(blocks) != 1 or not len(a) or not len(b):
        return False
    (block,) = blocks
    begins = {block.a, block.b} == {0} or (same and block.a == block.b)
    rows = a["position"], b["position"]
    return begins and all(
        x.min() >= block.a and x.max() < block.a + block.size for x in rows
    )  # fmt: skip
