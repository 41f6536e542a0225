"""`moe-lens context`: what a token's routing owes to its id, its content and its place."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.commands.arguments import Layers, Phase, Run, SkipDamaged, numbers
from moe_lens.commands.cache import Weight, bytes_of
from moe_lens.commands.interrupt import ends_at_once
from moe_lens.errors import CommandError, QueryError
from moe_lens.numbers import finite

if TYPE_CHECKING:
    from moe_lens.queries.pairing import Align


def context(
    run: Run,
    prefix: Annotated[
        str, typer.Option(help="Tokens of a beginning, or shares of a sequence: 16,64,25%.")
    ] = "16,32,64,128",
    after: Annotated[
        str, typer.Option(help="The beginning that says which experts are loaded ahead.")
    ] = "32",
    resident: Annotated[
        int | None,
        typer.Option(help="Experts of a layer on the device; default: half of them.", min=1),
    ] = None,
    cover: Annotated[
        float, typer.Option(help="Share of a beginning's choices that a constellation takes.")
    ] = 0.9,
    pair: Annotated[
        str | None,
        typer.Option(help="Column of `sequences` that pairs share; default: pair.", metavar="KEY"),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="Column that orders a pair; default: variant.", metavar="KEY"),
    ] = None,
    requests: Annotated[
        str | None, typer.Option(help="Pairs of request ids instead.", metavar="A=B,C=D")
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(
            help="ids (default), position, end, or a JSON file: blocks by pair.", metavar="HOW"
        ),
    ] = None,
    pairs: Annotated[int, typer.Option(help="Pairs to look at.", min=1)] = 64,
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
    tokens: Annotated[
        int, typer.Option(help="Of each layer, at most about so many are looked at.", min=2)
    ] = 16_384,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
    skip_damaged: SkipDamaged = False,
) -> None:
    """What context does to routing: prompts in another order, and how conversations begin.

    Pairs of sequences with the same content in another order are compared token by token. And of
    every sequence: how many of its later choices are of the experts that its first tokens chose
    most, beside as many popular ones; and which loads having them ahead would save.

    \b
    Examples:
      moe-lens context traces/run1
      moe-lens context traces/run1 --prefix 16,25% --resident 8 --phase decode
      moe-lens context traces/run1 --pair prompt --variant order --layers 0-3
      moe-lens context traces/run1 --requests a1=b1,a2=b2 --align end --json
    """  # noqa: D301  (\b keeps the lines as they are)
    for option, value in (("--bandwidth", bandwidth), ("--expert-mb", expert_mb)):
        if value is not None and not 0 < value < math.inf:
            raise CommandError(f"{option} must be above 0, got {value:g}.")
    if not 0 < cover <= 1:
        raise CommandError(f"--cover must be above 0, up to 1; got {cover:g}.")
    prefixes, loaded_after = _prefixes(prefix, "--prefix"), _prefixes(after, "--after")
    if len(loaded_after) != 1:
        raise CommandError(f"--after takes one beginning, as 32 or 25%; got {after!r}.")
    chosen = None if layers is None else frozenset(numbers(layers, "--layers"))
    named = _requests(requests)
    how = _alignment(align)

    from moe_lens.queries.context import conversations
    from moe_lens.queries.paired import paired
    from moe_lens.queries.session import one_run, open_trace
    from moe_lens.terminal import context_page

    said: dict[str, Any] = {}
    with ends_at_once(), open_trace(run, skip_damaged=skip_damaged) as trace:
        refused: list[QueryError] = []
        try:
            measured = list(conversations(
                trace, prefixes=prefixes, after=loaded_after[0], cover=cover, phase=phase,
                layers=chosen, key=pair or "pair", requests=named, most=tokens,
            ))  # fmt: skip
            of_expert = {x.info.layer: bytes_of(x.info, dtype.value, expert_mb) for x in measured}
            said["phases"] = context_page.phases(
                measured, of_expert, prefixes, loaded_after[0], resident, bandwidth
            )
            asked = one_run(trace).phases if phase is None else [phase]
            said["too_short"] = [x for x in asked if x not in {y.phase for y in measured}]
        except QueryError as e:
            refused.append(e)
            said |= {"phases": [], "too_short": [], "no_conversations": str(e)}
        try:
            found = paired(
                trace, key=pair or "pair", variant=variant or "variant", requests=named,
                align=how, phase=phase, layers=chosen, pairs=pairs, most=tokens,
            )  # fmt: skip
            said["pairs"] = context_page.pairs(found)
        except QueryError as e:
            # Whoever names pairs wants them; else most traces have none, which is no mistake.
            if refused or pair or variant or requests or align:
                raise (refused[0] if refused and not (pair or requests) else e) from None
            said |= {"pairs": None, "no_pairs": str(e)}
    _print(said, as_json)


def _print(said: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(finite(said), ensure_ascii=False, indent=1))
        return
    from rich.console import Console

    from moe_lens.terminal.context import print_context

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    print_context(console, said)


def _prefixes(text: str, option: str) -> list[float]:
    found = []
    for part in (x.strip() for x in text.split(",")):
        share = part.endswith("%")
        try:
            value = float(part.removesuffix("%")) / 100 if share else float(int(part))
        except ValueError:
            value = math.nan
        if not ((0 < value < 1) if share else value >= 1):
            raise CommandError(
                f"{option} takes tokens (1 or more) or shares of a sequence (above 0 %, below "
                f"100 %), as 16,64,25%; got {part!r}."
            )
        found.append(value)
    return found


def _requests(text: str | None) -> list[tuple[str, str]]:
    found = []
    for part in text.split(",") if text is not None else ():
        a, equals, b = (x.strip() for x in part.partition("="))
        if not (a and equals and b) or a == b:
            raise CommandError(f"--requests takes pairs of request ids, as a=b,c=d; got {part!r}.")
        found.append((a, b))
    return found


def _alignment(text: str | None) -> Align:
    from moe_lens.queries.pairing import ALIGN

    if text is None or text in ALIGN:
        return text or "ids"
    path = Path(text)
    if not path.is_file():
        raise CommandError(
            f"--align is one of {', '.join(ALIGN)}, or a JSON file with the blocks of each pair; "
            f"got {text!r}."
        )
    try:
        blocks = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise CommandError(f"{text} is no JSON: {e}.") from None
    if not isinstance(blocks, dict) or not all(map(_is_blocks, blocks.values())):
        raise CommandError(
            f'{text} must hold blocks by pair, {{"p17": [[0, 12, 40], …]}}: first position in the '
            "first, first in the second, tokens."
        )
    return blocks


def _is_blocks(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(x, list) and len(x) == 3 and all(type(n) is int for n in x) for x in value
    )
