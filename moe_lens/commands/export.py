"""`moe-lens export`: a trace in another tool's format."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_lens.commands.arguments import Layers, Phase, Run, Steps, numbers, range_of
from moe_lens.numbers import counted

_NAMED = 5
"""Sequences that are named of those that were left out for one reason."""


class Format(StrEnum):
    """Of the export."""

    eplb = "eplb"
    sglang = "sglang"
    npy = "npy"
    vllm_responses = "vllm-responses"
    sglang_responses = "sglang-responses"


def export(
    run: Run,
    format: Annotated[Format, typer.Option(help="What is written.")],
    out: Annotated[Path, typer.Option(help="File, or folder, to write.", metavar="PATH")],
    layers: Layers = None,
    phase: Phase = None,
    steps: Steps = None,
    tag: Annotated[str | None, typer.Option(help="Only tokens of this tag.")] = None,
    blocks: Annotated[
        int | None,
        typer.Option(help="Decoder blocks of the model, where the last ones have no experts."),
    ] = None,
    without_last: Annotated[
        bool,
        typer.Option(
            "--without-last", help="Leave out each sequence's last position: S - 1 rows of S."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write what a trace recorded as other tools read it: counts to place experts by, or routing.

    Counts: eplb (.npy, choices by MoE layer and expert, the weight of EPLB's rebalance_experts, in
    DeepSeek's package and in vLLM; vLLM 0.33 has no option that reads such a file) and sglang
    (.json of --init-expert-location, by decoder block). Routing of whole sequences, to replay it in
    RL training: npy (a folder of arrays and index.json), vllm-responses, sglang-responses (JSONL).
    Sequences that were not recorded whole are left out, and named.

    \b
    Examples:
      moe-lens export traces/run1 --format eplb --phase decode --out counts.npy
      moe-lens export traces/run1 --format sglang --out counts.json
      moe-lens export traces/run1 --format npy --tag math --out rollouts
    """  # noqa: D301  (\b keeps the lines as they are)
    from moe_lens.exporters.exporting import COUNTS, export_trace
    from moe_lens.exporters.selection import Selection

    done = export_trace(
        run,
        out,
        format.value,
        selection=Selection(
            layers=None if layers is None else frozenset(numbers(layers, "--layers")),
            phase=phase,
            steps=None if steps is None else range_of(steps),
            tag=tag,
        ),
        blocks=blocks,
        without_last=without_last,
        force=force,
    )
    if done.format in COUNTS:
        typer.echo(f"{done.out}: {counted(done.choices, 'choice')} counted")
        return
    sequences, tokens = counted(done.sequences, "sequence"), counted(done.tokens, "token")
    typer.echo(f"{done.out}: {sequences}, {tokens}")
    for reason, names in done.left_out.items():
        more = ", …" if len(names) > _NAMED else ""
        typer.echo(f"left out: {len(names):,} {reason}: {', '.join(names[:_NAMED])}{more}")
