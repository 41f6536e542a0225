"""`moe-lens place`: which rank should hold which experts, judged by recorded routing."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_lens.commands.arguments import Layers, Phase, Run, Steps, numbers, range_of
from moe_lens.errors import CommandError
from moe_lens.numbers import finite

if TYPE_CHECKING:
    from moe_lens.replay.placement.study import Study


class Format(StrEnum):
    """Of the plan that is written."""

    moe_lens = "moe-lens"
    sglang = "sglang"
    vllm = "vllm"
    vllm_ascend = "vllm-ascend"


class Dtype(StrEnum):
    """Of weights, and of what is sent."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    fp8 = "fp8"


def place(
    run: Run,
    ranks: Annotated[int, typer.Option(help="Ranks of the expert-parallel group.", min=1)],
    replicas: Annotated[
        int, typer.Option(help="Slots of a layer beyond one per expert, of all ranks.", min=0)
    ] = 0,
    nodes: Annotated[int, typer.Option(help="Machines on which the ranks lie.", min=1)] = 1,
    method: Annotated[
        str,
        typer.Option(help="Of the plan: contiguous, lpt, eplb, affinity, or a plan's file."),
    ] = "eplb",
    now: Annotated[
        Path | None,
        typer.Option(help="A plan: where experts lie now; default: in order, no replicas."),
    ] = None,
    compare: Annotated[bool, typer.Option(help="Judge the other ways to place too.")] = True,
    verdict: Annotated[
        bool, typer.Option("--verdict", help="Say whether it helps, window by window.")
    ] = False,
    least_gain: Annotated[
        float, typer.Option(help="Of a verdict: percent of gain that count.", min=0, max=99)
    ] = 5.0,
    bandwidth: Annotated[
        float, typer.Option(help="GB/s at which a rank can fetch experts.", min=0.001)
    ] = 50.0,
    dtype: Annotated[Dtype, typer.Option(help="Of weights, and of what is sent.")] = Dtype.bfloat16,
    layers: Layers = None,
    phase: Phase = None,
    steps: Steps = None,
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="Print max/mean of each layer too.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Of the plan; default: RUN/placement/….json.")
    ] = None,
    plan_format: Annotated[Format, typer.Option("--format", help="Of the plan.")] = Format.moe_lens,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
) -> None:
    """Place experts on ranks, and say what that would give, forward by forward.

    Plans are fitted to the earlier half of the run and judged by the later one. The plan that is
    written is fitted to all of it.

    \b
    Examples:
      moe-lens place traces/run1 --ranks 8
      moe-lens place traces/run1 --ranks 8 --replicas 16 --nodes 2 --verdict
      moe-lens place traces/run1 --ranks 16 --replicas 32 --format sglang --out experts.json
    """  # noqa: D301  (\b keeps the lines as they are)
    from moe_lens.replay.placement.fit import Group
    from moe_lens.replay.placement.formats import as_format, write_plan
    from moe_lens.replay.placement.study import Question, study

    question = Question(
        Group(ranks, replicas, nodes),
        method=method,
        now=None if now is None else str(now),
        layers=None if layers is None else frozenset(numbers(layers, "--layers")),
        phase=phase,
        steps=None if steps is None else range_of(steps),
        dtype=dtype.value,
        compare=compare,
        verdict=verdict,
        least_gain=least_gain / 100,
    )
    if layers is not None and plan_format is not Format.moe_lens:
        raise CommandError(
            f"--format {plan_format.value} is a file for the whole model: leave out --layers."
        )
    found = study(run, question)
    said = as_format(found.plan, plan_format.value, found.counts.infos)
    path = out or run / "placement" / f"{_name(found, plan_format, phase, layers, steps)}.json"
    if path.is_dir():
        raise CommandError(f"--out {path} is a folder: the plan is a file.")
    if now is not None and path.exists() and path.samefile(now):
        raise CommandError(f"{path} says where experts lie now: name another file with --out.")
    write_plan(path, said)
    if as_json:
        from moe_lens.replay.placement.said import as_dict

        typer.echo(json.dumps(finite(as_dict(found, str(path), 1e9 * bandwidth)), indent=1))
        return
    from rich.console import Console

    from moe_lens.terminal.placed import print_study

    console = Console(highlight=False)
    print_study(console, found, str(path), 1e9 * bandwidth, by_layer=by_layer)


def _name(
    found: Study, plan_format: Format, phase: str | None, layers: str | None, steps: str | None
) -> str:
    """eplb-8-ranks-16-replicas-2-nodes, what of the run it is of, and a format of others."""
    from moe_lens.replay.placement.methods import METHODS

    plan = found.plan
    if plan.method not in METHODS:
        return f"{Path(plan.method).stem}-again"
    words = [plan.method, f"{plan.ranks}-ranks"]
    if plan.slots > plan.experts:
        words.append(f"{plan.slots - plan.experts}-replicas")
    if plan.nodes > 1:
        words.append(f"{plan.nodes}-nodes")
    words += [word for word in (phase, layers and f"layers-{layers}") if word]
    words += [f"steps-{steps}"] if steps else []
    if plan_format is not Format.moe_lens:
        words.append(plan_format.value)
    return "-".join(words)
