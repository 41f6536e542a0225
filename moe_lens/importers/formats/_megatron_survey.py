"""What is in a rank's Megatron router trace, found before any of its choices are believed.

A step has a line for each layer in each of its forwards (micro-batches), in the order in which they
ran; forwards are not numbered, so a layer's n-th line of a step is of forward n. That holds only
when every layer has as many lines, which is what a survey checks. Lines that say again what an
earlier one of their layer and step said are no further forwards: with activation checkpointing the
backward pass runs routers a second time, and the tracer's hooks fire again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path

from moe_lens.errors import ImportRefused
from moe_lens.importers.formats._megatron_lines import Header, Where, is_torn, lines, split

AGAIN = (
    "records that repeat one of their step and layer were left out: computed again in backward, or "
    "the same batch twice"
)
TORN = "the last line of a rank breaks off and was left out"
INCOMPLETE = "steps in which layers are missing were left out"
GAPS = "steps are missing between those that are there"


@dataclass
class Survey:
    """One rank's file.

    Attributes:
        path: The file.
        rank: Its rank.
        layers: Its routers, in the order of the model.
        steps: First and last.
        top_k: K of all its routers.
        experts: E, where logits were recorded.
        logits_bytes: Of the sidecar, that the file speaks of.
        skip: Numbers of lines to leave out.
        digest: Same in two files: the ranks recorded the same.
        notes: What was left out, and how often.
    """

    path: Path
    rank: int = -1
    layers: list[Where] = field(default_factory=list)
    steps: tuple[int, int] = (0, 0)
    top_k: int = 0
    experts: int | None = None
    logits_bytes: int = 0
    skip: set[int] = field(default_factory=set)
    digest: bytes = b""
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Line:
    number: int
    header: Header
    said: int
    """Hash of its choices' text."""


def survey(path: Path, *, allow_gaps: bool) -> Survey:
    """Read what a file has, without its choices.

    Args:
        path: `router_trace_rank*.jsonl`.
        allow_gaps: Leave out what is incomplete, rather than refuse the file.

    Raises:
        ImportRefused: It is damaged, incomplete, or its forwards cannot be told apart.
    """
    out = Survey(path)
    digest = hashlib.blake2b()
    layers = {line.header.where for line in _checked(out, digest, allow_gaps)}
    if not layers:
        return out
    out.digest = digest.digest()
    out.layers = sorted(layers)
    torn = set(out.skip)
    before = None
    for step, group in groupby(_again(path, torn), lambda x: x.header.step):
        if before is None:
            out.steps = (step, step)
        elif step != before + 1:
            if not allow_gaps:
                missing = f"step {before + 1}" + (f" to {step - 1}" if step > before + 2 else "")
                raise ImportRefused(
                    f"{path}: {missing} is missing: take what is there with --allow-gaps."
                )
            out.notes[GAPS] += step - before - 1
        before, out.steps = step, (out.steps[0], step)
        _take_step(out, step, list(group), allow_gaps)
    return out


def _again(path: Path, skip: set[int]) -> Iterator[_Line]:
    for number, line in lines(path):
        if number not in skip:
            header, text = split(line, f"{path}: line {number}")
            yield _Line(number, header, hash(text))


def _checked(out: Survey, digest: hashlib.blake2b, allow_gaps: bool) -> Iterator[_Line]:
    """Lines that agree with those before them in what a file has but one of."""
    before = None
    for number, line in lines(out.path):
        place = f"{out.path}: line {number}"
        if is_torn(line):
            if not allow_gaps:
                raise ImportRefused(
                    f"{place} breaks off (the recorder was killed): take what is before it with "
                    "--allow-gaps."
                )
            out.notes[TORN] += 1
            out.skip.add(number)
            break
        header, text = split(line, place)
        if before is None:
            out.rank, out.top_k = header.rank, header.top_k
            out.experts = header.logits[1] if header.logits else None
        else:
            _same(place, "rank", header.rank, out.rank)
            _same(place, "topk", header.top_k, out.top_k)
            if header.step < before.step:
                raise ImportRefused(
                    f"{place}: step {header.step} after step {before.step}: two recordings in one "
                    "file? Cut them apart."
                )
        if header.logits is not None:
            out.experts = out.experts or header.logits[1]
            _same(place, "experts of the logits", header.logits[1], out.experts)
            _same(place, "logit_offset", header.logits[0], out.logits_bytes)
            out.logits_bytes = header.logits_end
        before = header
        facts = (header.step, header.where, header.tokens, header.logits)
        digest.update(repr(facts).encode())
        digest.update(text)
        yield _Line(number, header, 0)
    if out.logits_bytes:
        _check_sidecar(out.path.with_name(f"logits_rank{out.rank}.bin"), out.logits_bytes)


def _check_sidecar(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as e:
        raise ImportRefused(
            f"{path} cannot be read, where the logits are that the trace speaks of: "
            f"{e.strerror or e}."
        ) from e
    if found < size:
        raise ImportRefused(f"{path} has {found:,} bytes, but the trace speaks of {size:,}.")


def _take_step(out: Survey, step: int, found: list[_Line], allow_gaps: bool) -> None:
    """Find what to leave out of a step; refuse one whose forwards cannot be told apart."""
    of: dict[Where, list[_Line]] = {where: [] for where in out.layers}
    open_: dict[Where, Counter[int]] = {}
    for line in found:
        where = line.header.where
        once = open_.setdefault(where, Counter())
        if line.header.tokens and once[line.said]:
            once[line.said] -= 1
            out.skip.add(line.number)
            out.notes[AGAIN] += 1
            continue
        once[line.said] += 1
        of[where].append(line)
    most, least = (
        max(out.layers, key=lambda x: len(of[x])),
        min(out.layers, key=lambda x: len(of[x])),
    )
    if len(of[most]) != len(of[least]):
        if not allow_gaps:
            raise ImportRefused(
                f"{out.path}: step {step}: {len(of[least])} records of {least}, but "
                f"{len(of[most])} of {most}. The tracer skips passes that drop tokens, and loses "
                "its tail when killed: leave such steps out with --allow-gaps."
            )
        out.skip.update(line.number for line in found)
        out.notes[INCOMPLETE] += 1
        return
    for n in range(len(of[most])):
        in_order = [of[where][n] for where in out.layers]
        for a, b in pairwise(in_order):
            if b.number < a.number:
                raise ImportRefused(
                    f"{out.path}: line {b.number}: {b.header.where} of step {step} before "
                    f"{a.header.where} (line {a.number}): no forward runs so. Routers that choose "
                    "otherwise when computed again in backward cannot be told from new ones."
                )


def _same(place: str, name: str, found: int, before: int) -> None:
    if found != before:
        raise ImportRefused(
            f"{place}: {name} is {found:,}, but must be {before:,} after the lines before."
        )
