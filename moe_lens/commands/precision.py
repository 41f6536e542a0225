"""`moe-lens precision`: what low precision does to a model's routes and loss."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.commands.arguments import Layers, Run, numbers
from moe_lens.commands.measuring import measuring
from moe_lens.commands.user_code import load_batches, load_loss, load_model
from moe_lens.errors import CommandError
from moe_lens.numbers import finite

if TYPE_CHECKING:
    from moe_lens.trace.precision import Precision

Named = "MODULE:NAME"


def precision(
    run: Run,
    model: Annotated[
        str | None,
        typer.Option(help="Function that returns the model that was recorded.", metavar=Named),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Batches, or a function that returns them.", metavar=Named),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="Function of (model, batch): the loss of each token; default: of the next one.",
            metavar=Named,
        ),
    ] = None,
    formats: Annotated[
        str,
        typer.Option(help="int8, int4, … int2, fp8; int4:32 has a scale for 32 inputs."),
    ] = "int8,int4,fp8",
    parts: Annotated[
        str, typer.Option(help="Whose weights: router, experts, both.")
    ] = "router,experts,both",
    layers: Layers = None,
    tokens: Annotated[int, typer.Option(help="Take batches up to so many tokens.", min=1)] = 4096,
    tokens_at_once: Annotated[
        int, typer.Option(help="Of one forward: larger batches go in pieces.", min=1)
    ] = 4096,
    name: Annotated[str, typer.Option(help="Of the result, RUN/precision/NAME.parquet.")] = (
        "precision"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
) -> None:
    """Round the weights of routers and experts, and see what that does to routes and loss.

    Each layer alone; all together with routes as they then are; and all together with routes as
    they were: the error of routing is told from that of arithmetic. First the model is run with its
    own choices forced, which must reproduce it bit for bit. The model stays as it is. Ctrl-C keeps
    what was measured. Without --model and --data, prints the result of that name again.

    \b
    Examples:
      moe-lens precision traces/run1 --model lab:model --data lab:batches
      moe-lens precision traces/run1 --model lab.py:model --data lab.py:batches --formats int4:32
      moe-lens precision traces/run1
    """  # noqa: D301  (\b keeps the lines as they are)
    if (model is None) != (data is None):
        raise CommandError("--model and --data belong together: give both, or none to read.")
    if model is None or data is None:
        from moe_lens.trace.precision import read_result

        found = read_result(run, name)
    else:
        from moe_lens.trace.precision import PRECISION

        chosen = None if layers is None else numbers(layers, "--layers")
        with measuring(run, PRECISION, name, model, data) as on_progress:
            from moe_lens_hooks.steering.precision import precision as measure
            from moe_lens_hooks.steering.token_losses import next_token_loss

            found = measure(
                load_model(model),
                load_batches(data),
                run,
                loss=next_token_loss if loss is None else load_loss(loss),
                formats=_names(formats),
                parts=_names(parts),  # type: ignore[arg-type]  # it says which there are
                layers=chosen,
                tokens=tokens,
                name=name,
                tokens_at_once=tokens_at_once,
                on_progress=on_progress,
            )
    _print(found, as_json)
    if found.interrupted and model is not None:
        typer.echo(f"interrupted: what was measured so far is in {found.path}", err=True)
        raise typer.Exit(130)


def _names(text: str) -> list[str]:
    return [x for x in (part.strip() for part in text.split(",")) if x]


def _print(found: Precision, as_json: bool) -> None:
    columns = found.columns()
    if as_json:
        from moe_lens.metrics import precision as metrics

        tables = {
            "loss": metrics.loss_split(columns),
            "routes": metrics.routing_agreement(columns),
            "flips": metrics.flips_by_margin(columns),
            "layers": metrics.layer_errors(columns),
            "weights": metrics.weight_errors(columns),
        }
        said: dict[str, Any] = {"result": str(found.path), "about": found.about}
        said |= {name: table.to_dict("records") for name, table in tables.items()}
        typer.echo(json.dumps(finite(said), ensure_ascii=False, indent=1, default=str))
        return
    import sys

    from rich.console import Console

    from moe_lens.terminal.precision import print_precision

    width = None if sys.stdout.isatty() else 110
    console = Console(highlight=False, width=width)
    print_precision(console, found.about, columns, str(found.path))
