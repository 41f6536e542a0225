"""`moe-lens replay`: what a recorded routing costs, on this machine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_lens.commands.arguments import Layers, Phase, Run, Steps, numbers, range_of
from moe_lens.commands.replay_ep import TIMEOUT_S, Options, replay_ep
from moe_lens.errors import CommandError
from moe_lens.numbers import finite

if TYPE_CHECKING:
    from moe_lens.replay.session import Progress, Replayed
    from moe_lens.replay.settings import Settings

FORWARDS, SECONDS = 24, 20.0


class PolicyName(StrEnum):
    """What becomes of the router's choices."""

    recorded = "recorded"
    dropless = "dropless"
    drop = "drop"
    reroute = "reroute"


class Priority(StrEnum):
    """What a full expert keeps."""

    position = "position"
    prob = "prob"


class Dtype(StrEnum):
    """Of weights and rows."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def replay(
    run: Run,
    policy: Annotated[
        PolicyName, typer.Option(help="What becomes of the router's choices.")
    ] = PolicyName.recorded,
    capacity_factor: Annotated[
        float | None,
        typer.Option(help="Of drop and reroute: room per expert; default 1.25."),
    ] = None,
    priority: Annotated[
        Priority | None,
        typer.Option(help="Of drop and reroute: what a full expert keeps; default position."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Keep only so many choices a token.", min=1)
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Sizes of a published model: mixtral-8x7b, olmoe-1b-7b, ….")
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(help="Hidden size; default: the trace's.", min=1)
    ] = None,
    intermediate: Annotated[
        int | None, typer.Option(help="Size of an expert; default: the trace's.", min=1)
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Default: bfloat16 where the device is quick with it.")
    ] = None,
    layers: Layers = None,
    phase: Phase = None,
    steps: Steps = None,
    forwards: Annotated[
        str | None,
        typer.Option(help=f"Forwards of each phase, or all; default {FORWARDS}.", metavar="N|all"),
    ] = None,
    partial: Annotated[
        bool,
        typer.Option("--partial", help="Forwards with rows of some tokens, as smaller batches."),
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            help=f"Begin no forward after so many; 0: no limit; default {SECONDS:g} without "
            "--forwards.",
            min=0,
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Measurements of each forward.", min=2)] = 5,
    stages: Annotated[
        bool, typer.Option("--stages", help="Time the stages of the layer too.")
    ] = False,
    curve: Annotated[
        bool, typer.Option(help="Measure what one expert takes, and attribute time to experts.")
    ] = True,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Of the layer: auto, reference, cpu, cuda+triton, ….")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the random weights and inputs.")] = 0,
    ep: Annotated[
        int | None, typer.Option("--ep", help="Spread experts over so many ranks.", min=1)
    ] = None,
    placement: Annotated[
        str | None,
        typer.Option(
            help="Of --ep: contiguous (default), lpt, eplb, affinity, or a plan's file.",
            metavar="METHOD|FILE",
        ),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(help="Of --ep: slots of a layer beyond its experts.", min=0)
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="Of --ep: machines on which the ranks lie.", min=1)
    ] = None,
    dispatch_dtype: Annotated[
        str | None,
        typer.Option(help="Of --ep: as which rows are sent: fp8, bfloat16, …; default: as is."),
    ] = None,
    dedup: Annotated[
        bool, typer.Option(help="Of --ep: send a token once to a rank, or once for each choice.")
    ] = True,
    all_to_all: Annotated[
        str | None,
        typer.Option(
            help="Of --ep: h800, b200, h800-low-latency, or the file of moe-lens machine "
            "--all-to-all.",
            metavar="NAME|FILE",
        ),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(help="Of --ep: start a process for each rank, which exchange rows.", min=1),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            help=f"Of --nproc: give up when a rank is silent for so many seconds; default "
            f"{TIMEOUT_S:g}.",
            min=1,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the result, RUN/replay/NAME.parquet.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
) -> None:
    """Run a trace's routing through a real MoE layer, and time it beside a balanced one.

    Prints for each layer what its forwards took, next to the least this machine could take, to the
    same rows spread evenly over all experts, and to those over the experts that were touched.
    Weights are random; expert ids and gate weights are the trace's.

    \b
    Examples:
      moe-lens replay traces/run1
      moe-lens replay traces/run1 --preset mixtral-8x7b --phase decode
      moe-lens replay traces/run1 --policy drop --capacity-factor 1
      moe-lens replay traces/run1 --top-k 1 --forwards all
      moe-lens replay traces/run1 --ep 8 --placement eplb --replicas 16
      moe-lens replay traces/run1 --ep 2 --nproc 2
    """  # noqa: D301  (\b keeps the lines as they are)
    chosen_layers = None if layers is None else frozenset(numbers(layers, "--layers"))
    chosen_steps = None if steps is None else range_of(steps)
    most, limit = _how_many(forwards, seconds)
    group = Options(
        ep=ep,
        placement=placement,
        replicas=replicas,
        nodes=nodes,
        dispatch_dtype=dispatch_dtype,
        dedup=dedup,
        all_to_all=all_to_all,
        nproc=nproc,
        timeout=timeout,
    )
    _check_policy(policy, capacity_factor, priority)

    group.check(stages=stages)

    def settings() -> Settings:
        from moe_lens.replay.policies import Policy
        from moe_lens.replay.presets import preset as preset_of
        from moe_lens.replay.settings import Settings

        return Settings(
            policy=Policy(
                policy.value, capacity_factor, (priority or Priority.position).value, top_k
            ),
            hidden=hidden,
            intermediate=intermediate,
            preset=None if preset is None else preset_of(preset),
            dtype=None if dtype is None else dtype.value,
            device=device,
            backend=backend,
            forwards=most,
            partial=partial,
            layers=chosen_layers,
            phase=phase,
            steps=chosen_steps,
            repeats=repeats,
            seconds=limit,
            stages=stages,
            curve=curve,
            seed=seed,
        )

    if group.ep is not None:
        replay_ep(run, group, settings, _progress_bar, name=name, out=out, as_json=as_json)
        return
    with _progress_bar() as on_progress:  # first: importing torch takes seconds
        from moe_lens.replay.session import replay as run_replay

        found = run_replay(run, settings(), name=name, out=out, on_progress=on_progress)
    _print(found, as_json)
    if found.interrupted:
        typer.echo(f"interrupted: what was measured so far is in {found.path}", err=True)
        raise typer.Exit(130)


def _print(found: Replayed, as_json: bool) -> None:
    if as_json:
        said = {
            "result": str(found.path),
            "answers": found.answers(),
            "layers": found.by_layer(),
            "about": found.about,
        }
        typer.echo(json.dumps(finite(said), ensure_ascii=False, indent=1))
        return
    from rich.console import Console

    from moe_lens.terminal.replayed import print_replay

    console = Console(highlight=False)
    print_replay(console, found.about, found.by_layer(), found.answers(), str(found.path))


def _check_policy(
    policy: PolicyName, capacity_factor: float | None, priority: Priority | None
) -> None:
    if policy in (PolicyName.drop, PolicyName.reroute):
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise CommandError(f"--capacity-factor must be above 0, got {capacity_factor:g}.")
        return
    for option, value in (("--capacity-factor", capacity_factor), ("--priority", priority)):
        if value is not None:
            raise CommandError(
                f"{option} belongs to --policy drop and --policy reroute; {policy.value} has no "
                "capacity."
            )


def _how_many(forwards: str | None, seconds: float | None) -> tuple[int | None, float | None]:
    """Forwards of each phase (None: all), and the time limit (None: none)."""
    limit = seconds or None
    if forwards is None:
        return FORWARDS, SECONDS if seconds is None else limit
    if forwards == "all":
        return None, limit
    if not forwards.isdecimal() or int(forwards) < 1:
        raise CommandError(f"--forwards takes a number from 1 up, or all; got {forwards!r}.")
    return int(forwards), limit


@contextmanager
def _progress_bar() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, nothing elsewhere; yields what feeds it."""
    from rich import progress as rich
    from rich.console import Console

    console = Console(stderr=True)
    with rich.Progress(
        rich.TextColumn("replay"),
        rich.BarColumn(bar_width=None),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.description}"),
        console=console,
        expand=True,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("loading torch, reading the trace", total=None)

        def on_progress(now: Progress) -> None:
            bar.update(task, completed=now.done, total=now.of or None, description=now.now)

        yield on_progress
