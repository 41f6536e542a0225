"""All about the memory of one layer: hit rates, working set, prefetch, grouping by tag."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from moe_lens.metrics import grouping, prefetch, working_set
from moe_lens.metrics.cache import hit_rates
from moe_lens.metrics.tokens import Tokens, Unit


@dataclass(frozen=True)
class Memory:
    """What was measured of one layer.

    Attributes:
        experts: E.
        top_k: Mean of distinct experts that a token ran on.
        tokens: That were looked at.
        sequences: They are of so many.
        unit: What asks for experts at once: a token, or a forward.
        fitted: Accesses that came first: they filled the caches, and static was fitted on them.
        counted: Accesses after those, of which hit rates are.
        requests: Distinct experts of a counted access, mean.
        largest: Experts of the largest access, the smallest cache.
        hit_rates: As `cache.hit_rates` says.
        growth: As `working_set.over_time`.
        conversations: As `working_set.by_sequence`.
        recall: As `prefetch.recall`.
        groups: As `grouping.by_tag`.
    """

    experts: int
    top_k: float
    tokens: int
    sequences: int
    unit: Unit
    fitted: int
    counted: int
    requests: float
    largest: int
    hit_rates: pd.DataFrame
    growth: pd.DataFrame
    conversations: pd.DataFrame
    recall: pd.DataFrame
    groups: pd.DataFrame

    def rate(self, policy: str, size: int) -> float:
        """Hit rate of a policy, or of chance, at a size; NaN where there is none."""
        found = self.hit_rates.loc[self.hit_rates["size"] == size, policy]
        return float(found.iloc[0]) if len(found) else float("nan")

    def misses(self, policy: str, size: int) -> float:
        """Loads for each access."""
        return (1 - self.rate(policy, size)) * self.requests


def measure(
    tokens: Tokens,
    before: Tokens | None = None,
    forwards: Tokens | None = None,
    *,
    batch: int = 8,
    seed: int = 0,
) -> Memory:
    """Measure one layer.

    Args:
        tokens: Of the layer, sequence after sequence.
        before: The same of the layer before it in its stream, if there is one.
        forwards: The layer's tokens forward after forward: hit rates are then of forwards, and else
            of single tokens.
        batch: B of the grouping by tag.
        seed: Of its draws.
    """
    unit: Unit = "token" if forwards is None else "forward"
    run = tokens if forwards is None else forwards
    asked, first = run.accesses(unit), run.half(unit)
    counted = asked.since(first)
    return Memory(
        experts=tokens.experts,
        top_k=tokens.top_k,
        tokens=len(tokens),
        sequences=len(tokens.begins()),
        unit=unit,
        fitted=first,
        counted=len(counted),
        requests=counted.requests / max(len(counted), 1),
        largest=asked.largest,
        hit_rates=hit_rates(asked, first),
        growth=working_set.over_time(tokens),
        conversations=working_set.by_sequence(tokens),
        recall=prefetch.recall(tokens, tokens.half(), before),
        groups=grouping.by_tag(tokens, batch, seed=seed),
    )
