"""Megatron-Core's router trace: a line of JSON for every layer of every pass, a file for each rank.

Read from `router_trace_rank*.jsonl` and, where they are, `logits_rank*.bin` (bfloat16) and
`router_state_rank*.pt` (experts, score function); `hidden_states_rank*.bin` is no part of a trace.
Layout: megatron/core/transformer/moe/router_trace.py of megatron-core 0.19.0 (and of the versions
before it, which number steps from 0).

`stage` is always "pre_dispatch": the files do not say train from eval, nor prompt from generated.
Validation passes are in the training step that follows them, as further forwards of it.

Layer numbers are those of module names: they begin at 0 in every pipeline stage, and in every
virtual chunk of one. Stages are told apart by rank (`Given.pipeline_stages`: the last dimension of
Megatron's default order, so a stage's ranks follow each other). Virtual chunks cannot be: they look
like further forwards.

T tokens, K choices, E experts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from moe_lens.errors import ImportRefused
from moe_lens.importers.formats._megatron_lines import Where, choices, lines, logits, split
from moe_lens.importers.formats._megatron_state import State, read_state
from moe_lens.importers.formats._megatron_survey import Survey, survey
from moe_lens.importers.source import UNKNOWN_PHASE, Choices, Given, Pass, Rank, Source, Tokens
from moe_lens.trace.meta import LayerInfo

SAYS = "Megatron-Core router trace: a folder with router_trace_rank*.jsonl, or one such file"

_FILE = re.compile(r"router_trace_rank(\d+)\.jsonl")
_MARKS = (b'"step"', b'"stage"', b'"num_tokens"', b'"topk"')

Key = tuple[int, Where]
"""A pipeline stage, and a router in it."""


def recognises(path: Path, head: bytes) -> bool:
    """Whether it is a folder of traces, or a file that begins like one."""
    if path.is_dir():
        return bool(_files(path))
    return head.lstrip().startswith(b"{") and all(mark in head for mark in _MARKS)


def open_source(path: Path, given: Given) -> Source:
    """Open the traces of all ranks, or of one.

    Raises:
        ImportRefused: A file is damaged, ranks are missing or contradict each other, or the number
            of experts or of pipeline stages is known from nowhere.
    """
    paths = [path] if not path.is_dir() else [_files(path)[n] for n in sorted(_files(path))]
    if not paths:
        raise ImportRefused(f"{path} has no file router_trace_rank*.jsonl.")
    notes: Counter[str] = Counter()
    found = _ranks(path, [survey(x, allow_gaps=given.allow_gaps) for x in paths], given, notes)
    stage_of = _stages(path, found, given)
    state = read_state([x.path.with_name(f"router_state_rank{x.rank}.pt") for x in found])
    keys = sorted({(stage_of[x.rank], where) for x in found for where in x.layers})
    top_k = found[0].top_k
    _agree(found[0].path, "topk", top_k, [("--top-k", given.top_k)])
    experts = _experts(found, state, given)
    score = state.score or given.score
    _agree(found[0].path, "score function", score, [("--score", given.score)])
    stages = 1 + max(stage_of.values())
    infos = [
        LayerInfo(
            layer=i,
            path=_path(key, stages),
            experts=experts,
            top_k=top_k,
            block=key[1].layer if stages == 1 and not key[1].extra else None,
            role="mtp" if key[1].block == "mtp" else "mlp",
            adapter="megatron",
            score=score,
            selection_bias=state.bias,
            hidden_size=state.hidden_size or given.hidden_size,
            intermediate_size=given.intermediate_size,
        )
        for i, key in enumerate(keys)
    ]
    number = {key: i for i, key in enumerate(keys)}
    first_of: dict[bytes, int] = {}
    ranks = []
    for x in found:
        layer_of = {where: number[stage_of[x.rank], where] for where in x.layers}
        copy = first_of.setdefault(x.digest, x.rank) != x.rank
        notes["ranks recorded what another did: their counts are left out of sums"] += copy
        notes.update(x.notes)
        ranks.append(Rank(x.rank, _Reader(x, layer_of, given), x.path, copy))
    return Source(
        infos,
        ranks,
        _lacks(found, given, score),
        given.model or "",
        {k: v for k, v in notes.items() if v},
    )


class _Reader:
    """Begins to read a rank; see `Rank.items`."""

    def __init__(self, of: Survey, layer_of: dict[Where, int], given: Given) -> None:
        self._of = of
        self._layer_of = layer_of
        self._length = given.sequence_length

    def __call__(self) -> Iterator[Pass]:
        of = self._of
        sidecar = np.zeros(0, np.uint16)
        if of.logits_bytes:  # what is behind them, nobody speaks of
            at, shape = of.path.with_name(f"logits_rank{of.rank}.bin"), (of.logits_bytes // 2,)
            sidecar = np.memmap(at, "<u2", "r", shape=shape)
        sequences = 0
        kept = (
            (n, split(x, f"{of.path}: line {n}")) for n, x in lines(of.path) if n not in of.skip
        )
        for step, group in groupby(kept, lambda x: x[1][0].step):
            passes: list[Pass] = []
            seen: Counter[Where] = Counter()
            for n, (header, text) in group:
                forward = seen[header.where]
                seen[header.where] += 1
                if forward == len(passes):
                    passes.append(Pass(f"line {n}", step, forward, UNKNOWN_PHASE, {}))
                ids_TK = choices(header, text, f"{of.path}: line {n}")
                made = Choices(ids_TK, logits_TE=logits(header, sidecar))
                passes[forward].choices[self._layer_of[header.where]] = made
            for each in passes:
                if self._length is not None:
                    each.tokens = self._tokens(each, sequences, self._length)
                    sequences += len(each.tokens.sequence_T) // self._length
                yield each

    def _tokens(self, of: Pass, first: int, length: int) -> Tokens:
        """Rows are positions times sequences: Megatron's [S, B] laid flat."""
        T = len(next(iter(of.choices.values())).ids_TK)
        if length < 1 or T % length:
            raise ImportRefused(
                f"{self._of.path}: {of.where}: {T:,} tokens are no whole number of sequences of "
                f"{length:,}: give another --sequence-length, or none."
            )
        row_T = np.arange(T)
        batch = max(T // length, 1)
        return Tokens(sequence_T=first + row_T % batch, position_T=row_T // batch)


def _files(folder: Path) -> dict[int, Path]:
    found = ((_FILE.fullmatch(x.name), x) for x in folder.glob("router_trace_rank*"))
    return {int(m[1]): x for m, x in found if m}


def _ranks(path: Path, all_: list[Survey], given: Given, notes: Counter[str]) -> list[Survey]:
    """The ranks that recorded something, if none is missing."""
    found = [x for x in all_ if x.layers]
    for x in found:
        named = _FILE.fullmatch(x.path.name)
        if named and int(named[1]) != x.rank:
            raise ImportRefused(f"{x.path} says rank {x.rank} in its records: it was renamed.")
    if not found:
        raise ImportRefused(f"{path} holds no record: the tracer writes at the end of a step.")
    if not path.is_dir():
        return found
    numbers = [x.rank for x in found]
    missing = 1 + max(numbers) - len(numbers)
    steps = {x.steps for x in found}
    if (missing or len(found) < len(all_)) and not given.allow_gaps:
        empty = [x.path.name for x in all_ if not x.layers]
        first = next((i for i, n in enumerate(numbers) if n != i), 0)
        what = f"{empty[0]} is empty" if empty else f"there is no router_trace_rank{first}.jsonl"
        raise ImportRefused(f"{path}: {what}: take the other ranks with --allow-gaps.")
    if len(steps) > 1 and not given.allow_gaps:
        other = next(x for x in found if x.steps != found[0].steps)
        raise ImportRefused(
            f"{other.path} has steps {other.steps[0]} to {other.steps[1]}, but rank "
            f"{found[0].rank} has {found[0].steps[0]} to {found[0].steps[1]}: take them as they "
            "are with --allow-gaps."
        )
    notes["ranks are missing or recorded nothing"] += missing
    notes["ranks do not have the same steps"] += len(steps) > 1
    return found


def _stages(path: Path, found: list[Survey], given: Given) -> dict[int, int]:
    """The pipeline stage of each rank."""
    stages = given.pipeline_stages
    if stages is None:
        if len({x.digest for x in found}) > 1:
            raise ImportRefused(
                f"{path}: {len(found)} ranks recorded different choices, and layers are numbered "
                "from 0 in every pipeline stage: say how many stages there are with "
                "--pipeline-stages (1: none)."
            )
        stages = 1
    world = 1 + max(x.rank for x in found)
    if stages < 1 or world % stages or (stages > 1 and len(found) != world):
        raise ImportRefused(
            f"{path}: {len(found)} ranks (0 to {world - 1}) are not of {stages} pipeline stages."
        )
    stage_of = {x.rank: x.rank // (world // stages) for x in found}
    first: dict[int, Survey] = {}
    for x in found:
        like = first.setdefault(stage_of[x.rank], x)
        if odd := set(x.layers) ^ set(like.layers):
            raise ImportRefused(
                f"{x.path}: {min(odd)} is in only one of ranks {like.rank} and {x.rank}, which "
                f"are of one pipeline stage with --pipeline-stages {stages}: give another number."
            )
        _agree(x.path, "topk", x.top_k, [(f"rank {found[0].rank}", found[0].top_k)])
    return stage_of


def _experts(found: list[Survey], state: State, given: Given) -> int:
    said: list[tuple[str, int | None]] = [
        (f"the logits of rank {x.rank}", x.experts) for x in found
    ]
    said += [("the router's weights", state.experts), ("--experts", given.experts)]
    known = [(who, n) for who, n in said if n is not None]
    if not known:
        raise ImportRefused(
            f"{found[0].path} does not say how many experts a layer has (no logits were recorded): "
            "give --experts N or --config config.json."
        )
    who, experts = known[0]
    _agree(found[0].path, f"number of experts of {who}", experts, known[1:])
    return experts


def _agree(path: Path, name: str, value: object, others: Sequence[tuple[str, object]]) -> None:
    for who, other in others:
        if other is not None and other != value:
            raise ImportRefused(f"{path}: {name} is {value}, but {who} says {other}.")


def _path(key: Key, stages: int) -> str:
    stage, where = key
    inner = f"{where.mtp_idx}.mtp_model_layer.layers." if where.mtp_idx >= 0 else ""
    within = f"{where.block}.layers.{inner}{where.layer}"
    return within if stages == 1 else f"stage{stage}.{within}"


def _lacks(found: list[Survey], given: Given, score: str | None) -> dict[str, str]:
    lacks = {
        "weights": "Megatron's tracer records no gate weights",
        "order": "hooks list a token's choices by the experts' numbers, not by their weights",
        "phases": "Megatron's tracer tells neither validation from training nor prompt from answer",
        "virtual stages": "chunks of an interleaved pipeline look like further micro-batches",
        "padding": "Megatron's tracer does not mark padding",
        "token ids": "Megatron's tracer records none",
        "tags": "Megatron's tracer knows of none",
        "times": "Megatron's tracer records none",
    }
    if given.sequence_length is None:
        lacks["sequences"] = (
            "rows are tokens of unknown sequences; --sequence-length tells training"
        )
    if any(x.experts is None for x in found):
        lacks["entropy"] = "it needs logits (--moe-routing-trace-capture-logits)"
    elif score is None:
        lacks["entropy"] = "logits are there, but not how they become probabilities (--score)"
    return lacks
