"""`moe-lens analyze`: the catalogue of routing metrics, each beside what chance gives."""

from __future__ import annotations

import difflib
import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.commands.arguments import Layers, Phase, Run, SkipDamaged, numbers
from moe_lens.commands.interrupt import ends_at_once
from moe_lens.errors import CommandError
from moe_lens.numbers import finite

if TYPE_CHECKING:
    from moe_lens.metrics.catalogue import Measured, Metric
    from moe_lens.metrics.chance import Chance
    from moe_lens.queries.info import RunInfo
    from moe_lens.queries.session import Trace


def analyze(
    run: Run,
    only: Annotated[
        str | None,
        typer.Option(help="Only these metrics or groups, as balance,z_loss.", metavar="NAME,..."),
    ] = None,
    phase: Phase = None,
    layers: Layers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
    skip_damaged: SkipDamaged = False,
) -> None:
    """Routing metrics of each layer, each beside what chance gives.

    Balance, confidence, losses, capacity, quality, specialisation, and which experts go together,
    in a layer, along a text and from layer to layer. Marks what chance does not explain, and says
    which metrics could not be computed and what would have to be recorded. docs/metrics.md defines
    them.

    \b
    Examples:
      moe-lens analyze traces/run1
      moe-lens analyze traces/run1 --only balance --phase eval
      moe-lens analyze traces/run1 --only max_vio,z_loss --layers 0-3 --json
    """  # noqa: D301  (\b keeps the lines as they are)
    # The matrices here are small: threads of their own would wait for each other, at full load.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    chosen = None if layers is None else frozenset(numbers(layers, "--layers"))
    asked = _asked(only)

    from moe_lens.queries.session import one_run, open_trace

    with ends_at_once(), open_trace(run, skip_damaged=skip_damaged) as trace:
        info = one_run(trace)
        _check(info, phase, chosen)
        said = [
            _phase(trace, info, each, chosen, asked)
            for each in ([phase] if phase is not None else info.phases)
        ]
    if as_json:
        typer.echo(json.dumps(finite(said), ensure_ascii=False, indent=1))
        return
    from rich.console import Console

    from moe_lens.terminal.analyzed import print_phase
    from moe_lens.terminal.made_up import print_made_up

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    for each in said:
        print_phase(console, each)
    print_made_up(console, info.made_steps)


def _asked(only: str | None) -> list[Metric]:
    from moe_lens.metrics.catalogue import GROUPS, metrics

    known = metrics()
    if only is None:
        return list(known.values())
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in known and name not in GROUPS:
            near = difflib.get_close_matches(name, [*known, *GROUPS], 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise CommandError(
                f"There is no metric {name!r}.{hint} Groups: {', '.join(GROUPS)}; metrics: "
                f"{', '.join(known)}."
            )
    return [m for m in known.values() if m.name in names or m.group in names]


def _check(info: RunInfo, phase: str | None, layers: frozenset[int] | None) -> None:
    if phase is not None and phase not in info.phases:
        raise CommandError(f"There is no phase {phase!r}. Phases: {', '.join(info.phases)}.")
    known = sorted(x.layer for x in info.layers)
    missing = sorted((layers or frozenset()) - set(known))
    if missing:
        raise CommandError(
            f"There is no layer {missing[0]}. MoE layers: {', '.join(map(str, known))}."
        )


def _phase(
    trace: Trace,
    info: RunInfo,
    phase: str,
    layers: frozenset[int] | None,
    asked: list[Metric],
) -> dict[str, Any]:
    from moe_lens.metrics.catalogue import measure
    from moe_lens.metrics.catalogued import lacking, sentence
    from moe_lens.queries.evidence import Evidences

    rows = []
    known = Evidences(trace, info, phase, asked, layers)
    for layer in info.layers:
        if layers is None or layer.layer in layers:
            # One layer's arrays at a time.
            of_layer = known.of(layer)
            found = [measure(each, of_layer) for each in asked]
            rows.append(
                {
                    "layer": layer.layer,
                    "experts": layer.experts,
                    "top_k": layer.top_k,
                    "router": layer.router,
                    "tokens": of_layer.tokens or None,
                    "looked_at": None if of_layer.ids_NK is None else len(of_layer.ids_NK),
                    "metrics": {x.metric.name: _said(x) for x in found},
                }
            )
    catalogue = [
        {"name": m.name, "group": m.group, "unit": m.unit, "level": m.level} for m in asked
    ]
    made = info.made_steps or None  # forwards that no engine ran, and how they were made
    said = {"phase": phase, "made_up_steps": made, "catalogue": catalogue, "layers": rows}
    through = _paths(trace, phase, layers) if _all_of("transitions", asked) else []
    return {"answer": sentence(said), **said, "paths": through, "lacking": lacking(said)}


def _all_of(group: str, asked: list[Metric]) -> bool:
    from moe_lens.metrics.catalogue import metrics

    return {m.name for m in metrics().values() if m.group == group} <= {m.name for m in asked}


def _paths(trace: Trace, phase: str, layers: frozenset[int] | None) -> list[dict[str, Any]]:
    """Paths have no layer: one answer for each stream."""
    from moe_lens.metrics.paths import sentence
    from moe_lens.queries.paths import paths

    return [
        {
            "stream": stream,
            "answer": sentence(found),
            "layers": found.layers,
            "tokens": found.tokens,
            "measures": {
                name: _number(value, found.chance[name]) for name, value in found.values.items()
            },
        }
        for stream, found in paths(trace, phase, layers).items()
    ]


def _said(found: Measured) -> dict[str, Any]:
    return {**_number(found.value, found.chance), "beyond": found.beyond, "lacks": found.lacks}


def _number(value: float, chance: Chance | None) -> dict[str, Any]:
    return {
        "value": value,
        "chance": None if chance is None else chance.expected,
        "chance_low": None if chance is None else chance.low,
        "chance_high": None if chance is None else chance.high,
        "beyond": "" if chance is None else chance.beyond(value),
    }
