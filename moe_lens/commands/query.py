"""`moe-lens query`: SQL, or a stored question, over a trace."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_lens.commands.arguments import SkipDamaged
from moe_lens.commands.interrupt import ends_at_once
from moe_lens.errors import CommandError


class Format(StrEnum):
    """How an answer is written."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


def query(
    run: Annotated[Path | None, typer.Argument(help="Folder of a trace.", metavar="RUN")] = None,
    text: Annotated[
        str | None, typer.Argument(help="SQL, or the name of a stored question.", metavar="QUERY")
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(help="A parameter, as NAME=VALUE; may be repeated.", metavar="NAME=VALUE"),
    ] = None,
    format: Annotated[
        Format | None, typer.Option(help="Default: table, or what --out ends with.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write to this file instead of the terminal.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows that a table shows at most.", min=1)] = 200,
    show_list: Annotated[
        bool, typer.Option("--list", help="List the stored questions and exit.")
    ] = False,
    skip_damaged: SkipDamaged = False,
) -> None:
    """Ask a trace: a stored question by name, or SQL over its tables.

    \b
    Examples:
      moe-lens query --list
      moe-lens query traces/run1 layer_balance --param phase=eval
      moe-lens query traces/run1 "select layer, sum(routed) from load group by all"
      moe-lens query traces/run1 expert_load --out load.csv
    """  # noqa: D301  (\b keeps the lines as they are)
    if show_list:
        typer.echo(_listing())
        return
    if run is None or text is None:
        raise CommandError(
            "query takes a run and a query. moe-lens query --list shows the stored ones."
        )
    chosen = format or _format_of(out)
    if chosen is Format.parquet and out is None and sys.stdout.isatty():
        raise CommandError("Parquet is not for a terminal: name a file with --out.")

    from moe_lens.commands.answers import to_text, write_parquet
    from moe_lens.queries.session import open_trace

    parameters = dict(_parameter(p) for p in param or [])
    with ends_at_once(), open_trace(run, skip_damaged=skip_damaged) as trace:
        if _is_sql(text):
            answer = trace.sql(text, **{k: _guess(v) for k, v in parameters.items()})
        else:
            answer = trace.query(text, **parameters)
        damaged = (
            [path for each in trace.info().runs for path in each.damaged] if skip_damaged else []
        )
        replays = text != "replay_layers" or trace.sql("select 1 from replay limit 1").rows()
    if not replays:
        typer.echo(f"{run} holds no result of a replay: moe-lens replay {run} makes one.", err=True)
    if text == "hottest_experts" and not len(answer):
        typer.echo(
            f"No tag chose an expert {parameters.get('min_routed', '100')} times: lower it with "
            "--param min_routed=1.",
            err=True,
        )
    for path in damaged:
        typer.echo(f"left out, damaged: {path}", err=True)
    if chosen is Format.parquet:
        write_parquet(answer, out)
    elif out is None:
        typer.echo(to_text(answer, chosen.value, rows), nl=False)
    else:
        out.write_text(to_text(answer, chosen.value, None), encoding="utf-8")


def _listing() -> str:
    from moe_lens.queries.catalog import questions

    blocks = []
    for name, asked in questions().items():
        lines = [name, *(f"    {line}" for line in asked.doc.splitlines())]
        for p in asked.parameters:
            default = "" if p.default is None else f", default {p.default}"
            lines.append(f"      --param {p.name}=… ({p.type}{default}) {p.doc}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _format_of(out: Path | None) -> Format:
    if out is None:
        return Format.table
    suffix = out.suffix.removeprefix(".")
    return Format(suffix) if suffix in {f.value for f in Format} else Format.table


def _is_sql(text: str) -> bool:
    return any(c.isspace() for c in text)


def _parameter(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise CommandError(f"--param takes NAME=VALUE, got {text!r}.")
    return name, value


def _guess(text: str) -> object:
    """A parameter of free SQL has no declared type: a JSON scalar is one, the rest is text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, dict | list) else value
