"""What does the demo train on, and what is held out?

Each domain is split **by document** (file, help topic, or region of the one JavaScript file), in
the order of a hash of the document's name: the same documents are held out on every machine, in
every run, whatever the seed, and a document that comes or goes moves no other. Both sides are
bounded, so that loading takes about a second.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.demo.sources import SOURCES, Document, missing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

HELD_OUT_SHARE = 0.1
TRAIN_BYTES = 2_000_000
HELD_OUT_BYTES = 100_000
_LONGEST_DOCUMENT = 16 * 1024
_SHORTEST_SIDE = 4_096


@dataclass(frozen=True, kw_only=True)
class Domain:
    """The text of one domain.

    Attributes:
        tag: Name of the domain, the tag of its sequences in the trace.
        train: uint8 [bytes], the training documents one after the other.
        held_out: uint8 [bytes], the held-out documents one after the other.
        train_names: Documents that ``train`` was read from.
        held_out_names: Documents that ``held_out`` was read from; none is a training document.
    """

    tag: str
    train: NDArray[np.uint8]
    held_out: NDArray[np.uint8]
    train_names: tuple[str, ...]
    held_out_names: tuple[str, ...]


def load_corpus() -> list[Domain]:
    """Read the four domains of this installation.

    Raises:
        CommandError: A domain has no text here, or too little to split.
    """
    return [split(tag, documents()) for tag, documents in SOURCES.items()]


def split(
    tag: str,
    documents: Iterable[Document],
    train_bytes: int = TRAIN_BYTES,
    held_out_bytes: int = HELD_OUT_BYTES,
) -> Domain:
    """Split documents into training and held-out text.

    The first documents in hash order, up to a tenth of the text and ``held_out_bytes``, are held
    out; those that follow are for training, up to ``train_bytes``. Long documents are cut at
    16 KiB, so that no side is one document's text.
    """
    in_order = sorted(documents, key=lambda document: _hash(document[0]))
    cut = [(name, text[:_LONGEST_DOCUMENT]) for name, text in in_order]
    total = sum(len(text) for _, text in cut)
    limit = min(held_out_bytes, int(HELD_OUT_SHARE * total))
    held_out, rest = _take(cut, limit)
    train, _ = _take(rest, train_bytes)
    if min(_size(held_out), _size(train)) < _SHORTEST_SIDE:
        raise missing(tag, f"its text ({total} bytes found)")
    return Domain(
        tag=tag,
        train=_join(train),
        held_out=_join(held_out),
        train_names=tuple(name for name, _ in train),
        held_out_names=tuple(name for name, _ in held_out),
    )


def _take(
    documents: Sequence[Document], limit: int
) -> tuple[Sequence[Document], Sequence[Document]]:
    """Documents from the front until they reach ``limit`` bytes, and the rest."""
    size = 0
    for count, (_, text) in enumerate(documents):
        if size >= limit:
            return documents[:count], documents[count:]
        size += len(text)
    return documents, []


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _size(documents: Sequence[Document]) -> int:
    return sum(len(text) for _, text in documents)


def _join(documents: Sequence[Document]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(text for _, text in documents), dtype=np.uint8)
