"""A spec that cannot be is refused, in a line that says what is wrong and what it got."""

from __future__ import annotations

from typing import Any

import pytest

from moe_lens.trace.synthetic import (
    Burst,
    Committee,
    Dead,
    Domain,
    Drift,
    Hot,
    Pair,
    Spec,
    Specialist,
)

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"top_k": 17}, "top_k is at most the number of experts, 16; got 17"),
    ({"top_k": 0}, "top_k is 1 or more, got 0"),
    ({"experts": 5000}, "experts is at most 4096, got 5000"),
    ({"layers": 0}, "layers is 1 or more, got 0"),
    ({"ranks": -1}, "ranks is 1 or more, got -1"),
    ({"topics": 0}, "topics is 1 or more"),
    ({"decode": -1}, "decode is 0 or more"),
    ({"capacity_factor": 0.0}, "capacity_factor is above 0, got 0"),
    ({"capacity_factor": float("inf")}, "capacity_factor is above 0, got inf"),
    ({"groups": 3}, "groups divides the 16 experts into equal parts, got 3"),
    ({"logits": True, "rows": False}, "they need rows=True"),
    ({"phases": ("prefill",)}, "There is no phase 'prefill': it is one of train, eval, serve"),
    ({"phases": ()}, "phases names at least one"),
    ({"domains": ()}, "domains are 1 to 32, got 0"),
    ({"domains": tuple(Domain(str(i)) for i in range(33))}, "domains are 1 to 32, got 33"),
    ({"domains": (Domain("a"), Domain("a"))}, "Two domains have the name 'a'"),
    ({"domains": (Domain("a", share=-0.5),)}, "share of domain 'a' is above 0, got -0.5"),
    ({"domains": (Domain("a", vocabulary=0),)}, "vocabulary of domain 'a' is above 0"),
    ({"domains": (Domain("a", zipf=-1),)}, "Zipf exponent of domain 'a' is 0 or more, got -1"),
    ({"domain_strength": -1.0}, "domain_strength is 0 or more, got -1"),
    ({"stay": 1.5}, "stay is from 0 to 1, got 1.5"),
    ({"context_independence": float("nan")}, "context_independence is from 0 to 1, got nan"),
    ({"popularity": "pareto"}, "popularity is one of uniform, zipf, lognormal, got 'pareto'"),
    ({"skew": (1.0,)}, "one for each of 2 layers"),
    ({"skew": (1.0, -1.0)}, "skew is 0 or more, got -1"),
    ({"drift": Drift((4,))}, "drift needs a popularity that is not uniform"),
    ({"popularity": "zipf", "drift": Drift((4, 4))}, "ascending, got"),
    ({"popularity": "zipf", "drift": Drift(())}, "holds forwards above 0"),
    ({"burst": Burst(1.2)}, "burst.share is from 0 to 1, got 1.2"),
    ({"burst": Burst(0.5, every=0)}, "burst.every is 1 or more, got 0"),
    ({"planted": (Hot(16, 0.5),)}, "there is no expert 16 of 16"),
    ({"planted": (Dead(-1),)}, "there is no expert -1 of 16"),
    ({"planted": (Dead(0, layers=(2,)),)}, "there is no layer 2 of 2"),
    ({"planted": ("hot",)}, "planted holds Hot, Dead, Pair"),
    ({"planted": (Hot(3, 0.5), Dead(3))}, "Expert 3 is planted 2 times in layer 0: Hot and Dead"),
    ({"planted": (Pair(3, 3, 0.5),)}, "Expert 3 is planted 2 times"),
    ({"planted": (Hot(3, -0.5),)}, "share is from 0 to 1, got -0.5"),
    ({"planted": (Hot(3, 0.0),)}, "an expert that nobody chooses is Dead"),
    ({"planted": (Pair(1, 2, together=2.0),)}, "together is from 0 to 1, got 2"),
    ({"planted": (Pair(1, 2, together=0.1, share=0.9),)}, "together is too low"),
    ({"planted": (Specialist(1, "law", 2.0),)}, "the domains are code, prose, maths, dialogue"),
    ({"planted": (Specialist(1, "code", 5.0),)}, "the lift is at most 4"),
    ({"planted": (Specialist(1, "code", 3.0, share=0.5),)}, "the lift is at most 2"),
    ({"planted": (Specialist(1, "code", -1.0),)}, "lift is 0 or more"),
    ({"planted": (Committee((1,), share=0.9),)}, "A committee of 1 cannot take 1.8"),
    (
        {"planted": (Hot(0, 0.5), Hot(1, 0.5), Hot(2, 0.5))},
        "What is planted in layer 0 may take 3 places of a token, top_k is 2",
    ),
    (
        {"experts": 3, "planted": (Dead(0), Dead(1, layers=(1,)))},
        "Layer 1 has 1 experts that are not planted, too few for top-2",
    ),
    (
        {"context_independence": 1.0, "planted": (Hot(0, 0.5),)},
        "the token id alone decides",
    ),
    ({"context_independence": 1.0, "burst": Burst(0.5)}, "the token id alone decides"),
]


@pytest.mark.parametrize(("changes", "says"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_cannot_be_is_said(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as e:  # noqa: PT011  (its text is looked at below)
        Spec(**changes)
    assert says in str(e.value)
    assert "\n" not in str(e.value)


def test_what_only_just_can_be() -> None:
    Spec(planted=(Hot(0, 0.5), Hot(1, 0.5)))
    Spec(experts=3, planted=(Dead(0),))
    Spec(planted=(Hot(3, 0.5, layers=(0,)), Dead(3, layers=(1,))))
    Spec(planted=(Specialist(1, "code", 4.0),))
    Spec(top_k=10, planted=(Committee((1, 2, 3), share=0.3),))
    Spec(context_independence=1.0, planted=(Dead(0),))
