"""What a replay under expert parallelism measured: the ranks of each layer, and who waits."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moe_lens.lacking import made_up
from moe_lens.numbers import count, counted, decimal, percent
from moe_lens.terminal.grid import add_numbers, add_row, notes, table
from moe_lens.terminal.plain import print_plain
from moe_lens.terminal.replayed import backend_words, policy_words, shape_words
from moe_lens.terminal.units import digits, unit_of

Row = dict[str, Any]

_INDENT = 2


def print_replay_ep(
    console: Console, about: Row, layers: list[Row], answers: list[str], path: str
) -> None:
    """Print a replay: the answer first.

    Args:
        console: Where to.
        about: What the result says of itself.
        layers: A row for each placement, phase and layer.
        answers: What the placement is worth, in sentences.
        path: Of the result's file.
    """
    for answer in answers:
        print_plain(console, Text(answer, style="bold"))
    print_plain(console, "", Padding.indent(_heading(about), _INDENT))
    interrupted = "" if about["state"] == "complete" else " (interrupted: partial)"
    label = Text(f"{' ' * _INDENT}{'result':12}", style="dim")
    print_plain(console, label + Text(f"{path}{interrupted}", style="default"), whole=True)
    for phase in dict.fromkeys(row["phase"] for row in layers):
        for placement in dict.fromkeys(row["placement"] for row in layers):
            mine = [r for r in layers if (r["phase"], r["placement"]) == (phase, placement)]
            title = Text(f"{phase}: {placement}", style="bold")
            print_plain(console, Group("", title), Padding.indent(_table(mine, about), _INDENT))
    print_plain(console, Padding.indent(notes(*_explained(about)), _INDENT))


def _heading(about: Row) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    facts = {
        "replayed": _forwards(about),
        "policy": policy_words(about),
        "ranks": _ranks(about),
        "layer": shape_words(about),
        "weights": f"experts: random; gate: {about['weights']}",
        "on": f"{about['device_name']}: {backend_words(about['backends'])}",
        "measured": f"{about['clock']}; median of {about['repeats']} repeats",
        "all-to-all": _all_to_all(about),
    }
    for label, text in facts.items():
        add_row(grid, label, text)
    return grid


def _forwards(about: Row) -> str:
    of = about["forwards"]
    text = f"{count(of['replayed'])} of {counted(of['in_trace'], 'forward')}"
    if of["left_out"]:
        text += f"; {count(of['left_out'])} lack rows of some tokens or of a rank"
    if of["replayed"] < of["chosen"]:
        end = "time was up" if about["state"] == "complete" else "it was interrupted"
        text += f"; {end} before the other {count(of['chosen'] - of['replayed'])} chosen"
    if about["padding_rows"]:
        text += f"; {count(about['padding_rows'])} rows of padding left out"
    return text


def _ranks(about: Row) -> str:
    of = about["placement"]
    text = f"{of['ranks']} of {of['slots_per_rank']} experts each"
    if of["nodes"] > 1:
        text += f", on {of['nodes']} nodes"
    if of["replicas"]:
        text += f", {of['replicas']} of them replicas"
    text += f"; {about['mode']}"
    text += " on one device, one after the other" if about["mode"] == "simulated" else ""
    if of["fitted"]:
        text += f"; {of['name']} was fitted to this run, so it is at its best here"
    return text


def _all_to_all(about: Row) -> str:
    how = "a token once to a rank" if about["dedup"] else "a token once for each choice"
    link = about["all_to_all"]
    if link is None:
        world = about["world"]
        text = f"measured, {world['backend']} between {about['placement']['ranks']} processes"
        if world["backend"] == "gloo":
            text += " over loopback: this says nothing of NCCL, NVLink or a network"
        return f"{text}; {how}"
    rates = f"{link['bytes_per_s'] / 1e9:g} GB/s a rank"
    if link["network_bytes_per_s"] and about["placement"]["nodes"] > 1:
        rates += f", {link['network_bytes_per_s'] / 1e9:g} GB/s a rank between nodes"
    latency = f", latency {1e6 * link['latency_s']:.3g} µs" if link["latency_s"] else ""
    text = f"modelled, {link['name']} ({link['label']}): {rates}{latency}; {how}"
    if about["device"] == "cpu":
        text += ". It is of GPUs, and experts ran on a CPU: do not add up the two"
    return text


def _table(rows: list[Row], about: Row) -> RenderableType:
    scale, unit = unit_of(max(row["busy_slowest_ns"] for row in rows))
    sending, sending_unit = unit_of(max(row["dispatch_ns"] + row["combine_ns"] for row in rows))
    made = table("layer")
    add_numbers(made, "rows\nmean", "slow-\nest", "max/\nmean")
    add_numbers(made, f"time\nmean {unit}", "slow-\nest", "max/\nmean", "waiting")
    add_numbers(made, "sent\nMB", f"dispatch\n{sending_unit}", "com-\nbine")
    for row in rows:
        add_row(
            made,
            str(row["layer"]),
            digits(row["rows_mean"]),
            digits(row["rows_slowest"]),
            decimal(row["rows_max_over_mean"]),
            digits(row["busy_mean_ns"] / scale),
            digits(row["busy_slowest_ns"] / scale),
            decimal(row["time_max_over_mean"]),
            percent(row["waiting_share"]),
            digits(row["sent_bytes_mean"] * row["ranks"] / 1e6),
            digits(row["dispatch_ns"] / sending),
            digits(row["combine_ns"] / sending),
        )
    return made


def _explained(about: Row) -> list[str]:
    texts = [
        "rows and time: of a rank in a forward, means over forwards; slowest: the rank with most, "
        "and the slowest one, of each forward. max/mean: their sums over the mean rank's. waiting: "
        "of all ranks' time with their experts, what they wait for the slowest. sent: to other "
        "ranks in dispatch, all ranks together."
    ]
    if about["all_to_all"] is not None:
        texts.append(f"all-to-all: {about['all_to_all']['source']}.")
    elif about["device"] == "cpu":
        texts.append("Rows and bytes are the result; times are those of this machine's processes.")
    if about.get("made_steps"):
        texts.append(made_up(about["made_steps"]))
    return texts
