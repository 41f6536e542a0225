"""At most ten numbers per layer of a step, for whatever logger the user has."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from moe_lens.trace.events import Doubles, Forward, LayerCounts
from moe_lens_hooks.forward import OpenForward

_COUNTS = ("overflowed_GE", "dropped_GE", "unserved_G", "nonfinite_G")
_MEANS = ("entropy", "margin", "top1_prob", "zloss")


@dataclass
class _Layer:
    """Sums over the forwards of a step."""

    load_E: Doubles
    tokens: int = 0
    routed: float = 0.0
    counts: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, x: LayerCounts) -> None:
        self.load_E = self.load_E + x.processed_GE.sum(0)
        self.tokens += x.tokens
        self.routed += float(x.routed_GE.sum())
        for name in _COUNTS:
            if (counted := getattr(x, name)) is not None:
                self.counts[name] = self.counts.get(name, 0.0) + float(counted.sum())
        for name in _MEANS:
            # NaN, once some forward has no such number: the sum is not one of all tokens
            summed = getattr(x, f"{name}_sum_G")
            value = math.nan if summed is None else float(summed.sum())
            self.sums[name] = self.sums.get(name, 0.0) + value

    def numbers(self) -> dict[str, float]:
        if not self.tokens or not self.routed:
            return {}
        load_E = self.load_E
        share_E = load_E / max(load_E.sum(), 1.0)
        entropy = -float((share_E[share_E > 0] * np.log(share_E[share_E > 0])).sum())
        out = {
            "load_max_over_mean": float(load_E.max() / max(load_E.mean(), 1e-30)),
            "load_entropy": entropy / math.log(len(load_E)) if len(load_E) > 1 else 1.0,
            "idle_experts": float((load_E == 0).mean()),
            "overflow_share": self.counts.get("overflowed_GE", 0.0) / self.routed,
            "dropped_share": self.counts.get("dropped_GE", 0.0) / self.routed,
            "unserved_share": self.counts.get("unserved_G", 0.0) / self.tokens,
        }
        whole = max(self.tokens - self.counts.get("nonfinite_G", 0.0), 1.0)
        return out | {n: x / whole for n, x in self.sums.items() if math.isfinite(x)}


class StepTotals:
    """The forwards of one step, summed as soon as the writer has read their numbers.

    A step may be the generation of thousands of tokens: what its forwards held is let go of.
    """

    def __init__(self) -> None:
        self.last: OpenForward | None = None
        """The forward that ran last."""
        self._forwards = 0
        self._waiting: deque[OpenForward] = deque()
        self._layers: dict[int, _Layer] = {}

    def __len__(self) -> int:
        return self._forwards

    def add(self, forward: OpenForward) -> None:
        """A forward of the step is over."""
        self.last = forward
        self._forwards += 1
        self._waiting.append(forward)
        while self._waiting and (whole := self._waiting[0].landed) is not None:
            self._sum(whole)
            self._waiting.popleft()

    def scalars(self) -> dict[str, float]:
        """`moe/layer3/entropy` and the like; waits for what is still on a device.

        Per layer: `load_max_over_mean` (hottest expert over the mean), `load_entropy` (of the
        counts, over ln E), `idle_experts` (got nothing, share), `overflow_share` and
        `dropped_share` (of the choices), `unserved_share` (of the tokens), and where logits were
        seen `entropy` (of the router, nats), `margin`, `top1_prob`, `zloss`, means over tokens.
        """
        while self._waiting:
            self._sum(self._waiting.popleft().resolve())
        return {
            f"moe/layer{layer}/{name}": value
            for layer, sums in sorted(self._layers.items())
            for name, value in sums.numbers().items()
        }

    def _sum(self, forward: Forward) -> None:
        for x in forward.layers:
            experts = x.processed_GE.shape[1]
            self._layers.setdefault(x.layer, _Layer(np.zeros(experts))).add(x)
