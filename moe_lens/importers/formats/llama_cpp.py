"""llama.cpp's `moe-trace`: CSV without a header, `layer,expert`, a row for each choice.

The example of ggml-org/llama.cpp pull request 28544 writes, forward by forward and layer by layer,
the ids of the tensor `ffn_moe_topk-<layer>`: the K choices of each token, one token after another,
of one prompt and its greedy continuation. Nothing else is in the file: K and E must be given, and
forwards are told apart by the layers beginning again.

The last layer runs only the tokens whose output is asked for, one of a forward here. A prompt's
forward, in which layers have other numbers of tokens, becomes counts; one of a single token keeps
its choices.

Its first version reads that tensor, a view of the first K columns of all experts in order, as if it
were contiguous, and so writes the whole order of a few tokens in place of the choices of all. Such
a file is known by that no expert occurs twice in E rows, and refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv

from moe_lens.errors import ImportRefused
from moe_lens.importers.source import (
    Choices,
    Counted,
    Given,
    Ints,
    Item,
    Pass,
    Rank,
    Source,
    Tokens,
)
from moe_lens.trace.meta import LayerInfo

SAYS = "llama.cpp's moe-trace (pull request 28544): CSV of layer,expert"

LACKS = {
    "weights": "llama.cpp's moe-trace writes the ids of the experts alone",
    "entropy": "llama.cpp's moe-trace writes no router logits",
    "times": "llama.cpp's moe-trace writes no times",
    "token ids": "llama.cpp's moe-trace writes none",
    "phases": "not in the file: a forward of several tokens is taken as prefill, of one as decode",
    "tokens": "of prompts: llama.cpp runs the last layer for the last token alone, so forwards of "
    "a prompt are counted, not kept token by token",
}
_ROW = re.compile(rb"\d+,\d+\r?\n")
_WORDS = re.compile(rb"[A-Za-z_, ]+\r?\n")
_SOME = 8 << 20
"""Bytes read at a time."""


def recognises(path: Path, head: bytes) -> bool:
    """Lines of two numbers."""
    lines = head.splitlines(keepends=True)[:-1] if len(head) == 4096 else head.splitlines(True)
    return bool(lines) and not path.is_dir() and all(_ROW.fullmatch(x) for x in lines[:16])


def open_source(path: Path, given: Given) -> Source:
    """Open a file.

    Args:
        path: Of the file.
        given: Experts and top-k must be in it.

    Raises:
        ImportRefused: Another file, damaged, or one of them is missing.
    """
    for what, n, option in (
        ("experts", given.experts, "--experts N"),
        ("choices a token", given.top_k, "--top-k K"),
    ):
        if n is None:
            raise ImportRefused(
                f"{path}: rows of layer,expert do not say of how many {what}: give {option}, or "
                "--config with the model's config.json."
            )
    assert given.experts is not None
    assert given.top_k is not None
    file = _File(path, given.experts, given.top_k)
    first = next(file.forwards(None), None)
    if first is None:
        raise ImportRefused(f"{path} has no rows.")
    blocks = [block for block, _ in first[1]]
    if len(blocks) == 1:
        raise ImportRefused(
            f"{path}: rows of a single layer ({blocks[0]}) do not tell forwards apart."
        )
    _check_order(path, first[1], given.experts, given.top_k)
    return Source(
        layers=[
            LayerInfo(
                layer=i,
                path=f"block {block}",
                experts=given.experts,
                top_k=given.top_k,
                block=block,
            )
            for i, block in enumerate(blocks)
        ],
        ranks=[Rank(0, partial(_items, file, blocks), path)],
        lacks=dict(LACKS),
        model=given.model or "",
    )


Runs = list[tuple[int, Ints]]
"""Of one forward: each layer's number and its ids, flat."""


class _File:
    """The rows, forward by forward."""

    def __init__(self, path: Path, experts: int, top_k: int) -> None:
        self.path = path
        self.experts = experts
        self.top_k = top_k

    def forwards(self, blocks: list[int] | None) -> Iterator[tuple[int, Runs]]:
        """The line on which each begins, and its layers.

        Args:
            blocks: The layers that each must have, in order; None: not known yet.

        Raises:
            ImportRefused: A line that is no row, or layers that are not those of a forward.
        """
        line, begun, runs = 1, 1, Runs()
        for layer_N, ids_N in self._rows():
            changes = np.flatnonzero(layer_N[1:] != layer_N[:-1]) + 1
            for layer, ids in zip(
                layer_N[[0, *changes]].tolist(), np.split(ids_N, changes), strict=True
            ):
                if runs and layer == runs[-1][0]:
                    runs[-1] = (layer, np.concatenate([runs[-1][1], ids]))
                else:
                    if runs and layer < runs[-1][0]:
                        yield self._whole(begun, runs, blocks)
                        begun, runs = line, []
                    runs.append((layer, ids))
                line += len(ids)
        if runs:
            yield self._whole(begun, runs, blocks)

    def _whole(self, begun: int, runs: Runs, blocks: list[int] | None) -> tuple[int, Runs]:
        """A forward that has all its layers, and whole tokens in each."""
        line = begun
        for at, (layer, ids) in enumerate(runs):
            if blocks is not None and blocks[at : at + 1] != [layer]:
                due = f"layer {blocks[at]}" if at < len(blocks) else "the next forward"
                raise ImportRefused(
                    f"{self.path}: line {line}: layer {layer}, where {due} should be: lines are "
                    "missing, or another order."
                )
            if len(ids) % self.top_k:
                raise ImportRefused(
                    f"{self.path}: line {line}, layer {layer}: {len(ids)} choices are no multiple "
                    f"of top-{self.top_k}: lines are missing, or the top-k is another."
                )
            line += len(ids)
        if blocks is not None and len(runs) < len(blocks):
            raise ImportRefused(
                f"{self.path}: line {line}: the file ends, or a forward begins, where layer "
                f"{blocks[len(runs)]} should be: it is torn."
            )
        return begun, runs

    def _rows(self) -> Iterator[tuple[Ints, Ints]]:
        """Layers and experts, some lines at a time."""
        try:
            with self.path.open("rb") as f:
                head = f.readline()
                if _WORDS.fullmatch(head):
                    raise ImportRefused(
                        f"{self.path}: line 1 is {head.decode().strip()!r}: this reads llama.cpp's "
                        "own moe-trace, rows of layer,expert without a header. Other tools "
                        "write other columns."
                    )
                f.seek(0)
                yield from self._parsed(f)
        except OSError as e:
            raise ImportRefused(f"{self.path} cannot be read: {e.strerror or e}.") from e

    def _parsed(self, f: BinaryIO) -> Iterator[tuple[Ints, Ints]]:
        line = 1
        while some := f.read(_SOME):
            some += f.readline()
            if not some.endswith(b"\n"):
                number = line + some.count(b"\n")
                raise ImportRefused(
                    f"{self.path}: line {number}: the file ends in the middle of it: it is torn."
                )
            try:
                table = csv.read_csv(
                    pa.BufferReader(some),
                    csv.ReadOptions(column_names=["layer", "expert"], use_threads=False),
                    csv.ParseOptions(ignore_empty_lines=False),
                    csv.ConvertOptions(
                        column_types={"layer": pa.int32(), "expert": pa.int32()}, null_values=[]
                    ),
                )
            except pa.ArrowException as e:
                raise ImportRefused(f"{self.path}: {_bad_line(some, line)}.") from e
            layer_N, ids_N = (table[name].to_numpy() for name in ("layer", "expert"))
            for name, x_N, most in (
                ("layer", layer_N, 1 << 16),
                ("expert", ids_N, self.experts),
            ):
                bad_N = (x_N < 0) | (x_N >= most)
                if bad_N.any():
                    at = int(np.argmax(bad_N))
                    raise ImportRefused(
                        f"{self.path}: line {line + at}: {name} {x_N[at]}"
                        + (f" of {most}: check --experts." if name == "expert" else ".")
                    )
            yield layer_N, ids_N
            line += len(layer_N)


def _bad_line(some: bytes, first: int) -> str:
    for number, text in enumerate(some.splitlines(keepends=True), first):
        if not re.fullmatch(rb"-?\d{1,9},-?\d{1,9}\r?\n", text):
            return (
                f"line {number}: {text[:40].decode(errors='replace').strip()!r} is no layer,expert"
            )
    return f"from line {first} on: no rows of layer,expert"


def _check_order(path: Path, runs: Runs, experts: int, top_k: int) -> None:
    """Refuse whole orders of experts that were taken for choices.

    The first forward has the most tokens. In a whole order no expert occurs twice among E.
    """
    several = [ids for _, ids in runs if len(ids) > top_k]
    if not several:
        return  # the choices of a single token are the first of the order
    for ids in several:
        for begin in range(0, len(ids), experts):
            of = ids[begin : begin + experts]
            if len(np.unique(of)) < len(of):
                return
    raise ImportRefused(
        f"{path}: line 1: no expert is chosen twice among {experts} choices, in any layer of the "
        "prompt: these are the experts in order, not the choices. The first version of moe-trace "
        "writes that (it reads a strided view as contiguous): take a later one, and a longer "
        "prompt."
    )


def _items(file: _File, blocks: list[int]) -> Iterator[Item]:
    """One prompt's forwards: steps that follow each other."""
    position = 0
    most = size = 0
    for step, (line, runs) in enumerate(file.forwards(blocks)):
        where = f"line {line}"
        tokens = [len(ids) // file.top_k for _, ids in runs]
        T = max(tokens)
        most = most or T
        if T > 1 and step and size < most:
            raise ImportRefused(
                f"{file.path}: {where}: {T} tokens at a time after {size}: a second prompt begins "
                "here (import files that were put together one by one), or the top-k is another."
            )
        if most < T or any(n != T for n in tokens[:-1]) or tokens[-1] not in (1, T):
            raise ImportRefused(
                f"{file.path}: {where}: layers of {tokens[:4]}… tokens: lines are missing, or the "
                "top-k is another."
            )
        size = T
        phase = "prefill" if T > 1 else "decode"
        if tokens[-1] == T:
            yield Pass(
                where,
                step,
                0,
                phase,
                {i: Choices(ids.reshape(T, file.top_k)) for i, (_, ids) in enumerate(runs)},
                Tokens(
                    np.zeros(T, np.int64),
                    np.arange(position, position + T),
                    request={0: file.path.stem},
                ),
            )
        else:
            counts: dict[int, Ints] = {}
            for i, (_, ids) in enumerate(runs):
                _check_once(file, line, i, ids)
                counts[i] = np.bincount(ids, minlength=file.experts)
            yield Counted(where, step, 0, phase, counts)
        position += T


def _check_once(file: _File, line: int, layer: int, ids: Ints) -> None:
    """What is only counted further on would not show an expert that a token chooses twice."""
    sorted_TK = np.sort(ids.reshape(-1, file.top_k), axis=1)
    twice_T = (sorted_TK[:, 1:] == sorted_TK[:, :-1]).any(1)
    if twice_T.any():
        of = ids.reshape(-1, file.top_k)[np.argmax(twice_T)].tolist()
        raise ImportRefused(
            f"{file.path}: line {line}, layer {layer}, token {np.argmax(twice_T)}: {of} names an "
            "expert twice: the top-k is another, or lines are missing."
        )
