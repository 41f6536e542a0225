"""The command line: which subcommands there are, and how their errors end a process.

Nothing heavy may be imported here or at the top of a command's file: `--help` must be quick.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from moe_lens.commands.analyze import analyze
from moe_lens.commands.cache import cache
from moe_lens.commands.check import check
from moe_lens.commands.context import context
from moe_lens.commands.counterfactual import counterfactual
from moe_lens.commands.dashboard import dashboard
from moe_lens.commands.demo import demo
from moe_lens.commands.diff import diff
from moe_lens.commands.export import export
from moe_lens.commands.import_ import import_
from moe_lens.commands.info import info
from moe_lens.commands.lab import lab
from moe_lens.commands.machine import machine
from moe_lens.commands.place import place
from moe_lens.commands.precision import precision
from moe_lens.commands.query import query
from moe_lens.commands.record import record
from moe_lens.commands.recover import recover
from moe_lens.commands.replay import replay
from moe_lens.commands.report import report
from moe_lens.errors import CommandError, MoeLensError

app = typer.Typer(
    name="moe-lens",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    demo, info, report, dashboard, diff, query, analyze, check, cache, context,
    place, replay, machine,
    recover, export, counterfactual, precision,
):  # fmt: skip
    app.command()(command)
app.command("import")(import_)
app.add_typer(lab, name="lab")
# What stands after SCRIPT is the script's.
app.command(context_settings={"allow_interspersed_args": False})(record)


def _show_version(asked: bool) -> None:
    if asked:
        import moe_lens

        typer.echo(f"moe-lens {moe_lens.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """See and query the routing of Mixture-of-Experts models.

    \b
    moe-lens demo                             watch a small MoE language model learn
    moe-lens record train.py                  record the MoE models of any script
    moe-lens report traces/run1               where its tokens went
    moe-lens dashboard traces/run1            look at it in a browser
    moe-lens query traces/run1 "from load"    ask anything in SQL
    moe-lens analyze traces/run1              every metric beside what chance gives
    moe-lens check traces/run1                alarms; exit code 1 if one fired
    moe-lens cache traces/run1                what a cache of experts would find
    moe-lens context traces/run1              what order and a beginning say of routing
    moe-lens replay traces/run1               what its routing costs on this machine
    moe-lens place traces/run1 --ranks 8      which rank should hold which experts
    moe-lens counterfactual traces/run1 …     what other choices of experts would cost
    moe-lens precision traces/run1 …          what rounding its weights would do
    moe-lens import dump.pt --out traces/a    what another tool recorded, as a trace
    moe-lens export traces/run1 …             counts and routing for other tools
    moe-lens lab granularity                  what using fewer experts a token costs
    """  # noqa: D301  (\b keeps the lines as they are)


def main() -> None:
    """Run the command line and end the process.

    Exit codes: 0 fine, 1 an error of ours or a reader that hung up, 2 wrong usage, 130 Ctrl-C.
    """
    try:
        try:
            app(prog_name="moe-lens")
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # `moe-lens query … | head` hung up. Python flushes once more at exit: let that succeed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        sys.stderr.write(f"error: {e.filename or 'the disk'}: {e.strerror or e}\n")
        sys.exit(1)
    except MoeLensError as e:
        sys.stderr.write(f"error: {e}\n")
        sys.exit(e.exit_code if isinstance(e, CommandError) else 1)
