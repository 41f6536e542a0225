"""`moe-lens counterfactual`: what a model's experts and routes are worth, by changing them."""

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
    from moe_lens.trace.counterfactual import Counterfactual

Named = "MODULE:NAME"


def counterfactual(
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
    layers: Layers = None,
    experts: Annotated[
        str | None,
        typer.Option(help="Only these of each layer, as 0-3,7.", metavar="EXPERTS"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Take batches up to so many tokens.", min=1)] = 4096,
    regret_tokens: Annotated[
        int, typer.Option(help="Try other routes of so many of them.", min=0)
    ] = 256,
    alternatives: Annotated[int, typer.Option(help="Other routes of each.", min=1)] = 8,
    tokens_at_once: Annotated[
        int, typer.Option(help="Of one forward: larger batches go in pieces.", min=1)
    ] = 4096,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    name: Annotated[
        str, typer.Option(help="Of the result, RUN/counterfactual/NAME.parquet.")
    ] = "counterfactual",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
) -> None:
    """Change a model's routing, layer by layer, and see what that does to its loss.

    Each expert is knocked out and forced in, the last choice is swapped for the runner-up, top-k
    goes from 1 to twice its own; and single tokens take other routes of as many experts. First the
    model is run with its own choices forced, which must reproduce it bit for bit. Ctrl-C keeps what
    was measured. Without --model and --data, prints the result of that name again.

    \b
    Examples:
      moe-lens counterfactual traces/run1 --model lab:model --data lab:batches
      moe-lens counterfactual traces/run1 --model lab.py:model --data lab.py:batches --layers 2
      moe-lens counterfactual traces/run1
    """  # noqa: D301  (\b keeps the lines as they are)
    if (model is None) != (data is None):
        raise CommandError("--model and --data belong together: give both, or none to read.")
    if model is None or data is None:
        from moe_lens.trace.counterfactual import read_result

        found = read_result(run, name)
    else:
        from moe_lens.trace.schema import COUNTERFACTUAL

        chosen = None if layers is None else numbers(layers, "--layers")
        some = None if experts is None else numbers(experts, "--experts")
        with measuring(run, COUNTERFACTUAL, name, model, data) as on_progress:
            from moe_lens_hooks.steering.counterfactual import counterfactual as measure
            from moe_lens_hooks.steering.token_losses import next_token_loss

            found = measure(
                load_model(model),
                load_batches(data),
                run,
                loss=next_token_loss if loss is None else load_loss(loss),
                layers=chosen,
                experts=some,
                tokens=tokens,
                regret_tokens=regret_tokens,
                alternatives=alternatives,
                tokens_at_once=tokens_at_once,
                seed=seed,
                name=name,
                on_progress=on_progress,
            )
    _print(found, as_json)
    if found.interrupted and model is not None:
        typer.echo(f"interrupted: what was measured so far is in {found.path}", err=True)
        raise typer.Exit(130)


def _print(found: Counterfactual, as_json: bool) -> None:
    columns = found.columns()
    if as_json:
        from moe_lens.metrics import counterfactual as metrics

        tables = {
            "experts": metrics.expert_importance(columns, found.about["moe_layers"]),
            "changes": metrics.route_changes(columns),
            **{
                f"regret{'' if by is None else f'_by_{by}'}": metrics.route_regret(columns, by)
                for by in (None, "tag", "margin", "entropy")
            },
        }
        said: dict[str, Any] = {"result": str(found.path), "about": found.about}
        said |= {name: table.to_dict("records") for name, table in tables.items()}
        typer.echo(json.dumps(finite(said), ensure_ascii=False, indent=1, default=str))
        return
    import sys

    from rich.console import Console

    from moe_lens.terminal.counterfactual import print_counterfactual

    width = None if sys.stdout.isatty() else 110
    console = Console(highlight=False, width=width)
    print_counterfactual(console, found.about, columns, str(found.path))
