"""`moe-lens import`: another recorder's file becomes a trace."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_lens.commands.arguments import numbers
from moe_lens.errors import CommandError
from moe_lens.numbers import counted

if TYPE_CHECKING:
    from moe_lens.importers.importing import Imported
    from moe_lens.importers.source import Given


def import_(
    path: Annotated[
        Path, typer.Argument(help="File, or folder of a dump's files.", metavar="PATH")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the trace.", metavar="RUN")],
    format: Annotated[
        str | None,
        typer.Option(
            help="sglang, sglang-responses, vllm, megatron, tensorrt-llm, moe-policylang or "
            "llama.cpp; default: found out."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="config.json of the model: experts, top-k, sizes, blocks without experts.",
            metavar="JSON",
        ),
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Experts of a layer.", min=1)] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts a token chooses.", min=1)] = None,
    dense_blocks: Annotated[
        str | None, typer.Option(help="Decoder blocks without experts, as 0-2.", metavar="BLOCKS")
    ] = None,
    blocks: Annotated[int | None, typer.Option(help="Decoder blocks of the model.", min=1)] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden size of the model.", min=1)] = None,
    intermediate: Annotated[
        int | None, typer.Option(help="Intermediate size of one expert.", min=1)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    score: Annotated[
        str | None, typer.Option(help="How logits become probabilities: softmax or sigmoid.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence, where the file does not tell.", min=1)
    ] = None,
    first_position: Annotated[
        int | None,
        typer.Option(help="Position of the first token, where requests asked from one on.", min=0),
    ] = None,
    pipeline_stages: Annotated[
        int | None,
        typer.Option(help="Pipeline stages, where each numbers its layers from 0.", min=1),
    ] = None,
    phase: Annotated[str | None, typer.Option(help="Phase of all that is in it.")] = None,
    tag: Annotated[str | None, typer.Option(help="Tag of what has none.")] = None,
    batch_tokens: Annotated[
        int, typer.Option(help="Prompt tokens of a made-up forward at most.", min=1)
    ] = 8192,
    batch_sequences: Annotated[
        int, typer.Option(help="Sequences that decode at the same time at most.", min=1)
    ] = 256,
    allow_gaps: Annotated[
        bool, typer.Option("--allow-gaps", help="Take files in which passes are missing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a trace that is already there.")
    ] = False,
) -> None:
    """Turn what another tool recorded into a trace: SQL, dashboard, placement and replay for it.

    Everything is checked. A file that is damaged or short of a fact is refused in one line that
    names the place, and nothing half-written is left behind. Formats that know requests but no
    forwards are laid into made-up ones (--batch-tokens, --batch-sequences), and the trace says so.

    \b
    Examples:
      moe-lens import expert_distribution_recorder_1763.5_0.pt --out traces/served
      moe-lens import responses.jsonl --config model/config.json --out traces/served
    """  # noqa: D301  (\b keeps the lines as they are)
    from rich.console import Console

    from moe_lens.importers.batching import Batching
    from moe_lens.importers.importing import import_trace
    from moe_lens.importers.source import Given

    if score not in (None, "softmax", "sigmoid"):
        raise CommandError(f"--score is softmax or sigmoid, got {score!r}.")
    said = Given(
        experts=experts,
        top_k=top_k,
        dense_blocks=None if dense_blocks is None else _blocks(dense_blocks),
        blocks=blocks,
        hidden_size=hidden,
        intermediate_size=intermediate,
        model=model,
        score=score,
        sequence_length=sequence_length,
        first_position=first_position,
        pipeline_stages=pipeline_stages,
        phase=phase,
        tag=tag,
        allow_gaps=allow_gaps,
    )
    if config is not None:
        said = _with_config(said, config)
    console = Console(stderr=True, highlight=False)
    with console.status("") as status:

        def show(done: Imported) -> None:
            status.update(f"{done.tokens:,} tokens, {done.passes:,} forwards")

        done = import_trace(
            path,
            out,
            format=format,
            given=said,
            batching=Batching(batch_tokens, batch_sequences),
            force=force,
            on_progress=show,
        )
    for line in _lines(done):
        typer.echo(line)


def _blocks(text: str) -> tuple[int, ...]:
    """`0-2`; "none" where every block has experts."""
    return () if text == "none" else tuple(numbers(text, "--dense-blocks"))


def _with_config(said: Given, config: Path) -> Given:
    """What the user says goes before what the model's file says."""
    from moe_lens.importers.model_config import from_config

    known = from_config(config)
    own = {f.name: v for f in fields(said) if (v := getattr(said, f.name)) is not None}
    return replace(known, **own)


def _lines(done: Imported) -> list[str]:
    lines = [
        f"{done.run}: {counted(done.tokens, 'token')} in {counted(done.passes, 'forward')}, "
        f"{counted(done.token_layers, 'routing decision')} (tokens times layers), "
        f"read as {done.format}"
    ]
    if done.steps:
        lines.append(f"steps: {done.steps}")
    lines += [f"{text} ({n:,}×)" if n > 1 else text for text, n in done.notes.items()]
    lines += [f"no {what}: {why}" for what, why in done.lacks.items()]
    return lines
