"""`conversations`: how much of a conversation's later routing its beginning foretells.

Asks `token_experts` and `sequence_starts` layer by layer and hands the answers to
`moe_lens.metrics`. What pairs of prompts tell about order, `paired` has.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_lens.errors import QueryError
from moe_lens.metrics.constellation import Foretold, foretold
from moe_lens.metrics.tokens import Tokens, tokens_of
from moe_lens.metrics.warm_start import Loads, loads
from moe_lens.queries.memory import MOST, chosen_layers
from moe_lens.queries.pairing import KEY, numbered, texts
from moe_lens.queries.session import Trace, one_run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moe_lens.metrics.accesses import Ints
    from moe_lens.trace.meta import LayerInfo

PREFIXES = (16, 32, 64, 128)
_SERVING = ("prefill", "decode")
"""Phases of one conversation: the beginning of what is decoded stands in its prompt."""


@dataclass(frozen=True)
class LayerContext:
    """What was measured of a layer in a phase.

    Attributes:
        phase: Of the tokens that are foretold.
        info: The layer.
        tokens: That were looked at, of every phase of these sequences.
        sequences: They are of so many.
        headless: Sequences left out, since their first tokens have no rows.
        top_k: Mean of distinct experts of a token.
        smallest: The smallest cache: the experts of the largest token.
        foretold: By prefix, those that some sequence goes on after.
        loads: After the prefix that was asked for; None: no sequence goes on after it.
    """

    phase: str
    info: LayerInfo
    tokens: int
    sequences: int
    headless: int
    top_k: float
    smallest: int
    foretold: list[Foretold]
    loads: Loads | None


def conversations(
    trace: Trace,
    *,
    prefixes: Sequence[float] = PREFIXES,
    after: float = 32,
    cover: float = 0.9,
    phase: str | None = None,
    layers: Collection[int] | None = None,
    key: str = KEY,
    requests: Sequence[tuple[str, str]] = (),
    most: int | None = MOST,
) -> Iterator[LayerContext]:
    """Measure the layers of a run, phase by phase.

    Args:
        trace: One run.
        prefixes: Tokens of a beginning, each 1 or more; or shares of a sequence, between 0 and 1.
        after: The beginning that says which experts are loaded ahead, given likewise.
        cover: The share of a beginning's choices that its smallest constellation takes.
        phase: Only this one; None: each that has kept rows, apart. Prefill and decode are one
            conversation, whose beginning is in the prompt.
        layers: Only these; None: all but those whose experts choose their tokens.
        key: Column of `sequences` that sequences of one text share, if there is one: popularity
            is of other texts.
        requests: Pairs of request ids that are of one text, in place of the column.
        most: Tokens of a layer to look at; None: all.

    Yields:
        One for each phase and layer in which some sequence goes on after one of the prefixes.

    Raises:
        QueryError: Nothing of this can be measured: no kept rows, no such layer or phase, or no
            sequence that is long enough; or the trace has several runs.
        ValueError: A prefix or a share is not one.
    """
    prefixes = sorted({*prefixes, after}, key=tokens_first)
    for value in prefixes:
        _is_prefix(value)
    if not 0 < cover <= 1:
        raise ValueError(f"cover must be above 0, up to 1; got {cover:g}")
    run = one_run(trace)
    chosen = chosen_layers(run, layers)
    of_pair = texts(trace, key, requests)
    found = False
    for of in _together(run.phases if phase is None else [phase], run.phases):
        asked = of[0] if len(of) == 1 else None
        for info in chosen:
            rows = trace.query(
                "token_experts", layer=info.layer, phase=asked, by="sequence", most=most
            ).df()
            tokens, phase_T, text_S, headless = _tokens(trace, rows, info, of, of_pair)
            for each in of if phase is None else [phase]:
                if measured := _measured(tokens, phase_T == each, text_S, prefixes, after, cover):
                    found = True
                    yield LayerContext(
                        each, info, len(tokens), len(tokens.begins()), headless, tokens.top_k,
                        tokens.chosen.largest, *measured,
                    )  # fmt: skip
    if not found:
        there = "" if phase is None else f" of phase {phase!r} (phases: {', '.join(run.phases)})"
        least = ", ".join(f"{x:g}" if x >= 1 else f"{100 * x:g} %" for x in prefixes)
        longer = "" if run.imported else ", or record longer sequences"
        raise QueryError(
            f"No sequence{there} with rows from its first token on goes on after a beginning of "
            f"{least} tokens: give smaller ones (--prefix 4,8){longer}."
        )


def tokens_first(prefix: float) -> tuple[bool, float]:
    """What beginnings are sorted by: those in tokens, then those in shares of a sequence."""
    return prefix < 1, prefix


def _is_prefix(value: float) -> None:
    if not (math.isfinite(value) and (0 < value < 1 or (value >= 1 and value == int(value)))):
        raise ValueError(f"a prefix is 1 token or more, or a share between 0 and 1; got {value:g}")


def _together(phases: list[str], there: list[str]) -> list[tuple[str, ...]]:
    """Phases whose tokens are of the same sequences."""
    serving = tuple(x for x in _SERVING if x in there)
    alone: list[tuple[str, ...]] = [(x,) for x in phases if x not in serving]
    return [*alone, serving] if any(x in serving for x in phases) else alone


def _measured(
    tokens: Tokens, counted_T: NDArray[np.bool_], text_S: Ints, prefixes: Sequence[float],
    after: float, cover: float,
) -> tuple[list[Foretold], Loads | None] | None:  # fmt: skip
    made = [foretold(tokens, counted_T, x, cover, text_S) for x in prefixes]
    made = [x for x in made if x.sequences]
    loaded = loads(tokens, counted_T, after, text_S)
    if not made and not loaded.sequences:
        return None
    return made, loaded if loaded.sequences else None


def _tokens(
    trace: Trace,
    rows: pd.DataFrame,
    info: LayerInfo,
    phases: tuple[str, ...],
    of_pair: Mapping[tuple[int, int], str],
) -> tuple[Tokens, NDArray[np.object_], Ints, int]:
    """Tokens of sequences whose first token has rows, their phases; texts; sequences left out."""
    key = ["rank", "step", "forward"]
    steps = trace.table("steps").df()[[*key, "phase"]].drop_duplicates(key)
    rows = rows.merge(steps, how="left", on=key)
    rows = rows[rows["phase"].isin(phases)]
    starts = trace.query("sequence_starts").df()
    starts = starts[starts["stream"] == info.stream][["rank", "sequence", "first_position"]]
    rows = rows.merge(starts, how="left", on=["rank", "sequence"])
    whole = rows[rows["first_position"] == 0].reset_index(drop=True)
    headless = rows[rows["first_position"] > 0].groupby(["rank", "sequence"]).ngroups
    tokens = tokens_of(whole, info.experts)
    phase_T = whole.drop_duplicates("nth")["phase"].to_numpy(object)
    return tokens, phase_T, numbered(whole, of_pair), headless
