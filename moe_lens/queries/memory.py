"""`memory`: what a run's experts would need on a device that does not hold them all.

Asks `token_experts` layer by layer, so that two layers' tokens are in memory at a time, and hands
the answers to `moe_lens.metrics`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_lens.errors import QueryError
from moe_lens.metrics.memory import Memory, measure
from moe_lens.metrics.tokens import Tokens, Unit, tokens_of
from moe_lens.queries.info import RunInfo
from moe_lens.queries.session import Trace, one_run

if TYPE_CHECKING:
    from moe_lens.trace.meta import LayerInfo

MOST = 16_384
"""Tokens of a layer that are looked at."""

HOW = "Record with moe_lens.record(model, run, tokens=1.0), or moe-lens record --tokens 1."


@dataclass(frozen=True)
class LayerMemory:
    """What was measured of a layer in a phase."""

    phase: str
    info: LayerInfo
    memory: Memory


def memory(
    trace: Trace,
    *,
    phase: str | None = None,
    layers: Collection[int] | None = None,
    unit: Unit = "token",
    batch: int = 8,
    most: int | None = MOST,
) -> Iterator[LayerMemory]:
    """Measure the layers of a run, phase by phase.

    Args:
        trace: One run.
        phase: Only this one; None: each that has kept rows, apart.
        layers: Only these; None: all but those whose experts choose their tokens.
        unit: What needs its experts at once: a token, or a forward with all its kept tokens.
        batch: Sequences in a batch, of the grouping by tag; 2 or more.
        most: Tokens of a layer to look at; None: all.

    Yields:
        One for each phase and layer with at least two kept tokens, or forwards.

    Raises:
        QueryError: Nothing of this can be measured: no kept rows, no such layer or phase, or
            layers whose experts choose tokens; or the trace has several runs.
    """
    run = one_run(trace)
    chosen = chosen_layers(run, layers)
    found = False
    for each in [phase] if phase is not None else run.phases:
        before: tuple[LayerInfo, Tokens] | None = None
        for info in chosen:
            tokens = _tokens(trace, info, each, "sequence", most)
            forwards = _tokens(trace, info, each, "forward", most) if unit == "forward" else None
            if len(tokens) < 2 or (forwards is not None and forwards.half("forward") == 0):
                continue
            found = True
            previous = _previous(trace, run, info, before, each, most)
            yield LayerMemory(each, info, measure(tokens, previous, forwards, batch=batch))
            before = info, tokens
    if not found:
        there = "" if phase is None else f" of phase {phase!r} (phases: {', '.join(run.phases)})"
        advice = "" if run.imported else f" {HOW}"
        raise QueryError(f"Fewer than two {unit}s{there} have per-token rows.{advice}")


def previous_layer(run: RunInfo, info: LayerInfo) -> LayerInfo | None:
    """The layer that the tokens come from, in the same stream; its experts choose no tokens."""
    return next(
        (
            x
            for x in run.layers
            if x.layer == info.layer - 1 and x.stream == info.stream and is_chosen_by_token(x)
        ),
        None,
    )


def is_chosen_by_token(info: LayerInfo) -> bool:
    """Whether a token has experts of its own; where experts choose, all are needed always."""
    return info.router != "expert-choice"


def chosen_layers(run: RunInfo, layers: Collection[int] | None) -> list[LayerInfo]:
    """The layers asked for whose tokens choose, of a run with per-token rows.

    Raises:
        QueryError: There are no such rows, no such layer, or none whose tokens choose.
    """
    if run.imported and run.no_rows:
        raise QueryError(f"This trace has {run.no_rows}.")
    if run.token_rows == 0:
        raise QueryError(f"This trace has no per-token rows, only counts. {HOW}")
    known = {x.layer for x in run.layers}
    missing = sorted(set(layers or ()) - known)
    if missing:
        raise QueryError(
            f"There is no layer {missing[0]}. MoE layers of this trace: "
            f"{', '.join(map(str, sorted(known)))}."
        )
    chosen = [x for x in run.layers if layers is None or x.layer in layers]
    usable = [x for x in chosen if is_chosen_by_token(x)]
    if not usable:
        raise QueryError(
            "In these layers experts choose tokens: every expert computes in every forward, so "
            "that none can be left off the device. Choose layers in which tokens choose."
        )
    return usable


def _tokens(trace: Trace, info: LayerInfo, phase: str, by: str, most: int | None) -> Tokens:
    asked = {"layer": info.layer, "phase": phase, "by": by, "most": most}
    return tokens_of(trace.query("token_experts", **asked).df(), info.experts)


def _previous(
    trace: Trace,
    run: RunInfo,
    info: LayerInfo,
    before: tuple[LayerInfo, Tokens] | None,
    phase: str,
    most: int | None,
) -> Tokens | None:
    wanted = previous_layer(run, info)
    if wanted is None:
        return None
    if before is not None and before[0].layer == wanted.layer:
        return before[1]
    return _tokens(trace, wanted, phase, "sequence", most)
