"""At most ten numbers per layer of a step, for whatever logger the user has."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from moe_lens.trace.events import Forward, LayerCounts


def scalars_of(forwards: Iterable[Forward]) -> dict[str, float]:
    """`moe/layer3/entropy` and the like, over the forwards of one step.

    Per layer: `load_max_over_mean` (hottest expert over the mean), `load_entropy` (of the counts,
    over ln E), `idle_experts` (got nothing, share), `overflow_share` and `dropped_share` (of the
    choices), `unserved_share` (of the tokens), and where logits were seen `entropy` (of the router,
    nats), `margin`, `top1_prob`, `zloss`, means over tokens.
    """
    by_layer: dict[int, list[LayerCounts]] = {}
    for forward in forwards:
        for x in forward.layers:
            by_layer.setdefault(x.layer, []).append(x)
    return {
        f"moe/layer{layer}/{name}": value
        for layer, seen in sorted(by_layer.items())
        for name, value in _layer(seen).items()
    }


def _layer(seen: list[LayerCounts]) -> dict[str, float]:
    tokens = sum(x.tokens for x in seen)
    load_E = np.sum([x.processed_GE.sum(0) for x in seen], axis=0).astype(float)
    routed = sum(float(x.routed_GE.sum()) for x in seen)
    if not tokens or not routed:
        return {}
    share_E = load_E / max(load_E.sum(), 1.0)
    entropy = -float((share_E[share_E > 0] * np.log(share_E[share_E > 0])).sum())
    out = {
        "load_max_over_mean": float(load_E.max() / max(load_E.mean(), 1e-30)),
        "load_entropy": entropy / math.log(len(load_E)) if len(load_E) > 1 else 1.0,
        "idle_experts": float((load_E == 0).mean()),
        "overflow_share": _total(seen, "overflowed_GE") / routed,
        "dropped_share": _total(seen, "dropped_GE") / routed,
        "unserved_share": _total(seen, "unserved_G") / tokens,
    }
    for name in ("entropy", "margin", "top1_prob", "zloss"):
        sums = [getattr(x, f"{name}_sum_G") for x in seen]
        if all(s is not None and np.isfinite(s).all() for s in sums):
            whole = tokens - _total(seen, "nonfinite_G")
            out[name] = float(sum(s.sum() for s in sums)) / max(whole, 1.0)
    return out


def _total(seen: list[LayerCounts], name: str) -> float:
    return sum(float(a.sum()) for x in seen if (a := getattr(x, name)) is not None)
