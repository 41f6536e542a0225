"""`moe-lens lab`: experiments on Mixture-of-Experts layers. `granularity`: what does k buy?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_lens.errors import CommandError

if TYPE_CHECKING:
    from rich.console import Console

    from moe_lens.commands.lab_results import Results
    from moe_lens.granularity.presets import Plan
    from moe_lens.granularity.runs import Row, Run

lab = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Experiments on Mixture-of-Experts layers, here and now.",
)


class Preset(StrEnum):
    """Of the laboratory."""

    quick = "quick"
    relu = "relu"
    constant = "constant"
    paper = "paper"


class Device(StrEnum):
    """Where students are trained."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@lab.callback()
def _lab() -> None:
    """A group, though it has one command: others are to come."""


@lab.command()
def granularity(
    preset: Annotated[
        Preset,
        typer.Option(
            help="quick: linear experts, 70 s on 2 cores; relu, constant: the same with experts "
            "that are ReLU networks, or vectors; paper: its grid, hours on a GPU."
        ),
    ] = Preset.quick,
    out: Annotated[
        Path, typer.Option(help="Folder of the results; an interrupted one goes on.", metavar="DIR")
    ] = Path("traces/granularity"),
    steps: Annotated[
        int | None, typer.Option(help="Training steps of each student; default: 4,000.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.", min=0)] = 0,
    teacher: Annotated[
        str | None,
        typer.Option(help="Experts, and how many a token uses; default: 16e8a.", metavar="MeKa"),
    ] = None,
    students: Annotated[
        str | None, typer.Option(help="Only these, as 16e8a,4e2a.", metavar="MeKa,...")
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(help="Size of inputs; default: 32, the paper's is 256.", min=1)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Students trained at a time; default: one a core.", min=1)
    ] = None,
    device: Annotated[
        Device, typer.Option(help="auto: a GPU for the preset paper, if there is one.")
    ] = Device.auto,
    force: Annotated[
        bool, typer.Option("--force", help="Begin anew where results are already.")
    ] = False,
) -> None:
    """Teach layers that use few experts a token what one that uses many does (arXiv 2505.06839).

    A teacher uses 8 of its 16 experts a token. Students of as many active parameters (and a quarter
    more) that use 8, 4, 2 and 1 learn it; then some that use 2, but wider or more of them. Beside
    each: predicting zero, and the best affine map. Then: the regions into which routers cut the
    plane, and how many sets of experts a router reaches as its inputs have more dimensions.

    DIR gets results.parquet (a row a student, written as each finishes), regions.parquet,
    pictures.parquet, configurations.parquet, figures.html, and routing/: a trace of the trained
    routers, for moe-lens analyze and the dashboard.

    \b
    Examples:
      moe-lens lab granularity
      moe-lens lab granularity --preset relu --out traces/relu
      moe-lens lab granularity --preset paper --out traces/paper
    """  # noqa: D301  (\b keeps the lines as they are)
    # As for the demo: threads that spin while they wait take the cores from the other students.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    import torch
    from rich.console import Console

    from moe_lens.commands.lab_results import Results
    from moe_lens.granularity.presets import plan
    from moe_lens.granularity.shapes import read_name

    planned = plan(
        preset.value,
        seed=seed,
        steps=steps,
        hidden=hidden,
        teacher=None if teacher is None else read_name(teacher),
        students=None if students is None else [read_name(s) for s in students.split(",")],
    )
    place = _device(device, preset is Preset.paper)
    results = Results(out, planned, force=force)
    torch.set_num_threads(1)  # students run side by side instead
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    _train(console, planned, results, workers or _workers(place), place)
    _look(console, planned, results)


def _device(asked: Device, paper: bool) -> str:
    import torch

    there = torch.cuda.is_available()
    if asked is Device.cuda and not there:
        raise CommandError("--device cuda: torch finds no CUDA device here; leave it out.")
    return "cuda" if there and (asked is Device.cuda or (paper and asked is Device.auto)) else "cpu"


def _workers(device: str) -> int:
    """Of a GPU, a student uses a small part; its launches keep a core busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores or 1 if device == "cpu" else min(cores or 1, 4)


def _train(console: Console, planned: Plan, results: Results, workers: int, device: str) -> None:
    from moe_lens.granularity.side_by_side import executed

    todo = [run for run in planned.runs if run.name not in results.names]
    if kept := len(planned.runs) - len(todo):
        console.print(f"{kept} of {len(planned.runs)} students are in {results.folder} already.")
    try:
        with progress_bar(console, len(todo) * planned.recipe.steps) as (on_progress, on_row):
            for row in executed(
                todo, planned.recipe, workers=workers, device=device, on_progress=on_progress
            ):
                results.add(row)
                on_row(row, planned.recipe.steps)
    except KeyboardInterrupt:
        said = f"{len(results.rows)} of {len(planned.runs)} students are kept in {results.folder}"
        typer.echo(f"\ninterrupted: {said}; the same command goes on from there.", err=True)
        raise


@contextmanager
def progress_bar(
    console: Console, total: int
) -> Iterator[tuple[Callable[[Run, int], None], Callable[[Row, int], None]]]:
    """A bar over the steps of all students; yields what feeds it within a run, and at its end."""
    from rich import progress as rich

    done: dict[str, int] = {}
    with rich.Progress(
        rich.TextColumn("training"),
        rich.BarColumn(bar_width=None),
        rich.TaskProgressColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[said]}"),
        console=console,
        expand=True,
        transient=True,
    ) as bar:
        task = bar.add_task("training", total=max(total, 1), said="")

        def on_progress(run: Run, steps: int) -> None:
            done[run.name] = steps
            bar.update(task, completed=sum(done.values()))

        def on_row(row: Row, steps: int) -> None:
            done[row.name] = steps
            bar.update(task, completed=sum(done.values()), said=f"{row.name}: {row.nmse:.3g}")

        yield on_progress, on_row


def _look(console: Console, planned: Plan, results: Results) -> None:
    """What needs no training, the recording, the page, and what is printed."""
    import moe_lens
    from moe_lens.commands.demo import make_way
    from moe_lens.commands.lab_page import save_figures
    from moe_lens.granularity import findings, published, regions
    from moe_lens.granularity.recorder import record_routing
    from moe_lens.terminal.granularity import print_lab

    by_name = {row.name: row for row in results.rows}  # in the order in which they finished
    rows = [by_name[run.name] for run in planned.runs]
    learnt = {"gap": findings.gap(planned, rows), "sweeps": findings.sweeps(planned, rows)}
    routing, counted = results.folder / "routing", results.counted()
    if counted is None:
        with console.status("Counting regions and sets …"):
            counted = {
                "regions": regions.region_counts(planned, rows),
                "pictures": regions.pictures(planned, rows),
                "configurations": regions.realised_sets(planned.seed),
            }
            for name, table in counted.items():
                results.save(name, table)
        with console.status("Recording the routing of teachers and students …"):
            make_way(routing, force=True)
            with moe_lens.record(None, routing, tokens=1.0) as recorder:
                record_routing(recorder, planned, rows)
        save_figures(results.page, learnt | counted)
    about = asdict(planned.recipe) | {"preset": planned.preset, "hidden": planned.hidden,
                                      "kind": planned.kind, "seed": planned.seed}  # fmt: skip
    source = published.SOURCE if planned.preset == "paper" else ""
    print_lab(console, learnt | counted, about, source)
    console.print(f"figures: {results.page}", soft_wrap=True)
    console.print(f"routing: moe-lens analyze {routing}", soft_wrap=True)
