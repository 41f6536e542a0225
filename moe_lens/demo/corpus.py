"""What does the demo train on, and what is held out?

Each domain is split **by document** (file, help topic, or region of the one JavaScript file), in
the order of a hash of the document's name: what is held out depends on what is installed and on
nothing else, not on the seed. Documents that repeat others are left out first, since a held-out
copy of a training text would measure memory: a third of the help topics are chapters of longer
ones, and headers come in one version per vector width. Both sides are bounded, so that loading
takes a second or two.
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
_LONGEST_TRAIN = 64 * 1024
_LONGEST_HELD_OUT = 16 * 1024
_SHORTEST_SIDE = 4_096
_COPIED_SHARE = 0.2
_TELLING_LINE = 20


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
    """Split documents into training and held-out text, copies left out.

    The first documents in hash order, up to a tenth of the text and ``held_out_bytes``, are held
    out; those that follow are for training, up to ``train_bytes``. Long documents are cut (at
    16 KiB where held out, at 64 KiB for training), so that neither side is a few documents' text.
    """
    in_order = sorted(documents, key=lambda document: _hash(document[0]))
    total = sum(len(text) for _, text in in_order)
    # Twice of what is needed, since looking for copies in all of it would take seconds.
    enough, _ = _take(in_order, 2 * (train_bytes + held_out_bytes), _LONGEST_TRAIN)
    own = without_copies(enough)
    limit = min(held_out_bytes, int(HELD_OUT_SHARE * _size(own)))
    held_out, rest = _take(own, limit, _LONGEST_HELD_OUT)
    train, _ = _take(rest, train_bytes, _LONGEST_TRAIN)
    if min(_size(held_out), _size(train)) < _SHORTEST_SIDE:
        raise missing(tag, f"its text ({total} bytes found)")
    return Domain(
        tag=tag,
        train=_join(train),
        held_out=_join(held_out),
        train_names=tuple(name for name, _ in train),
        held_out_names=tuple(name for name, _ in held_out),
    )


def without_copies(documents: Sequence[Document]) -> list[Document]:
    """Leave out documents that repeat longer ones, and keep the others in their order.

    A document is left out if more than a fifth of its text is lines (of 20 bytes or more) that a
    longer document, which is kept, has too.
    """
    kept: set[str] = set()
    seen: set[bytes] = set()
    for name, text in sorted(documents, key=lambda document: (-len(document[1]), document[0])):
        lines = [line for line in text.splitlines() if len(line) >= _TELLING_LINE]
        copied = sum(len(line) for line in lines if line in seen)
        if copied <= _COPIED_SHARE * sum(len(line) for line in lines):
            kept.add(name)
            seen.update(lines)
    return [document for document in documents if document[0] in kept]


def _take(
    documents: Sequence[Document], limit: int, longest: int
) -> tuple[Sequence[Document], Sequence[Document]]:
    """Documents from the front, cut at ``longest``, until they reach ``limit``; and the rest."""
    taken: list[Document] = []
    size = 0
    for name, text in documents:
        if size >= limit:
            break
        taken.append((name, text[:longest]))
        size += len(taken[-1][1])
    return taken, documents[len(taken) :]


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _size(documents: Sequence[Document]) -> int:
    return sum(len(text) for _, text in documents)


def _join(documents: Sequence[Document]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(text for _, text in documents), dtype=np.uint8)
