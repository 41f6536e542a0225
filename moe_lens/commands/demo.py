"""`moe-lens demo`: train a small real MoE language model, record it, print the report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_lens.errors import CommandError

if TYPE_CHECKING:
    from rich.console import Console

    from moe_lens.demo.corpus import Domain
    from moe_lens.demo.model import MoEConfig, MoELanguageModel
    from moe_lens.demo.train import Progress

WHAT_IF_WINDOWS = 2
"""Of each domain, in which routing is changed: 1,024 tokens in all."""
WHAT_IF_ROUTES = 64
"""Of these tokens, those for which other routes are tried, one by one."""


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder of the trace that is written.", metavar="RUN")
    ] = Path("traces/demo"),
    steps: Annotated[
        int | None, typer.Option(help="Training steps; default: 480, about two minutes.", min=1)
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Train for this time, in place of a number of steps.")
    ] = None,
    every: Annotated[
        int, typer.Option(help="Every routing decision is kept in one step of so many.", min=1)
    ] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the text's order.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads that torch uses.", min=1)] = 2,
    what_if: Annotated[
        bool,
        typer.Option(
            "--what-if/--no-what-if",
            help="Measure what each expert and other routes are worth, some 15 seconds.",
        ),
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a trace that is already there.")
    ] = False,
) -> None:
    """Train a small Mixture-of-Experts language model here and now, and see where its tokens go.

    It learns Python, English prose, JavaScript and C++ from files that every installation has, for
    about two minutes on two CPU cores, is evaluated on held-out files of each, and ends with the
    report. The trace counts every routing decision, and has those of each 20th step one by one.

    \b
    Examples:
      moe-lens demo
      moe-lens demo --minutes 10 --out traces/longer
    """  # noqa: D301  (\b keeps the lines as they are)
    if steps is not None and minutes is not None:
        raise CommandError("--steps and --minutes exclude each other: give one of them.")
    if minutes is not None and minutes <= 0:
        raise CommandError(f"--minutes must be above 0, got {minutes:g}.")
    make_way(out, force)
    # Read when torch is loaded. By default its threads spin while they wait for each other, which
    # on a machine with anything else to do (the trace writer, say) costs several times the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    import torch
    from rich.console import Console

    import moe_lens
    from moe_lens.commands.report import report
    from moe_lens.demo.corpus import load_corpus
    from moe_lens.demo.evaluate import evaluate, evaluate_baseline, evaluate_baseline_told
    from moe_lens.demo.model import MoEConfig, MoELanguageModel
    from moe_lens.demo.train import Recipe, train

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    recipe = Recipe(seed=seed, seconds=None if minutes is None else 60 * minutes)
    if steps is not None:
        recipe = Recipe(seed=seed, steps=steps)
    console = Console(highlight=False)
    corpus = load_corpus()
    model = MoELanguageModel(MoEConfig())
    console.print(_heading(model.config, sum(p.numel() for p in model.parameters())))

    with moe_lens.record(model, out, tokens=moe_lens.every(every), token_ids=True) as recorder:
        with progress_bar(console) as on_step:
            train(model, corpus, recorder, recipe, on_step)
        with console.status("Evaluating on held-out files …"):
            bits = {"MoE": evaluate(model, corpus, recorder, length=recipe.length)}
    with console.status("Counting bytes, for comparison …"):
        length = recipe.length
        bits["order 2"] = evaluate_baseline(corpus, order=2, length=length)
        bits["order 2, told the domain"] = evaluate_baseline_told(corpus, order=2, length=length)
        bits["order 1"] = evaluate_baseline(corpus, order=1, length=length)
    if what_if:
        _measure_routes(model, corpus, out, length)
    print_bits(console, bits)
    report([out])
    if what_if:
        console.print(
            f"\nWhat its experts are worth: moe-lens counterfactual {out}", soft_wrap=True
        )


def _measure_routes(
    model: MoELanguageModel, corpus: Sequence[Domain], out: Path, length: int
) -> None:
    """Change the routing of held-out text, into the trace: the page What if shows it."""
    import moe_lens
    from moe_lens.commands.parts_bar import progress_bar as parts_bar
    from moe_lens.demo.batches import held_out_batch

    with parts_bar("What if …") as on_progress:
        moe_lens.counterfactual(
            model,
            [held_out_batch(corpus, WHAT_IF_WINDOWS, length)],
            out,
            loss=lambda asked, batch: asked(**batch).loss_BS,
            regret_tokens=WHAT_IF_ROUTES,
            on_progress=on_progress,
        )


def make_way(out: Path, force: bool) -> None:
    """Make sure that nothing lies where the trace will be written.

    Raises:
        CommandError: Something does, and ``force`` is off or it is not a trace.
        TraceLocked: It is a trace that a living process writes.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    ranks = sorted(out.glob("meta/rank=*.json"))
    if not ranks or out.is_symlink():
        raise CommandError(f"{out} exists and is not a trace: name another folder with --out.")
    if not force:
        raise CommandError(
            f"{out} holds a trace already: replace it with --force, or name another folder "
            "with --out."
        )
    from moe_lens.trace.lock import RankLock

    for path in ranks:
        RankLock(out, int(path.stem.removeprefix("rank="))).release()
    shutil.rmtree(out)


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A bar with step, loss, speed, load imbalance and dropped share; yields what feeds it."""
    from rich import progress as rich

    with rich.Progress(
        rich.TextColumn("{task.fields[step]}"),
        rich.BarColumn(bar_width=None),
        rich.TimeElapsedColumn(),
        rich.TextColumn("{task.fields[state]}"),
        console=console,
        expand=True,
    ) as bar:
        task = bar.add_task("training", total=1.0, step=0, state="")

        def on_step(now: Progress) -> None:
            state = f"{now.bits_per_byte:.2f} bits/byte  {now.tokens_per_second:,.0f} tok/s"
            if now.load_max_over_mean is not None:
                state += f"  max load {now.load_max_over_mean:.1f}×"
            if now.dropped_share is not None:
                state += f"  {now.dropped_share:.1%} dropped"
            bar.update(task, completed=now.done, step=now.step, state=state)

        yield on_step


def print_bits(console: Console, bits: Mapping[str, Mapping[str, float]]) -> None:
    """Print a table of bits per byte: a row a domain, a column a model."""
    from rich.table import Table

    table = Table(title="Held-out bits per byte", title_justify="left")
    table.add_column("domain")
    for name in bits:
        table.add_column(name, justify="right")
    for domain in next(iter(bits.values())):
        table.add_row(domain, *(f"{of_model[domain]:.3f}" for of_model in bits.values()))
    console.print(table)
    console.print(
        "Order n: interpolated counts of a byte after the n before it, "
        "fitted on the same training text."
    )


def _heading(config: MoEConfig, parameters: int) -> str:
    return (
        f"A byte-level MoE language model: {parameters / 1e6:.1f} M parameters, "
        f"{config.num_hidden_layers} layers of {config.num_experts} experts, "
        f"top-{config.num_experts_per_tok}."
    )
