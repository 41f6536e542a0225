"""One line of a Megatron-Core router trace: one layer's choices in one pass of one rank.

The tracer (megatron/core/transformer/moe/router_trace.py, megatron-core 0.19.0) writes a line's
facts first and `top_indices` last, so that a line is understood without reading its choices.

T tokens, K choices, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ImportRefused
from moe_lens.importers.source import Floats, Ints

_CHOICES = b'"top_indices"'
_NUMBERS = ("step", "layer", "rank", "num_tokens", "topk")
_LOGITS = ("logit_offset", "logit_bytes", "logit_shape")


@dataclass(frozen=True, slots=True, order=True)
class Where:
    """A router's place in the model, in the order of the model: the decoder's before others.

    Attributes:
        extra: It is not in the decoder.
        block: "decoder" or "mtp".
        mtp_idx: Of a multi-token prediction head; -1: none.
        layer: Number in its block.
    """

    extra: bool
    block: str
    mtp_idx: int
    layer: int

    def __str__(self) -> str:
        head = f" {self.mtp_idx}" if self.mtp_idx >= 0 else ""
        return f"{self.block}{head} layer {self.layer}"


@dataclass(frozen=True, slots=True)
class Header:
    """What a line says before its choices.

    Attributes:
        step, rank, tokens, top_k: As recorded.
        where: The router.
        logits: Offset of its logits in the sidecar, and E; None: it has none.
    """

    step: int
    where: Where
    rank: int
    tokens: int
    top_k: int
    logits: tuple[int, int] | None

    @property
    def logits_end(self) -> int:
        """Offset behind its logits."""
        return 0 if self.logits is None else self.logits[0] + 2 * self.tokens * self.logits[1]


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines of a file with their numbers, from 1; empty ones are left out.

    Raises:
        ImportRefused: It cannot be read.
    """
    try:
        with path.open("rb") as f:
            for number, line in enumerate(f, 1):
                if not line.isspace():
                    yield number, line
    except OSError as e:
        raise ImportRefused(f"{path} cannot be read: {e.strerror or e}.") from e


def is_torn(line: bytes) -> bool:
    """Whether a line breaks off: the recorder ends each with a newline, in one write."""
    if line.endswith(b"\n"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def split(line: bytes, place: str) -> tuple[Header, bytes]:
    """What a line says, and the text of its choices.

    Args:
        line: One line.
        place: File and line, for errors.

    Raises:
        ImportRefused: It is no record of the tracer.
    """
    at = line.find(_CHOICES)
    if at < 0:
        raise ImportRefused(
            f"{place}: there is no top_indices: this is no line of a Megatron router trace."
        )
    try:
        said = json.loads(line[:at].rstrip().rstrip(b",") + b"}")
        if not isinstance(said, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as e:
        raise ImportRefused(f"{place}: it is no JSON record up to top_indices ({e}).") from e
    for name in _NUMBERS:
        if not _is_count(said.get(name)):
            raise ImportRefused(f"{place}: {name} is {said.get(name)!r}, not a number from 0 on.")
    block, mtp_idx = said.get("block"), said.get("mtp_idx", -1)
    if not isinstance(block, str) or not block:
        raise ImportRefused(f"{place}: block is {block!r}; the tracer names it.")
    if mtp_idx != -1 and not _is_count(mtp_idx):
        raise ImportRefused(f"{place}: mtp_idx is {mtp_idx!r}, not a number from 0 on.")
    header = Header(
        step=said["step"],
        where=Where(block != "decoder", block, mtp_idx, said["layer"]),
        rank=said["rank"],
        tokens=said["num_tokens"],
        top_k=said["topk"],
        logits=_logits(said, place),
    )
    return header, line[at + len(_CHOICES) :].strip()


def choices(header: Header, text: bytes, place: str) -> Ints:
    """`[T, K]`: the choices of a line.

    Args:
        header: What the line says of them.
        text: What follows `"top_indices"`.
        place: File and line, for errors.

    Raises:
        ImportRefused: They are not what the line says, or no table of integers.
    """
    try:
        rows = json.loads(text.removeprefix(b":").removesuffix(b"}"))
    except (ValueError, RecursionError) as e:
        raise ImportRefused(
            f"{place}: top_indices is no JSON list that ends the line ({e})."
        ) from e
    if not isinstance(rows, list) or len(rows) != header.tokens:
        found = f"{len(rows):,} rows" if isinstance(rows, list) else f"{rows!r}"
        raise ImportRefused(
            f"{place}: top_indices has {found}, but num_tokens is {header.tokens:,}."
        )
    if not rows:
        return np.zeros((0, header.top_k), np.int32)
    try:
        ids_TK: NDArray[Any] = np.array(rows)
    except ValueError:
        ids_TK = np.zeros(0)
    if ids_TK.shape != (header.tokens, header.top_k):
        row, wide = next(
            (i, len(x) if isinstance(x, list) else repr(x))
            for i, x in enumerate(rows)
            if not isinstance(x, list) or len(x) != header.top_k or any(map(_is_list, x))
        )
        raise ImportRefused(f"{place}: row {row:,} has {wide} ids, but topk is {header.top_k}.")
    if ids_TK.dtype.kind != "i":
        row, value = next(
            (i, v) for i, x in enumerate(rows) for v in x if type(v) is not int or v >= 1 << 63
        )
        raise ImportRefused(f"{place}: row {row:,} has {value!r}, which is no expert id.")
    return ids_TK.astype(np.int32) if ids_TK.max() < 1 << 31 else ids_TK


def logits(header: Header, sidecar: NDArray[np.uint16]) -> Floats | None:
    """`[T, E]`: the logits of a line, from bfloat16.

    Args:
        header: What the line says of them.
        sidecar: All of `logits_rank*.bin`, two bytes each.
    """
    if header.logits is None:
        return None
    first, experts = header.logits[0] // 2, header.logits[1]
    high = sidecar[first : first + header.tokens * experts]
    return (high.astype(np.uint32) << 16).view(np.float32).reshape(header.tokens, experts)


def _logits(said: dict[str, Any], place: str) -> tuple[int, int] | None:
    values = [said.get(name) for name in _LOGITS]
    if values == [None, None, None]:
        return None
    offset, size, shape = values
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_count, shape)):
        raise ImportRefused(f"{place}: logit_shape is {shape!r}, not [tokens, experts].")
    if shape[0] != said["num_tokens"]:
        raise ImportRefused(
            f"{place}: logit_shape is {shape}, but num_tokens is {said['num_tokens']:,}."
        )
    if size != 2 * shape[0] * shape[1]:
        raise ImportRefused(
            f"{place}: logit_bytes is {size!r}, but {shape} in bfloat16 are "
            f"{2 * shape[0] * shape[1]:,} bytes."
        )
    if not isinstance(offset, int) or not _is_count(offset):
        raise ImportRefused(f"{place}: logit_offset is {offset!r}, not a number from 0 on.")
    return int(offset), int(shape[1])


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_list(value: object) -> bool:
    return isinstance(value, list)
