"""The memory of several layers in a few rows and sentences, for one size of cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moe_lens.metrics.cache import POLICIES
from moe_lens.metrics.memory import Memory
from moe_lens.metrics.prefetch import PREDICTORS
from moe_lens.metrics.stall import stall_seconds
from moe_lens.numbers import count, decimal, percent

Row = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """One layer and what an expert of it weighs.

    Attributes:
        layer: Its number.
        memory: What was measured.
        expert_bytes: Of one expert; None: not known.
    """

    layer: int
    memory: Memory
    expert_bytes: float | None


def smallest(layers: Sequence[Layer]) -> int:
    """The smallest cache that holds the largest access of each layer."""
    return max(each.memory.largest for each in layers)


def default_size(layers: Sequence[Layer]) -> int:
    """Half of the experts of the smallest layer, or what the largest access needs."""
    return max(smallest(layers), min(each.memory.experts for each in layers) // 2)


def hit_rate(layers: Sequence[Layer], policy: str, size: int) -> float:
    """Requests of all layers that find their expert, as a share. A layer of fewer holds all."""
    asked = [each.memory.requests * each.memory.counted for each in layers]
    found = [
        each.memory.rate(policy, min(size, each.memory.experts)) * n
        for each, n in zip(layers, asked, strict=True)
    ]
    return sum(found) / sum(asked) if sum(asked) else math.nan


def stall(layers: Sequence[Layer], policy: str, size: int, gb_per_s: float) -> float:
    """Seconds that an access waits in all layers together; NaN where bytes are not known."""
    return sum(
        math.nan
        if each.expert_bytes is None
        else stall_seconds(
            each.memory.misses(policy, min(size, each.memory.experts)), each.expert_bytes, gb_per_s
        )
        for each in layers
    )


def by_size(layers: Sequence[Layer], gb_per_s: float) -> list[Row]:
    """Eighths of the experts, from the smallest cache on, over all layers; none where E differs."""
    if len({each.memory.experts for each in layers}) != 1:
        return []
    experts, least = layers[0].memory.experts, smallest(layers)
    sizes = sorted({least, *(n * experts // 8 for n in range(1, 8) if n * experts // 8 > least)})
    return [
        {
            "size": size,
            "experts": experts,
            **{name: hit_rate(layers, name, size) for name in (*POLICIES, "chance")},
            "stall_lru_s": stall(layers, "lru", size, gb_per_s),
            "stall_optimum_s": stall(layers, "optimum", size, gb_per_s),
        }
        for size in sizes
    ]


def by_layer(layers: Sequence[Layer], size: int, gb_per_s: float) -> list[Row]:
    """Each layer at one size: hit rates, stall, its conversations, recall at twice its top-k."""
    rows = []
    for each in layers:
        memory, conversations = each.memory, each.memory.conversations
        own = min(size, memory.experts)
        fetched = min(memory.experts, round(2 * memory.top_k))
        recall = memory.recall.iloc[fetched - 1]
        rows.append(
            {
                "layer": each.layer,
                "experts": memory.experts,
                "size": own,
                **{name: memory.rate(name, own) for name in (*POLICIES, "chance")},
                "stall_lru_s": stall([each], "lru", size, gb_per_s),
                "conversations": len(conversations),
                "touched": conversations["touched"].mean(),
                "touched_chance": conversations["chance"].mean(),
                "needed_90": conversations["needed_90"].mean(),
                "needed_95": conversations["needed_95"].mean(),
                "needed_99": conversations["needed_99"].mean(),
                "fetched": fetched,
                **{f"recall_{name}": recall[name] for name in (*PREDICTORS, "chance")},
            }
        )
    return rows


def by_tag(layers: Sequence[Layer]) -> list[Row]:
    """Grouping by tag, mean over the layers; all tags first."""
    found: dict[str, list[Row]] = {}
    for each in layers:
        for row in each.memory.groups.to_dict("records"):
            found.setdefault(str(row["tag"]), []).append({str(k): v for k, v in row.items()})
    return [
        {
            "tag": tag,
            "sequences": rows[0]["sequences"],
            "batch": rows[0]["batch"],
            **{name: _mean(rows, name) for name in (
                "grouped", "mixed", "ratio", "chance", "null_low", "null_high")},
        }
        for tag, rows in found.items()
    ]  # fmt: skip


def size_for(layers: Sequence[Layer], policy: str, wanted: float) -> int | None:
    """The smallest cache with this hit rate over all layers; None: no cache has it."""
    sizes = range(smallest(layers), max(each.memory.experts for each in layers) + 1)
    return next((m for m in sizes if hit_rate(layers, policy, m) >= wanted), None)


def answers(
    phase: str, layers: Sequence[Layer], size: int, gb_per_s: float, wanted: float = 0.9
) -> list[str]:
    """What matters, in sentences: hits, waiting, sizes, conversations, prefetch, grouping."""
    said = [_hits(phase, layers, size)]
    if size >= smallest(layers) and not _whole(layers):
        said.append(_waiting(layers, size, gb_per_s))
        said.append(_sizes(layers, wanted))
    rows = by_layer(layers, size, gb_per_s)
    said += [_conversations(layers, rows), _prefetch(rows)]
    groups = by_tag(layers)
    if groups:
        said.append(_grouping(groups[0]))
    return said


def _hits(phase: str, layers: Sequence[Layer], size: int) -> str:
    unit, of = layers[0].memory.unit, _range(layers, lambda m: m.experts)
    if _whole(layers):
        return f"{phase}: a {unit} needs all {of} experts of a layer at once: no cache helps it."
    if size < smallest(layers):
        needs = smallest(layers)
        return (
            f"{phase}: a {unit} needs up to {needs} of {of} experts of a layer at once, which a "
            f"cache of {size} does not hold."
        )
    lru, best, chance = (percent(hit_rate(layers, p, size)) for p in ("lru", "optimum", "chance"))
    return (
        f"{phase}: {size} of {of} experts resident per layer: LRU hits {lru}, the optimum {best}, "
        f"chance {chance}."
    )


def _waiting(layers: Sequence[Layer], size: int, gb_per_s: float) -> str:
    unit = layers[0].memory.unit
    loads = sum(x.memory.misses("lru", min(size, x.memory.experts)) for x in layers)
    text = f"LRU loads {decimal(loads, 1)} experts a {unit} over {_layers(layers)}"
    lru, best = (stall(layers, p, size, gb_per_s) for p in ("lru", "optimum"))
    if math.isnan(lru):
        return (
            f"{text}; how long that takes is not known without the size of an expert: give "
            "--expert-mb."
        )
    return (
        f"{text}: {_time(lru)} at {gb_per_s:g} GB/s, if nothing hides it "
        f"(the optimum: {_time(best)})."
    )


def _sizes(layers: Sequence[Layer], wanted: float) -> str:
    lru, best = (size_for(layers, policy, wanted) for policy in ("lru", "optimum"))
    if lru is None or best is None:
        return f"No cache hits {percent(wanted)}: experts that come for the first time are loaded."
    experts = _range(layers, lambda m: m.experts)
    return (
        f"To hit {percent(wanted)} LRU takes {lru} of {experts} experts resident per layer, the "
        f"optimum {best}."
    )


def _conversations(layers: Sequence[Layer], rows: list[Row]) -> str:
    tokens = layers[0].memory.conversations["tokens"].median()
    n = layers[0].memory.sequences
    return (
        f"A conversation ({count(n)}, median {count(tokens)} tokens) touches "
        f"{decimal(_mean(rows, 'touched'), 1)} of {_range(layers, lambda m: m.experts)} experts of "
        f"a layer, {decimal(_mean(rows, 'touched_chance'), 1)} by chance; "
        f"{decimal(_mean(rows, 'needed_90'), 1)} take 90 % of its choices."
    )


def _prefetch(rows: list[Row]) -> str:
    ways = {"popularity": "popularity", "prefix": "the conversation so far",
            "last_layer": "the last layer's experts"}  # fmt: skip
    known = [(words, _mean(rows, f"recall_{name}")) for name, words in ways.items()]
    found = ", ".join(f"{percent(v)} by {words}" for words, v in known if not math.isnan(v))
    fetched = sorted({row["fetched"] for row in rows})
    sizes = f"{fetched[0]}" if len(fetched) == 1 else f"{fetched[0]} to {fetched[-1]}"
    return (
        f"Fetching {sizes} experts of a layer ahead finds {found} "
        f"(chance {percent(_mean(rows, 'recall_chance'))})."
    )


def _grouping(row: Row) -> str:
    return (
        f"Batches of {row['batch']} of one tag touch {decimal(row['grouped'], 1)} experts of a "
        f"layer, mixed ones {decimal(row['mixed'], 1)}: ratio {decimal(row['ratio'], 3)} (tags at "
        f"random: {decimal(row['null_low'], 3)} to {decimal(row['null_high'], 3)})."
    )


def _whole(layers: Sequence[Layer]) -> bool:
    """Some access needs all experts of every layer: only a cache of all of them holds it."""
    return all(each.memory.largest == each.memory.experts for each in layers)


def _time(seconds: float) -> str:
    scale, unit = (1e3, "ms") if seconds >= 1e-4 else (1e6, "µs")
    value = seconds * scale
    return f"{decimal(value, 0 if value >= 100 else 1 if value >= 10 else 2)} {unit}"


def _layers(layers: Sequence[Layer]) -> str:
    return "1 layer" if len(layers) == 1 else f"{len(layers)} layers"


def _range(layers: Sequence[Layer], of: Callable[[Memory], int]) -> str:
    values = sorted({of(each.memory) for each in layers})
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _mean(rows: list[Row], name: str) -> float:
    """Over the rows that have a number."""
    values = [row[name] for row in rows if row[name] is not None and not math.isnan(row[name])]
    return sum(values) / len(values) if values else math.nan
