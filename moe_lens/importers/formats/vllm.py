"""vLLM's `routed_experts`, as users keep them: .npy files, or JSON and JSONL of whole answers.

vLLM writes no file of its own but the output of `vllm run-batch`. Read here are

- an .npy file, `[tokens, decoder blocks, top-k]`: one request, whose id is the file's name
- JSONL, an answer a line: responses of the OpenAI server, run-batch's output, or objects with the
  fields of a `RequestOutput`
- JSON: one answer, or a list of them (read as a whole: for much data take JSONL)
- a folder of either, in the order of their names

An answer may stand in an object with more: {"request": …, "response": …, "tag": …}, of which the
tag and the request's `routed_experts_prompt_start` are read. `_vllm_answers` has the arrays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ImportRefused
from moe_lens.importers.blocks import Blocks, blocks_of
from moe_lens.importers.formats import _vllm_answers as answers
from moe_lens.importers.source import Given, Item, Rank, Sequence, Source

SAYS = "vLLM --enable-return-routed-experts: .npy arrays, JSON or JSONL of responses, run-batch"

NPY = b"\x93NUMPY"
TEXTS = (".json", ".jsonl")
MAPPED = 16 << 20
"""Bytes of an .npy file above which it is mapped, not read: a mapping holds a descriptor open."""

Found = TypeVar("Found")

LACKS = {
    "weights": "vLLM returns the ids of the experts, no gate weights",
    "entropy": "vLLM returns no router logits",
    "steps": "vLLM returns routing request by request: the forwards that ran them are not known",
    "times": "vLLM returns no time of a forward",
    "tokens of cached prefixes": "no expert ran for them: they are left out, where an answer says "
    "how many they are (vLLM's does not, where it has several choices: each has the whole prompt)",
}
LACKS_OF_ARRAYS = {
    "phases": "an array does not say which of its tokens are prompt",
    "token ids": "an array has none",
    "tags": "an array has none",
}


def recognises(path: Path, head: bytes) -> bool:
    """An .npy file, an answer in JSON, or a folder of them."""
    try:
        if path.is_dir():
            files = _files(path)
            return bool(files) and recognises(files[0], _head(files[0]))
        if head.startswith(NPY):
            return True
        return path.suffix in TEXTS and answers.is_answer(next(_records(path))[1])
    except (OSError, ImportRefused, StopIteration):
        return False


def open_source(path: Path, given: Given) -> Source:
    """Open a file or a folder of files.

    Args:
        path: Of the file, or of the folder.
        given: The experts must be in it; blocks, dense blocks and top-k are checked.

    Raises:
        ImportRefused: It is nothing of vLLM's, is damaged, or the experts are missing.
    """
    files = _files(path) if path.is_dir() else [path]
    if not files:
        raise ImportRefused(f"{path} holds no .npy, .json or .jsonl file.")
    arrays = [_head(x).startswith(NPY) or x.suffix == ".npy" for x in files]
    if any(arrays) and not all(arrays):
        one, other = files[arrays.index(True)], files[arrays.index(False)]
        raise ImportRefused(
            f"{path} holds arrays ({one.name}) and answers ({other.name}): the same requests "
            "twice? Put them into folders of their own."
        )
    notes: dict[str, int] = {}
    if all(arrays):
        shapes = (_array(x, where).shape for x, where in _places(files))
        blocks = _blocks(given, _of(path, shapes), path)
        items = partial(_arrays, files, blocks, given.first_position or 0)
    else:
        blocks = _blocks(given, _of(path, _shapes(files, given)), path)
        items = partial(_answers, files, blocks, given)
        if given.allow_gaps and (failed := sum(_failed(x) for x in _all(files))):
            notes["requests left out, since they failed and have no routing"] = failed
    return Source(
        layers=blocks.layers(given, "vllm"),
        ranks=[Rank(0, lambda: _of(path, items()), path)],
        lacks=LACKS | (LACKS_OF_ARRAYS if all(arrays) else {}),
        model=given.model or "",
        notes=notes,
    )


def _files(folder: Path) -> list[Path]:
    suffixes = (".npy", *TEXTS)
    return sorted(x for x in folder.iterdir() if x.suffix in suffixes and x.is_file())


def _head(path: Path) -> bytes:
    with _opened(path) as f:
        return f.read(len(NPY))


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as e:
        raise ImportRefused(f"{path.name} cannot be read: {e.strerror or e}.") from e


def _blocks(given: Given, shapes: Iterator[tuple[int, ...]], path: Path) -> Blocks:
    shape = next(shapes, None)
    if shape is None:
        raise ImportRefused(f"{path} holds no answer with routing.")
    return blocks_of(given, shape, str(path))


def _of(path: Path, found: Iterator[Found]) -> Iterator[Found]:
    """What is found in a path; errors begin with it."""
    try:
        yield from found
    except ImportRefused as e:
        raise ImportRefused(f"{path}: {e}") from e


# -- arrays ----------------------------------------------------------------------------------------


def _arrays(files: list[Path], blocks: Blocks, first_position: int) -> Iterator[Item]:
    for path, where in _places(files):
        ids_TLK = blocks.take(_array(path, where), where)
        yield Sequence(where, ids_TLK, first_position, request=path.stem)


def _places(files: list[Path]) -> Iterator[tuple[Path, str]]:
    """Arrays, and what they are called in errors, after the path that was opened."""
    return ((x, x.name if len(files) > 1 else "array") for x in files)


def _array(path: Path, where: str) -> NDArray[Any]:
    head = _head(path)
    if head != NPY:
        what = "an .npz archive: save its arrays as .npy files" if head[:2] == b"PK" else "no .npy"
        raise ImportRefused(f"{where} is {what}.")
    try:
        mapped = os.stat(path).st_size > MAPPED
        found: NDArray[Any] = np.load(path, allow_pickle=False, mmap_mode="r" if mapped else None)
    except OSError as e:
        raise ImportRefused(f"{where} cannot be read: {e.strerror or e}.") from e
    except answers.DAMAGED as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ImportRefused(f"{where} is no whole .npy file ({reason}).") from e
    return found


# -- answers ---------------------------------------------------------------------------------------


def _answers(files: list[Path], blocks: Blocks, given: Given) -> Iterator[Item]:
    seen: set[str] = set()
    for where, said in _all(files):
        try:
            found = answers.sequences(said, blocks, where, prompt_start=given.first_position)
        except answers.NoRouting as e:
            if given.allow_gaps:
                continue
            raise ImportRefused(f"{e} Leave such requests out with --allow-gaps.") from e
        for sequence in found:
            if sequence.request is not None and sequence.request in seen:
                raise ImportRefused(
                    f"{where}: request {sequence.request} for the second time: its tokens would "
                    "be counted twice."
                )
            if sequence.request is not None:
                seen.add(sequence.request)
            yield sequence


def _shapes(files: list[Path], given: Given) -> Iterator[tuple[int, ...]]:
    for where, said in _all(files):
        try:
            found = answers.shape(said, where)
        except answers.NoRouting as e:
            if given.allow_gaps:
                continue
            raise ImportRefused(f"{e} Leave such requests out with --allow-gaps.") from e
        if found is not None:
            yield found


def _failed(record: tuple[str, Mapping[str, Any]]) -> bool:
    try:
        answers.shape(record[1], record[0])
    except answers.NoRouting:
        return True
    return False


def _all(files: list[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path in files:
        for place, said in _records(path):
            where = f"{path.name}, {place}" if len(files) > 1 else place
            if not answers.is_answer(said):
                raise ImportRefused(
                    f"{where}: no answer of vLLM with routed_experts: {answers.SERVED}"
                )
            yield where, said


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """What a JSON or JSONL file holds, and where."""
    with _opened(path) as f:
        first = f.readline()
        whole = first.lstrip().startswith(b"[") or not _is_json(first)
        f.seek(0)
        if whole and path.suffix != ".jsonl":
            said = _json(f.read(), path.name)
            if isinstance(said, list):
                yield from ((f"record {i}", x) for i, x in enumerate(said))
            else:
                yield "record 0", said
            return
        for number, line in enumerate(f, 1):
            if line.strip():
                torn = "" if line.endswith(b"\n") else ": the file ends in the middle of it"
                yield f"line {number}", _json(line, f"line {number}", torn)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json(text: bytes, where: str, torn: str = "") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        reason = " ".join(str(e).split())
        raise ImportRefused(f"{where} is no JSON ({reason[:120]}){torn}.") from e
