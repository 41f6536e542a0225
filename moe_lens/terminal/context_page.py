"""What `moe-lens context` says: rows and sentences, for the page and for --json.

From what `queries.context` and `queries.paired` found, over all layers and one size of cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moe_lens.errors import CommandError
from moe_lens.metrics.constellation import NAMED_BY, Foretold
from moe_lens.metrics.stall import stall_seconds
from moe_lens.metrics.warm_start import STARTS
from moe_lens.numbers import NONE, count, decimal, percent
from moe_lens.queries.context import tokens_first
from moe_lens.terminal.units import digits, unit_of

if TYPE_CHECKING:
    from moe_lens.queries.context import LayerContext
    from moe_lens.queries.paired import Paired

Row = dict[str, Any]
_NAMES = (*NAMED_BY, "chance")
_AHEAD = ("popularity", "prefix", "optimum")
"""Beginnings that ask for loads ahead."""


def phases(
    measured: Sequence[LayerContext],
    bytes_of: Mapping[int, float | None],
    prefixes: Sequence[float],
    after: float,
    resident: int | None,
    gb_per_s: float,
) -> list[Row]:
    """What is said of each phase.

    Args:
        measured: Layers, phase by phase.
        bytes_of: Of an expert of each layer; None: not known.
        prefixes: The beginnings that were asked for.
        after: The one that says what is loaded ahead.
        resident: M; None: half of the experts of the smallest layer, or what a token needs.
        gb_per_s: Of the link.

    Raises:
        CommandError: M is more than a layer has, or less than a token needs.
    """
    by_phase: dict[str, list[LayerContext]] = {}
    for each in measured:
        by_phase.setdefault(each.phase, []).append(each)
    asked = sorted({*prefixes, after}, key=tokens_first)
    return [
        _phase(name, layers, bytes_of, asked, after, resident, gb_per_s)
        for name, layers in by_phase.items()
    ]


def _phase(
    name: str,
    layers: list[LayerContext],
    bytes_of: Mapping[int, float | None],
    asked: list[float],
    after: float,
    resident: int | None,
    gb_per_s: float,
) -> Row:
    least = max(x.smallest for x in layers)
    size = resident or max(least, min(x.info.experts for x in layers) // 2)
    most = max(x.info.experts for x in layers)
    if not least <= size <= most:
        raise CommandError(
            f"--resident is from {least}, what a token of {name} needs, to {most}, the experts of "
            f"a layer; got {size}."
        )
    known = {y.prefix for x in layers for y in x.foretold}
    said: Row = {
        "phase": name,
        "after": after,
        "size": size,
        "gb_per_s": gb_per_s,
        "tokens": max(x.tokens for x in layers),
        "sequences": max(x.sequences for x in layers),
        "headless": max(x.headless for x in layers),
        "prefixes": [
            _of_prefix([y for x in layers for y in x.foretold if y.prefix == prefix], size, prefix)
            for prefix in asked if prefix in known
        ],
        "too_long": [prefix for prefix in asked if prefix not in known],
        "layers": [
            {"layer": x.info.layer, "experts": x.info.experts, "top_k": x.top_k,
             **_of_prefix([y for y in x.foretold if y.prefix == after], size, after)}
            for x in layers
        ],
        "loads": _loads([x for x in layers if x.loads is not None], bytes_of, size, gb_per_s),
        "curves": [
            {"layer": x.info.layer, "prefix": y.prefix, "recall": y.recall.to_dict("records")}
            for x in layers for y in x.foretold
        ],
    }  # fmt: skip
    return {**said, "answers": _answers(said)}


def _of_prefix(found: list[Foretold], size: int, prefix: float) -> Row:
    """Over layers, each weighed by its choices; experts of a set: the mean over layers."""
    choices = sum(x.choices for x in found) or math.nan

    def mean(values: Iterable[float]) -> float:
        return sum(v * x.choices for v, x in zip(values, found, strict=True)) / choices

    return {
        "beginning": prefix,
        "sequences": max((x.sequences for x in found), default=0),
        "choices": sum(x.choices for x in found),
        **{name: mean(x.recall[name].iloc[min(size, len(x.recall)) - 1] for x in found)
           for name in _NAMES},
        "covering": sum(x.covering for x in found) / (len(found) or math.nan),
        **{f"covering_{name}": mean(x.covered[name] for x in found) for name in _NAMES},
    }  # fmt: skip


def _loads(
    layers: list[LayerContext], bytes_of: Mapping[int, float | None], size: int, gb_per_s: float
) -> list[Row]:
    """A row a beginning: loads of a conversation in all layers, and seconds that it waits."""
    rows: list[Row] = []
    for name in STARTS:
        loads = seconds = ahead = total_bytes = 0.0
        for x in layers:
            assert x.loads is not None
            table, sequences = x.loads.loads, x.loads.sequences
            own = min(size, x.info.experts)
            here = float(table.loc[table["size"] == own, name].iloc[0]) / sequences
            each = bytes_of[x.info.layer]
            loads += here
            ahead += own if name in _AHEAD else 0
            weight = math.nan if each is None else each
            seconds += stall_seconds(here, weight, gb_per_s)
            total_bytes += here * weight
        first = rows[0] if rows else {"loads": loads, "seconds": seconds, "bytes": total_bytes}
        rows.append({
            "start": name,
            "loads": loads,
            "bytes": total_bytes,
            "seconds": seconds,
            "saved_loads": first["loads"] - loads,
            "saved_bytes": first["bytes"] - total_bytes,
            "saved_seconds": first["seconds"] - seconds,
            "ahead": ahead,
            "requests": sum(x.loads.requests / x.loads.sequences for x in layers if x.loads),
            "tokens": max((x.loads.tokens / x.loads.sequences for x in layers if x.loads),
                          default=0.0),
        })  # fmt: skip
    return rows if layers else []


def _answers(said: Row) -> list[str]:
    rows = said["prefixes"]
    row = next((x for x in rows if x["beginning"] == said["after"]), rows[0] if rows else None)
    out = []
    if row is not None:
        experts = _range(x["experts"] for x in said["layers"])
        popular, best, chance = (percent(row[x]) for x in ("popularity", "oracle", "chance"))
        out.append(
            f"{said['phase']}: the {said['size']} of {experts} experts of a layer that "
            f"{words_of(row['beginning'])} chose most take {percent(row['prefix'])} of the choices "
            f"after it; as many by popularity {popular}, the best {best}, chance {chance}."
        )
    if said["loads"]:
        out += [_saved(said), _ahead(said)]
    return out


def _saved(said: Row) -> str:
    by = {x["start"]: x for x in said["loads"]}
    cold = by["cold"]
    text = (
        f"LRU that begins cold loads {decimal(cold['loads'], 1)} experts in the "
        f"{decimal(cold['tokens'], 1)} tokens of a conversation that follow"
    )
    if math.isnan(cold["seconds"]):
        return f"{text}; how long that takes is not known: give --expert-mb."
    return f"{text}, and waits {time_of(cold['seconds'])} at {said['gb_per_s']:g} GB/s."


def _ahead(said: Row) -> str:
    by = {x["start"]: x for x in said["loads"]}

    def saved(name: str) -> str:
        row = by[name]
        took = "" if math.isnan(row["saved_seconds"]) else f" ({time_of(row['saved_seconds'])})"
        return NONE if math.isnan(row["saved_loads"]) else f"{decimal(row['saved_loads'], 1)}{took}"

    return (
        f"Having the constellation there saves {saved('prefix')} of these loads, as many popular "
        f"experts {saved('popularity')}, what serving the tokens before left there "
        f"{saved('kept')}. Loading ahead is {decimal(by['prefix']['ahead'], 0)} loads by itself, "
        "while nobody waits."
    )


def pairs(found: Paired) -> Row:
    """What is said of pairs."""
    layers = [_row(x) for x in found.layers.to_dict("records")]
    return {
        "answers": _answers_of_pairs(found, layers),
        "left_out": found.left_out,
        "pairs": [_row(x) for x in found.pairs.to_dict("records")],
        "layers": layers,
        "by_distance": [_row(x) for x in found.by_distance.to_dict("records")],
        "by_position": [_row(x) for x in found.by_position.to_dict("records")],
    }


def _answers_of_pairs(found: Paired, layers: list[Row]) -> list[str]:
    out = []
    moved = [x for x in layers if x["tokens"]]
    if moved:

        def mean(name: str) -> float:
            known = [x for x in moved if not math.isnan(x[name])]
            tokens = sum(x["tokens"] for x in known) or math.nan
            return float(sum(x[name] * x["tokens"] for x in known) / tokens)

        n = max(x["pairs"] for x in moved)
        out.append(
            f"{count(n)} pair{'s' * (n != 1)} in another order: a token keeps "
            f"{percent(mean('overlap'))} of its experts, {percent(mean('set_changed'))} of the "
            f"tokens have another set; the same id in other sequences shares "
            f"{percent(mean('id_overlap'))}, any two tokens {percent(mean('random_overlap'))}, "
            f"chance {percent(mean('chance'))}."
        )
        if not math.isnan(mean("id_part")):
            out.append(
                f"Of what a token says about its experts its id says {_part(mean('id_part'))}, its "
                f"content {_part(mean('content_part'))}, the order {_part(mean('order_part'))}."
            )
    if tokens := sum(x["before_tokens"] for x in layers):
        changed = sum(x["before_changed"] * x["before_tokens"] for x in layers
                      if x["before_tokens"]) / tokens  # fmt: skip
        out.append(f"Before the first cut {percent(changed)} of the tokens have another set.")
    if tokens := sum(x["same_tokens"] for x in layers):
        changed = sum(
            x["same_changed"] * x["same_tokens"] for x in layers if x["same_tokens"]
        ) / tokens  # fmt: skip
        n = int(found.pairs["same"].sum())
        out.append(
            f"{count(n)} prompt{'s' * (n != 1)} twice: no token's set changed."
            if changed == 0
            else f"{count(n)} prompt{'s' * (n != 1)} twice: {percent(changed)} of the tokens have "
            "another set. Routing is not repeatable here, and changes that small mean nothing."
        )
    return out


def _part(share: float) -> str:
    """A share that noise may put below 0."""
    return percent(share) if share >= 0 else f"−{percent(-share)}"


def words_of(beginning: float) -> str:
    """`the first 32 tokens`, or a share of them."""
    if beginning < 1:
        return f"the first {100 * beginning:g} % of a sequence"
    return f"the first {count(beginning)} token{'s' * (beginning != 1)}"


def time_of(seconds: float) -> str:
    """A time in the unit that suits it; below 0 where something costs."""
    if seconds == 0:
        return "0"
    scale, unit = unit_of(abs(seconds) * 1e9)
    return f"{'−' * (seconds < 0)}{digits(abs(seconds) * 1e9 / scale)} {unit}"


def _range(values: Iterable[int]) -> str:
    known = sorted(set(values))
    return str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"


def _row(row: Mapping[Any, Any]) -> Row:
    """Plain numbers, as json has them."""
    return {str(k): v.item() if hasattr(v, "item") else v for k, v in row.items()}
