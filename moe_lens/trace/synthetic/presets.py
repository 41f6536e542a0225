"""Specs ready made: four kinds of popularity over time, and one of everything.

Placing experts on ranks must tell the four apart. Each is far from its neighbours: eight ranks of
eight experts, forwards of 1024 tokens, 128 of them. Any field of `Spec` can be given another value.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_lens.trace.synthetic.plants import Committee, Dead, Hot, Pair, Specialist
from moe_lens.trace.synthetic.schedule import moments
from moe_lens.trace.synthetic.spec import Burst, Domain, Drift, Spec

_SERVED = Spec(layers=4, experts=64, top_k=8, steps=128, sequences=16, length=64, rows=False)
DRIFTS_EVERY = 4
"""Forwards between two permutations of `drifting`: shorter than any window worth fitting to."""


def stationary(**changes: Any) -> Spec:
    """Skewed, the same all the time: a placement fitted to the past fits the future."""
    return _of({"popularity": "zipf", "skew": 1.0}, changes)


def drifting(**changes: Any) -> Spec:
    """As skewed, but dealt out anew every four forwards: the past says nothing of the future."""
    spec = stationary(**changes)
    if "drift" in changes:
        return spec
    forwards = len(moments(spec))
    at = range(DRIFTS_EVERY, max(forwards, DRIFTS_EVERY + 1), DRIFTS_EVERY)
    return replace(spec, drift=Drift(tuple(at)))


def bursty(**changes: Any) -> Spec:
    """Balanced over the run, but in each forward another expert is chosen by 9 tokens of 10."""
    return _of({"burst": Burst(share=0.9)}, changes)


def balanced(**changes: Any) -> Spec:
    """All experts alike, always: what imbalance there is comes from sampling."""
    return _of({}, changes)


def everything(**changes: Any) -> Spec:
    """Four domains, Zipf vocabularies, sticky topics, and each kind of plant: a fixture."""
    return replace(
        Spec(
            layers=2,
            experts=32,
            top_k=8,
            steps=8,
            sequences=16,
            length=128,
            domains=(
                Domain("code", 0.4, vocabulary=1024, zipf=1.2),
                Domain("prose", 0.3, vocabulary=4096, zipf=1.0),
                Domain("maths", 0.2, vocabulary=256, zipf=0.8),
                Domain("dialogue", 0.1, vocabulary=2048, zipf=1.1),
            ),
            domain_strength=0.5,
            topics=8,
            stay=0.9,
            topic_strength=1.0,
            popularity="zipf",
            skew=0.5,
            planted=(
                Hot(0, share=0.8),
                Dead(1),
                Pair(2, 3, together=0.9),
                Committee((4, 5, 6), share=0.25),
                Specialist(7, "maths", lift=3.0),
            ),
            losses=True,
        ),
        **changes,
    )


def _of(own: dict[str, Any], changes: dict[str, Any]) -> Spec:
    return replace(_SERVED, **(own | changes))
