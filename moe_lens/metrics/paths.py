"""Paths: the experts that tokens go through, from the first layer to the last.

A path is a token's first choice in every layer, as one thing: an expert's number means nothing
across layers, but a tuple of them, one per layer, is a name. With L layers of E experts there are
E^L of them, so that few tokens share one; what the sample can say of that stands in `richness`.

Legend: L layers, N tokens, M how often a path was taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lens.metrics import richness
from moe_lens.metrics.chance import FORWARD_DRAWS, SEED, Chance, Ints, of_draws
from moe_lens.numbers import count, percent

MEASURES = {
    "distinct": "different paths",
    "coverage": "Good-Turing: probability that the next token takes a known path",
    "entropy": "of the sample, bits; NaN at a coverage below 0.5, where it is about log2 N",
    "effective": "as many paths, taken evenly, would be shared as often; infinite where none was "
    "shared; its log2 is a lower bound of the entropy, and stands at any coverage",
    "top_1_percent": "share of tokens on the commonest 1 % of the different paths, at least one",
    "top_10": "share of tokens on the ten commonest paths",
}
"""What is measured, by name."""


@dataclass(frozen=True)
class Paths:
    """The paths of a sample of tokens.

    Attributes:
        layers: L.
        tokens: N, those with a choice in every layer.
        values: The numbers of `MEASURES`. NaN: there is no such number.
        chance: Theirs with the tokens shuffled in every layer by itself: loads stay as they are,
            and layers know nothing of each other. Empty without
            tokens, of which `sentence` has nothing to say.
    """

    layers: int
    tokens: int
    values: Mapping[str, float]
    chance: Mapping[str, Chance]


def sentence(found: Paths) -> str:
    """How much tokens share their paths, beside chance."""
    words = {
        name: f"{show(found.values[name])} (shuffled: {show(found.chance[name].expected)})"
        for name, show in (("distinct", count), ("top_10", percent), ("coverage", percent))
    }
    return (
        f"{count(found.tokens)} tokens take {words['distinct']} different paths through "
        f"{found.layers} layers; the ten commonest carry {words['top_10']} of them; the next token "
        f"takes a known path with probability {words['coverage']}."
    )


def paths(ids_LN: Ints) -> Paths:
    """The paths of these tokens, beside chance.

    Args:
        ids_LN: First choice of each token in each layer; -1: none, and the token is left out.
    """
    ids_LN = ids_LN[:, (ids_LN >= 0).all(0)]
    names_LN = _names(ids_LN)
    rng = np.random.default_rng(SEED)
    drawn = [
        _measured(rng.permuted(names_LN, axis=1).sum(0))
        for _ in range(FORWARD_DRAWS if ids_LN.size else 0)
    ]
    chance = {name: of_draws([x[name] for x in drawn]) for name in MEASURES if drawn}
    return Paths(len(ids_LN), ids_LN.shape[1], _measured(names_LN.sum(0)), chance)


def _names(ids_LN: Ints) -> NDArray[np.uint64]:
    """A random number for every expert of every layer: their sum, modulo 2^64, names the path.

    Two different ones share a name with probability 2^-64.
    """
    size = (len(ids_LN), int(ids_LN.max(initial=-1)) + 1)
    numbers_LE = np.random.default_rng(SEED).integers(0, 2**64, size, np.uint64)
    return np.take_along_axis(numbers_LE, ids_LN, axis=1)


def _measured(names_N: NDArray[np.uint64]) -> dict[str, float]:
    times_M = richness.tally(names_N)
    distinct = int(richness.distinct(times_M))
    return {
        "distinct": distinct,
        "coverage": float(richness.coverage(times_M)),
        "entropy": float(richness.trusted(richness.entropy(times_M), times_M)),
        "effective": float(richness.effective(times_M)),
        "top_1_percent": richness.top_share(times_M, max(1, math.ceil(distinct / 100))),
        "top_10": richness.top_share(times_M, 10),
    }
