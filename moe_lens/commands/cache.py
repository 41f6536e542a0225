"""`moe-lens cache`: what experts would need on a device that does not hold them all."""

from __future__ import annotations

import json
import math
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.commands.arguments import Layers, Phase, Run, SkipDamaged, numbers
from moe_lens.commands.interrupt import ends_at_once
from moe_lens.errors import CommandError
from moe_lens.numbers import finite

if TYPE_CHECKING:
    from moe_lens.metrics.summary import Layer
    from moe_lens.queries.memory import LayerMemory
    from moe_lens.trace.meta import LayerInfo


class UnitName(StrEnum):
    """What needs its experts at once."""

    token = "token"
    forward = "forward"


class Weight(StrEnum):
    """Type of the experts' weights."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    fp8 = "fp8"
    int8 = "int8"
    int4 = "int4"


def cache(
    run: Run,
    resident: Annotated[
        int | None,
        typer.Option(help="Experts of a layer on the device; default: half of them.", min=1),
    ] = None,
    hit_rate: Annotated[
        float, typer.Option(help="Share of hits for which the smallest cache is named.")
    ] = 0.9,
    unit: Annotated[
        UnitName,
        typer.Option(help="What needs its experts at once: a token (batch 1), or a forward."),
    ] = UnitName.token,
    phase: Phase = None,
    layers: Layers = None,
    bandwidth: Annotated[
        float, typer.Option(help="Of the link that experts come through, GB/s; PCIe 4: 25.")
    ] = 25.0,
    dtype: Annotated[Weight, typer.Option(help="Of the weights.")] = Weight.bfloat16,
    expert_mb: Annotated[
        float | None,
        typer.Option("--expert-mb", help="An expert's MB; default: from its sizes and --dtype."),
    ] = None,
    batch: Annotated[
        int, typer.Option(help="Sequences in a batch, for grouping by tag.", min=2)
    ] = 8,
    tokens: Annotated[
        int, typer.Option(help="Of each layer, at most about so many are looked at.", min=2)
    ] = 16_384,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
    skip_damaged: SkipDamaged = False,
) -> None:
    """Hit rates of a cache of experts, working sets, prefetch, and grouping by tag.

    Says what LRU, LFU and a static choice would find resident, beside the best that is possible and
    chance; how long misses wait; how many experts a conversation touches; how many of a layer's
    experts can be named in advance; and what batches of one tag save.

    \b
    Examples:
      moe-lens cache traces/run1
      moe-lens cache traces/run1 --resident 16 --phase decode --hit-rate 0.95
      moe-lens cache traces/run1 --unit forward --layers 0-3
      moe-lens cache traces/run1 --bandwidth 60 --dtype int4 --json
    """  # noqa: D301  (\b keeps the lines as they are)
    for option, value in (("--bandwidth", bandwidth), ("--expert-mb", expert_mb)):
        if value is not None and not 0 < value < math.inf:
            raise CommandError(f"{option} must be above 0, got {value:g}.")
    if not 0 < hit_rate <= 1:
        raise CommandError(f"--hit-rate must be above 0, up to 1; got {hit_rate:g}.")
    chosen = None if layers is None else frozenset(numbers(layers, "--layers"))

    from moe_lens.queries.memory import memory
    from moe_lens.queries.session import open_trace

    with ends_at_once(), open_trace(run, skip_damaged=skip_damaged) as trace:
        infos = trace.info().runs
        known = {x.layer for info in infos for x in info.layers}
        found: dict[str, list[LayerMemory]] = {}
        for each in memory(
            trace, phase=phase, layers=chosen, unit=unit.value, batch=batch, most=tokens
        ):
            found.setdefault(each.phase, []).append(each)
    said = []
    for name, measured in found.items():
        weighed = [_weighed(each, dtype.value, expert_mb) for each in measured]
        missing = (chosen or known) - {each.info.layer for each in measured}
        phase_said = _phase(name, measured, weighed, resident, bandwidth, hit_rate)
        said.append(phase_said | {"not_measured": sorted(missing)})
    by_forward = unit is UnitName.forward
    _print(said, as_json, infos[0].made_steps if by_forward else "")


def _weighed(each: LayerMemory, dtype: str, expert_mb: float | None) -> Layer:
    from moe_lens.metrics.summary import Layer

    return Layer(each.info.layer, each.memory, bytes_of(each.info, dtype, expert_mb))


def bytes_of(info: LayerInfo, dtype: str, expert_mb: float | None) -> float | None:
    """Bytes of an expert of a layer, from `--expert-mb` or its sizes; None: not known."""
    from moe_lens.metrics.stall import expert_bytes

    if expert_mb is not None:
        return expert_mb * 1e6
    if info.hidden_size is None or info.intermediate_size is None:
        return None
    return expert_bytes(info.hidden_size, info.intermediate_size, dtype)


def _phase(
    name: str,
    measured: list[LayerMemory],
    weighed: list[Layer],
    resident: int | None,
    gb_per_s: float,
    wanted: float,
) -> dict[str, Any]:
    from moe_lens.metrics import summary

    size = resident or summary.default_size(weighed)
    most = max(each.memory.experts for each in weighed)
    if size > most:
        raise CommandError(f"--resident is at most {most}, the experts of a layer; got {size}.")
    return {
        "phase": name,
        "answers": summary.answers(name, weighed, size, gb_per_s, wanted),
        "wanted": {
            "hit_rate": wanted,
            **{p: summary.size_for(weighed, p, wanted) for p in ("lru", "optimum")},
        },
        "unit": measured[0].memory.unit,
        "size": size,
        "gb_per_s": gb_per_s,
        "tokens": max(each.memory.tokens for each in measured),
        "sequences": max(each.memory.sequences for each in measured),
        "sizes": summary.by_size(weighed, gb_per_s),
        "layers": summary.by_layer(weighed, size, gb_per_s),
        "tags": summary.by_tag(weighed),
        "curves": [_curves(each) for each in weighed],
    }


def _curves(each: Layer) -> dict[str, Any]:
    """All that was measured of a layer, for --json."""
    memory = each.memory
    tables = {
        "hit_rates": memory.hit_rates,
        "working_set": memory.growth,
        "recall": memory.recall,
        "grouping": memory.groups,
    }
    return {
        "layer": each.layer,
        "experts": memory.experts,
        "top_k": memory.top_k,
        "expert_bytes": each.expert_bytes,
        "accesses_before": memory.fitted,
        "accesses_counted": memory.counted,
        "requests_per_access": memory.requests,
        **{name: table.to_dict("records") for name, table in tables.items()},
    }


def _print(said: list[dict[str, Any]], as_json: bool, made_steps: str) -> None:
    if as_json:
        typer.echo(json.dumps(finite(said), ensure_ascii=False, indent=1))
        return
    from rich.console import Console

    from moe_lens.terminal.made_up import print_made_up
    from moe_lens.terminal.memory import print_phase

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    for each in said:
        print_phase(console, {k: v for k, v in each.items() if k != "curves"})
    print_made_up(console, made_steps)
