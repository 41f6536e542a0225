"""TensorRT-LLM's ExpertStatistic: counts of each expert by iteration and layer, a file a rank.

`EXPERT_STATISTIC_ITER_RANGE=100-200` writes `rank{N}.safetensors`, one array of E counts under each
key "{iteration}_{layer}", and rank 0 `meta_info.json` (tensorrt_llm/_torch/expert_statistic.py). A
rank counts the choices of the tokens it routes, of all experts: with attention data parallelism its
own, without it everybody's, so that ranks are copies of each other.

Where a load balancer ran, the counts are of slots, not of experts (fused_moe_*.py: "the statistics
are collected from expert slot IDs"), and `num_experts` is the number of slots: the files do not say
which experts those hold.

Some branches also write each token's choices (`rank{N}_raw`, `token_selected_experts_rank{N}`),
which are not read here: the counts are the same.

E experts, K choices of a token.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from moe_lens.errors import ImportRefused
from moe_lens.importers.source import UNKNOWN_PHASE, Counted, Given, Ints, Rank, Source
from moe_lens.trace.meta import LayerInfo

SAYS = "TensorRT-LLM ExpertStatistic: the folder with rank*.safetensors and meta_info.json"

_FILE = re.compile(r"rank(\d+)\.safetensors")
_KEY = re.compile(r"(0|[1-9]\d{0,17})_(0|[1-9]\d{0,17})")
_META = "meta_info.json"
_SLOTS = "a load balancer's slots were counted, and the files do not say which experts they hold"


@dataclass(frozen=True)
class _File:
    """What a rank's file has.

    Attributes:
        path: The file.
        rank: Its rank.
        layers: Blocks, in order.
        steps: Iterations, in order.
        digest: Same in two files: the ranks counted the same.
    """

    path: Path
    rank: int
    layers: tuple[int, ...]
    steps: tuple[int, ...]
    digest: bytes


def recognises(path: Path, head: bytes) -> bool:
    """Whether it is a folder of counts; one rank's file is one of them when its folder is."""
    if not path.is_dir():
        return bool(_FILE.fullmatch(path.name)) and (path.parent / _META).exists()
    return any(path.glob(_META)) and any(_FILE.fullmatch(x.name) for x in path.glob("rank*"))


def open_source(path: Path, given: Given) -> Source:
    """Open the counts of all ranks.

    Raises:
        ImportRefused: A file is damaged, ranks or iterations are missing or contradict each other,
            or the number of experts is not the model's.
    """
    if not path.is_dir():
        raise ImportRefused(f"{path}: name the folder: {_META} and the other ranks are part of it.")
    experts, top_k = _meta(path / _META, given)
    paths = {int(m[1]): x for x in path.glob("rank*") if (m := _FILE.fullmatch(x.name))}
    if not paths:
        raise ImportRefused(f"{path} has no file rank*.safetensors.")
    files = [_survey(paths[n], n, experts, given) for n in sorted(paths)]
    notes: Counter[str] = Counter()
    _check_ranks(path, files, given, notes)
    blocks = sorted({x for file in files for x in file.layers})
    first_of: dict[bytes, int] = {}
    ranks = []
    for file in files:
        copy = first_of.setdefault(file.digest, file.rank) != file.rank
        notes["ranks counted what another did: they are left out of sums"] += copy
        ranks.append(Rank(file.rank, _Reader(file, blocks), file.path, copy))
    infos = [
        LayerInfo(
            layer=i,
            path=f"model.layers.{block}.mlp",
            experts=experts,
            top_k=top_k,
            block=block,
            role="mlp" if given.blocks is None or block < given.blocks else "mtp",
            adapter="tensorrt-llm",
            hidden_size=given.hidden_size,
            intermediate_size=given.intermediate_size,
        )
        for i, block in enumerate(blocks)
    ]
    why = "TensorRT-LLM counts choices and keeps no token"
    lacks = {
        "tokens": why,
        "weights": why,
        "entropy": why,
        "sequences": why,
        "token ids": why,
        "tags": why,
        "phases": "an iteration is one batch of prompts and generated tokens",
        "times": "TensorRT-LLM records none",
        "padding": "dummy requests of idle attention-parallel ranks are counted",
    }
    if given.experts is None:
        lacks["logical experts"] = (
            "with a load balancer the counts are of its slots (--experts tells)"
        )
    return Source(infos, ranks, lacks, given.model or "", {k: n for k, n in notes.items() if n})


class _Reader:
    """Begins to read a rank; see `Rank.items`."""

    def __init__(self, of: _File, blocks: list[int]) -> None:
        self._of = of
        self._layer_of = {block: blocks.index(block) for block in of.layers}

    def __call__(self) -> Iterator[Counted]:
        with _opened(self._of.path) as file:
            for step in self._of.steps:
                count_E = {
                    layer: file.get_tensor(f"{step}_{block}")
                    for block, layer in self._layer_of.items()
                }
                yield Counted(f"iteration {step}", step, 0, UNKNOWN_PHASE, count_E)


def _meta(path: Path, given: Given) -> tuple[int, int]:
    """E and K."""
    said: Any = None
    if path.exists() or given.experts is None or given.top_k is None:
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise ImportRefused(
                f"{path} cannot be read ({e.strerror or e}): rank 0 writes it; or give --experts "
                "and --top-k."
            ) from e
        except (ValueError, RecursionError) as e:
            raise ImportRefused(
                f"{path} is no JSON ({e}): remove it and give --experts and --top-k."
            ) from e
        if said is None:
            raise ImportRefused(f"{path} is null: rank 0 recorded nothing.")
        if not isinstance(said, dict):
            raise ImportRefused(f"{path} is no object, but a {type(said).__name__}.")
    found = []
    for name, option, mine in (
        ("num_experts", "--experts", given.experts),
        ("num_experts_per_token", "--top-k", given.top_k),
    ):
        value = mine if said is None else said.get(name, mine)
        if type(value) is not int or value < 1:
            raise ImportRefused(
                f"{path}: {name} is {value!r}, not a number from 1 on: give {option}."
            )
        if mine is not None and value != mine:
            slots = name == "num_experts" and value > mine
            raise ImportRefused(
                f"{path}: {name} is {value}, but {option} says {mine}"
                + (f": {_SLOTS}. Record without one." if slots else ".")
            )
        found.append(value)
    return found[0], found[1]


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except OSError as e:
        raise ImportRefused(f"{path} cannot be read: {e.strerror or e}.") from e
    except SafetensorError as e:
        raise ImportRefused(f"{path} is no whole safetensors file ({e}).") from e


def _survey(path: Path, rank: int, experts: int, given: Given) -> _File:
    """What a rank's file has, if no layer or iteration is missing in it."""
    has: dict[int, set[int]] = {}
    digest = hashlib.blake2b()
    with _opened(path) as file:
        for key in sorted(file.keys()):
            match = _KEY.fullmatch(key)
            if match is None:
                raise ImportRefused(f"{path}: key {key!r} is no iteration_layer: another file?")
            try:
                count_E: Ints = file.get_tensor(key)
            except TypeError as e:  # of a type that numpy has not, as bfloat16
                raise ImportRefused(f"{path}: key {key!r} holds no integers ({e}).") from e
            if count_E.dtype.kind != "i" or count_E.shape != (experts,):
                raise ImportRefused(
                    f"{path}: key {key!r} is {count_E.dtype} of {list(count_E.shape)}, not "
                    f"integers of {experts} experts ({_META})."
                )
            has.setdefault(int(match[1]), set()).add(int(match[2]))
            digest.update(key.encode() + count_E.astype("<i8").tobytes())
    if not has:
        raise ImportRefused(
            f"{path} holds no counts: no iteration ran in the range, or in a graph."
        )
    layers = set().union(*has.values())
    for step, ran in sorted(has.items()):
        if missing := layers - ran:
            raise ImportRefused(f"{path}: iteration {step} has no layer {min(missing)}.")
    steps = sorted(has)
    gap = next((a + 1 for a, b in pairwise(steps) if b > a + 1), None)
    if gap is not None and not given.allow_gaps:
        raise ImportRefused(
            f"{path}: iteration {gap} is missing between {steps[0]} and {steps[-1]}: take what "
            "is there with --allow-gaps."
        )
    return _File(path, rank, tuple(sorted(layers)), tuple(steps), digest.digest())


def _check_ranks(path: Path, files: list[_File], given: Given, notes: Counter[str]) -> None:
    """Refuse ranks that are not of one run: of pipeline stages, if their layers differ."""
    stages: dict[tuple[int, ...], list[_File]] = {}
    for file in files:
        for layers, (like, *_) in stages.items():
            both = set(layers) & set(file.layers)
            if both and layers != file.layers:
                odd = min(set(layers) ^ set(file.layers))
                raise ImportRefused(
                    f"{file.path}: layer {odd} is in only one of ranks {like.rank} and "
                    f"{file.rank}, which share layer {min(both)}: files of two runs?"
                )
        stages.setdefault(file.layers, []).append(file)
        if file.steps != files[0].steps:
            if not given.allow_gaps:
                raise ImportRefused(
                    f"{file.path} has iterations {file.steps[0]} to {file.steps[-1]}, but rank "
                    f"{files[0].rank} {files[0].steps[0]} to {files[0].steps[-1]}: take them as "
                    "they are with --allow-gaps."
                )
            notes["ranks do not have the same iterations"] = 1
    missing = 1 + files[-1].rank - len(files)
    unlike = len({len(x) for x in stages.values()}) > 1
    if (missing or unlike) and not given.allow_gaps:
        few = min(stages.values(), key=len)
        first = next((i for i, x in enumerate(files) if x.rank != i), 0)
        what = (
            f"rank{first}.safetensors is missing"
            if missing
            else f"layer {few[0].layers[0]} has {len(few)} ranks, other layers have more"
        )
        raise ImportRefused(f"{path}: {what}: take the ranks that are there with --allow-gaps.")
    notes["ranks are missing"] += max(missing, int(unlike))
    notes["iterations are missing between those that are there"] += sum(
        x.steps[-1] - x.steps[0] + 1 - len(x.steps) for x in files
    )
