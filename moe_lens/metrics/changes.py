"""Alarms of what changed in the course of a phase, or against another run.

Each takes the layers that can be judged and a probability of false alarms that is for all of them
together. Rare among orders of the same blocks of steps, and large: a change has to be both.

Legend: C blocks of consecutive steps, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.metrics.chance import Floats, Ints
from moe_lens.metrics.drift import (
    EDGE,
    Change,
    change_points,
    design_effect,
    jsd,
    of_counts,
    of_means,
    psi,
    psi_floor,
)
from moe_lens.metrics.levels import few_tokens
from moe_lens.metrics.watched import Fired, Watched

FEWEST = 16
"""Blocks below which orders of them are too few to call a change rare."""
DRIFT = 0.1
"""What the population stability index may be above its floor: the usual bound of a shift."""
Z_GROWTH = 2.0
"""By what the z-loss may grow."""
COLLAPSE = 0.5
"""What may be left of the token entropy."""


def drift(layers: Sequence[Watched], level: float) -> Iterable[Fired]:
    """Choices go to other experts than before."""
    blocks = [of_counts(_joined(x, x.counts_CE, "counts_CE")) for x in layers]
    for x, change in _changed(layers, blocks, level):
        counts_CE = _joined(x, x.counts_CE, "counts_CE")
        before_CE, after_CE = counts_CE[: change.at], counts_CE[change.at :]
        before_E, after_E = before_CE.sum(0), after_CE.sum(0)
        floor = psi_floor(x.experts, _effective(before_CE, x.top_k), _effective(after_CE, x.top_k))
        found = float(psi(before_E, after_E))
        if found > floor + DRIFT:
            moved_E = np.abs(after_E / after_E.sum() - before_E / before_E.sum())
            yield Fired(
                "drift", x.layer, None, found, float(floor + DRIFT),
                f"layer {x.layer}: {_when(x, change)} tokens go elsewhere: PSI {found:.2f} (noise "
                f"makes it {floor:.3f}), JSD {float(jsd(before_E, after_E)):.4f} nats; expert "
                f"{int(moved_E.argmax())} moved most",
            )  # fmt: skip


def z_loss(layers: Sequence[Watched], level: float) -> Iterable[Fired]:
    """The logits grow."""
    for x, change, begun, ended in _moved(layers, "z_loss_C", level):
        if ended > Z_GROWTH * begun:
            yield Fired(
                "z_loss", x.layer, None, ended / begun if begun else np.inf, Z_GROWTH,
                f"layer {x.layer}: the z-loss grew from {begun:.3g} to {ended:.3g}, most of it "
                f"{_when(x, change)}",
            )  # fmt: skip


def entropy(layers: Sequence[Watched], level: float) -> Iterable[Fired]:
    """Routers become sure, of all tokens: they stop to explore, or saturate."""
    for x, change, begun, ended in _moved(layers, "entropy_C", level):
        if ended < COLLAPSE * begun:
            yield Fired(
                "entropy", x.layer, None, ended / begun, COLLAPSE,
                f"layer {x.layer}: the token entropy fell from {begun:.3g} to {ended:.3g} nats, "
                f"most of it {_when(x, change)}",
            )  # fmt: skip


def _changed(
    layers: Sequence[Watched], blocks: Sequence[tuple[Floats, Floats]], level: float
) -> Iterable[tuple[Watched, Change]]:
    """The layers whose blocks changed, at a probability of false alarms that is for all of them."""
    baseline = layers[0].against
    at = None if baseline is None else len(baseline.tokens_C)
    for x, change in zip(layers, change_points(blocks, at), strict=True):
        if change.p <= level:
            yield x, change


def _moved(
    layers: Sequence[Watched], name: str, level: float
) -> Iterable[tuple[Watched, Change, float, float]]:
    """Where a mean changed, and from what to what: of the baseline, or the first blocks."""
    series = [(_joined(x, getattr(x, name), name), _joined(x, x.tokens_C, "tokens_C"))
              for x in layers]  # fmt: skip
    blocks = [of_means(mean_C, tokens_C) for mean_C, tokens_C in series]
    means = {x.layer: each for x, each in zip(layers, series, strict=True)}
    for x, change in _changed(layers, blocks, level):
        mean_C, tokens_C = means[x.layer]
        ends = (slice(None, EDGE), slice(-EDGE, None))
        if x.against is not None:
            ends = (slice(None, change.at), slice(change.at, None))
        begun, ended = (_mean(mean_C[end], tokens_C[end]) for end in ends)
        yield x, change, begun, ended


def _mean(mean_C: Floats, tokens_C: Floats) -> float:
    known = np.isfinite(mean_C) & (tokens_C > 0)
    return float((mean_C * tokens_C)[known].sum() / max(tokens_C[known].sum(), 1e-300))


def _joined(x: Watched, own: NDArray[Any], name: str) -> NDArray[Any]:
    """A layer's blocks behind those of the run that it is compared with."""
    return own if x.against is None else np.concatenate([getattr(x.against, name), own])


def _effective(counts_CE: Ints, top_k: float) -> float:
    """Choices of independent tokens that would vary as much as these."""
    return float(counts_CE.sum() / design_effect(counts_CE, counts_CE.sum(1) / top_k))


def _when(x: Watched, change: Change) -> str:
    if x.against is not None:
        return "against the other run"
    return f"from {x.steps_C[change.at]} on" if x.steps_C else f"from block {change.at} on"


def few_blocks(x: Watched) -> str:
    """Why no change can be called rare; empty: it can."""
    if x.against is None and x.blocks < FEWEST:
        return f"fewer than {FEWEST} {x.unit}: too few orders of them to call a change rare"
    if x.against is not None and min(x.blocks, x.against.blocks) < FEWEST // 2:
        return f"fewer than {FEWEST // 2} {x.unit} of either run"
    return ""


def no_drift(x: Watched) -> str:
    """Why the drift of a layer cannot be judged."""
    return few_blocks(x) if not x.experts_choose else few_tokens(x)


def no_series(name: str, words: str) -> Callable[[Watched], str]:
    """The same of a series of means, which may not have been recorded."""

    def lacks(x: Watched) -> str:
        given = [getattr(each, name) for each in (x, x.against) if each is not None]
        if any(series is None or not np.isfinite(series).any() for series in given):
            return words
        return few_blocks(x)

    return lacks
