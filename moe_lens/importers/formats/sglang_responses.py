"""Routed experts in SGLang's responses (`--enable-return-routed-experts`, sglang 0.5.23).

A file of JSON (one response, or a list) or of JSON lines. A response is what `/generate` returns,
or `/v1/chat/completions` and `/v1/completions`; `_sglang_response` says where in it the ids are.
They are of all tokens of a request but the last, which never ran: rows of `[B, K]` for positions
`[start, prompt_tokens + completion_tokens - 1)` (srt/state_capturer/base.py, line 155), logical
ids, zeros in decoder blocks without experts. SGLang itself warns only if rows are missing
(srt/managers/scheduler_components/batch_result_processor.py, line 163); here that is refused.

T tokens of a response, B decoder blocks, L those with experts, K choices.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from moe_lens.errors import ImportRefused
from moe_lens.importers.blocks import Blocks, blocks_of
from moe_lens.importers.formats._sglang_response import Response, responses_of
from moe_lens.importers.source import Given, Ints, Item, Rank, Sequence, Source

SAYS = "SGLang's responses with routed_experts: JSON or JSON lines of /generate or the OpenAI API"

_LACKS = {
    "weights": "SGLang's responses hold no gate weights",
    "entropy": "SGLang's responses hold no logits",
    "times": "SGLang's responses do not say when a pass ran",
    "last tokens": "the last token of a request never runs through the model: it has no choices",
    "tokens of cached prefixes": "no expert ran for them: they are left out, where an answer says "
    "how many they are",
}
_NO_TOKEN_IDS = {
    "token ids": "the responses do not hold the ids of prompt tokens (ask for prompt_token_ids)"
}
_LOOK = 1 << 20


def recognises(path: Path, head: bytes) -> bool:
    """Whether it is JSON with the words that SGLang alone uses, in its first MiB."""
    if head.lstrip()[:1] not in (b"{", b"["):
        return False
    try:
        with path.open("rb") as f:
            text = f.read(_LOOK)
    except OSError:
        return False
    return b'"meta_info"' in text or b'"sglext"' in text


def open_source(path: Path, given: Given) -> Source:
    """Open a file of responses.

    Args:
        path: The file.
        given: `experts` is needed, and `top_k` or `blocks`; `dense_blocks` if there are any;
            `first_position` if the responses were asked for with a routed_experts_start_len.

    Raises:
        ImportRefused: Damaged, rows are missing, or a fact is; says where.
    """
    if given.experts is None:
        raise ImportRefused(
            f"{path}: responses do not say how many experts a layer has: give --experts or "
            "--config config.json."
        )
    if given.top_k is None and given.blocks is None:
        raise ImportRefused(
            f"{path}: responses do not say how many experts a token chooses: give --top-k or "
            "--config config.json."
        )
    first = next((r for r in _responses(path) if _rows(r, given, path)), None)
    if first is None:
        raise ImportRefused(f"{path} holds no response with a token.")
    notes = {}
    if given.top_k is None or given.blocks is None:
        given = _shape(first, given, path)
        notes[
            f"{given.blocks} blocks and top-{given.top_k} made out of the size of the first "
            "response: rows missing in it would not show, if it is the only one"
        ] = 1
    return Source(
        layers=_blocks(given, str(path)).layers(given, "sglang"),
        ranks=[Rank(0, lambda: _sequences(path, given), path)],
        lacks=_LACKS | (_NO_TOKEN_IDS if first.token_id_T is None else {}),
        model=given.model or "",
        notes=notes,
    )


def _rows(r: Response, given: Given, path: Path) -> int:
    """Rows that a response must have."""
    start = given.first_position or 0
    if not 0 <= start <= r.prompt_tokens:
        raise ImportRefused(
            f"{path}: {r.where}: {r.prompt_tokens} prompt tokens, but positions from {start} on "
            "were given (--first-position): SGLang refuses such a request."
        )
    return max(0, r.prompt_tokens + r.completion_tokens - 1 - start)


def _shape(first: Response, given: Given, path: Path) -> Given:
    """`given` with the blocks or the top-k that the first response's size leaves open."""
    rows, ids = _rows(first, given, path), first.ids
    known = given.top_k or given.blocks or 1
    a_row, over = divmod(len(ids), rows)
    if over or not a_row or a_row % known:
        raise ImportRefused(
            f"{path}: {first.where}: {len(ids):,} ids are not {rows:,} rows "
            f"({_sum_of(first, given)}) of a multiple of {known}."
        )
    if given.top_k is None:
        return replace(given, top_k=a_row // known)
    return replace(given, blocks=a_row // known)


def _blocks(given: Given, where: str) -> Blocks:
    return blocks_of(given, (1, given.blocks or 1, given.top_k or 1), where)


def _sequences(path: Path, given: Given) -> Iterator[Item]:
    seen: set[str] = set()
    for r in _responses(path):
        if r.request is not None and r.request in seen:
            raise ImportRefused(
                f"{path}: {r.where}: request {r.request} for the second time: its tokens would be "
                "counted twice."
            )
        if r.request is not None:
            seen.add(r.request)
        yield sequence_of(r, given, path)


def sequence_of(r: Response, given: Given, path: Path) -> Sequence:
    """One response's tokens; `given` has the blocks and the top-k.

    Raises:
        ImportRefused: Rows are missing, or a block that is given as dense has choices.
    """
    start = given.first_position or 0
    where = f"{path}: {r.where}"
    ids_TLK = _blocks(given, where).take(_ids(r, given, path), where)
    first = max(start, r.cached)
    ids_TLK = ids_TLK[first - start :]
    T = len(ids_TLK)
    return Sequence(
        where=r.where,
        ids_TLK=ids_TLK,
        first_position=first,
        prompt_tokens=min(r.prompt_tokens - first, T),
        token_id_T=None if r.token_id_T is None else r.token_id_T[first : first + T],
        request=r.request,
    )


def _ids(r: Response, given: Given, path: Path) -> Ints:
    """`[T, B, K]`, as many rows as the request has tokens that ran."""
    B, K, rows = given.blocks or 1, given.top_k or 1, _rows(r, given, path)
    found, over = divmod(len(r.ids), B * K)
    if over:
        raise ImportRefused(
            f"{path}: {r.where}: {len(r.ids):,} ids are no whole rows of {B} blocks and top-{K}."
        )
    if found != rows:
        raise ImportRefused(
            f"{path}: {r.where}: {found:,} rows, but {rows:,} tokens ran "
            f"({_sum_of(r, given)}). If it was asked for with a routed_experts_start_len, say "
            "--first-position; else SGLang lost rows."
        )
    return r.ids.reshape(rows, B, K)


def _sum_of(r: Response, given: Given) -> str:
    start = f" - {given.first_position}" if given.first_position else ""
    return f"{r.prompt_tokens} + {r.completion_tokens} - 1{start}"


def _responses(path: Path) -> Iterator[Response]:
    """The responses of a file, one after another.

    Raises:
        ImportRefused: A part of it is no JSON, or no response with routed experts.
    """
    first = True
    with _opened(path) as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            found = _parsed(line)
            if found is None and first:
                break
            first = False
            if found is None:
                raise ImportRefused(
                    f"{path}: line {number} is no whole JSON ({len(line):,} bytes): torn?"
                )
            many = isinstance(found, list)
            for i, raw in enumerate(found if many else [found]):
                where = f"line {number}, response {i}" if many else f"line {number}"
                yield from responses_of(raw, where, path)
        else:
            return
    yield from _whole(path)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as e:
        raise ImportRefused(f"{path} cannot be read: {e.strerror or e}.") from e


def _whole(path: Path) -> Iterator[Response]:
    """The responses of a file that is one JSON over many lines."""
    try:
        with _opened(path) as f:
            found = json.load(f)
    except (ValueError, RecursionError) as e:
        raise ImportRefused(
            f"{path} is no whole JSON ({e}), and its first line is none either: torn?"
        ) from e
    for i, raw in enumerate(found if isinstance(found, list) else [found]):
        yield from responses_of(raw, f"response {i}", path)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
