"""The page of `moe-lens context`: pairs in another order, and how conversations begin."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from moe_lens.numbers import count, counted, decimal, percent
from moe_lens.terminal.context_page import time_of, words_of
from moe_lens.terminal.grid import add_numbers, add_row, notes, table
from moe_lens.terminal.plain import print_plain

Row = dict[str, Any]

_STARTS = {
    "cold": "nothing",
    "popularity": "popular experts",
    "prefix": "the constellation",
    "kept": "what was used before",
    "optimum": "the best, future known",
}
_NAMED_BY = ("itself", "popu-\nlarity", "best", "chance")

_TOO_SHORT = (
    "No sequence there with rows from its first token on goes on after one of these beginnings."
)


def print_context(console: Console, said: Row) -> None:
    """Print what was found, answers first.

    Args:
        console: Where to.
        said: `pairs` and `phases` as `context_page` makes them, or why there are none.
    """
    if said["pairs"] is None:
        print_plain(console, Text(f"No pairs: {said['no_pairs']}", style="yellow"))
    else:
        _pairs(console, said["pairs"])
    if not said["phases"]:
        why = f"No conversations: {said['no_conversations']}"
        print_plain(console, "", Text(why, style="yellow"))
    for phase in said["phases"]:
        print_plain(console, "")
        _phase(console, phase)
    if short := said["too_short"]:
        why = f"Not measured: {', '.join(short)}. {_TOO_SHORT}"
        print_plain(console, "", Text(why, style="yellow"))


def _section(console: Console, title: str, body: RenderableType) -> None:
    print_plain(console, Group("", Padding.indent(Text(title), 2)))
    print_plain(console, Padding.indent(body, 4))


def _pairs(console: Console, said: Row) -> None:
    print_plain(console, *(Text(answer, style="bold") for answer in said["answers"]))
    if any(row["tokens"] for row in said["layers"]):
        _section(console, "The same content in another order, by layer", _by_layer(said["layers"]))
    if any(row["id_part"] == row["id_part"] for row in said["layers"]):
        title = "Parts of what a token says about its experts, by layer"
        _section(console, title, _parts(said["layers"]))
    if said["by_distance"]:
        title = "Tokens whose set changed, by their distance from the cut before them"
        _section(console, title, _by_distance(said["by_distance"]))
    left = said["left_out"]
    more = [f"{counted(left, 'further pair')} left out (--pairs)."] if left else []
    explained = (
        "kept: mean of |A and B| / k, the same token in both prompts. same id: of tokens of other "
        "sequences; any two: of two tokens of the layer. JSD: between the loads of the two orders, "
        "nats, beside what sampling alone makes of it. Of the parts an id of 100 % is a lookup "
        "table, and so is U, context_independence of all tokens looked at."
    )
    print_plain(console, Padding.indent(notes(explained, *more), 2))


def _by_layer(rows: list[Row]) -> RenderableType:
    made = table("layer")
    add_numbers(made, "tokens", "kept", "same\nid", "any\ntwo", "chance")
    add_numbers(made, "set\nchanged", "first\nchanged", "gates\nmoved")
    add_numbers(made, "JSD", "floor")
    for row in rows:
        names = ("overlap", "id_overlap", "random_overlap", "chance", "set_changed",
                 "first_changed", "weight_change")  # fmt: skip
        add_row(made, str(row["layer"]), count(row["tokens"]), *(_percent(row[x]) for x in names),
                decimal(row["jsd"], 4), decimal(row["jsd_floor"], 4))  # fmt: skip
    return made


def _parts(rows: list[Row]) -> RenderableType:
    made = table("layer")
    add_numbers(made, "its id", "its content", "the order", "U", "tokens whose id\nothers have")
    for row in rows:
        names = ("id_part", "content_part", "order_part", "context_independence", "id_known")
        add_row(made, str(row["layer"]), *(_percent(row[x]) for x in names))
    return made


def _percent(share: float) -> str:
    """Whole percents: many columns stand side by side."""
    return f"{decimal(100 * share, 0)} %" if share == share else "–"


def _by_distance(rows: list[Row]) -> RenderableType:
    places = sorted({(row["first"], row["last"]) for row in rows})
    made = table("layer")
    add_numbers(made, *(str(a) if a == b else f"{a}–{b}" for a, b in places))
    for layer in sorted({row["layer"] for row in rows}):
        changed = {row["first"]: row["set_changed"] for row in rows if row["layer"] == layer}
        add_row(made, str(layer), *(_percent(changed.get(a, float("nan"))) for a, _ in places))
    return made


def _phase(console: Console, phase: Row) -> None:
    print_plain(console, *(Text(answer, style="bold") for answer in phase["answers"]))
    if phase["prefixes"]:
        title = f"Choices after a beginning that are of the {phase['size']} experts named by"
        _section(console, title, _by_prefix(phase["prefixes"]))
    if phase["prefixes"] and phase["after"] not in phase["too_long"]:
        _section(console, f"The same by layer, after {words_of(phase['after'])}",
                 _recall_by_layer(phase["layers"]))  # fmt: skip
    if phase["loads"]:
        title = f"Loads of a conversation, {phase['size']} resident, LRU that begins with"
        _section(console, title, _by_start(phase["loads"]))
    explained = [
        f"{counted(phase['tokens'], 'token')} of {counted(phase['sequences'], 'sequence')} "
        "a layer. "
        "covering: the fewest experts that take their share of the beginning's choices, and the "
        "recall of as many named by each. ahead: loads before anybody waits. Popularity is of the "
        "other sequences, never of its own or one of its pair."
    ]
    if phase["too_long"]:
        explained.append(
            f"No sequence goes on after {' or '.join(map(words_of, phase['too_long']))}."
        )
    if phase["after"] in phase["too_long"]:
        explained.append("So nothing is said of loads: give a smaller --after.")
    if phase["headless"]:
        explained.append(
            f"{counted(phase['headless'], 'sequence')} without the first tokens left out."
        )
    print_plain(console, Padding.indent(notes(*explained), 2))


def _by_prefix(rows: list[Row]) -> RenderableType:
    made = table("beginning")
    add_numbers(made, "sequences", *_NAMED_BY)
    add_numbers(made, "covering\nexperts", *_NAMED_BY)
    for row in rows:
        place = row["beginning"]
        add_row(
            made, f"{100 * place:g} %" if place < 1 else count(place), count(row["sequences"]),
            *(percent(row[x]) for x in ("prefix", "popularity", "oracle", "chance")),
            decimal(row["covering"], 1),
            *(percent(row[f"covering_{x}"]) for x in ("prefix", "popularity", "oracle", "chance")),
        )  # fmt: skip
    return made


def _recall_by_layer(rows: list[Row]) -> RenderableType:
    made = table("layer")
    add_numbers(made, "experts", *_NAMED_BY, "covering\nexperts")
    for row in rows:
        add_row(
            made, str(row["layer"]), count(row["experts"]),
            *(percent(row[x]) for x in ("prefix", "popularity", "oracle", "chance")),
            decimal(row["covering"], 1),
        )  # fmt: skip
    return made


def _by_start(rows: list[Row]) -> RenderableType:
    made = table("with")
    add_numbers(made, "loads", "MB", "waits")
    add_numbers(made, "saved\nloads", "saved\nMB", "saved\ntime", "ahead")
    for row in rows:
        add_row(
            made, _STARTS[row["start"]], decimal(row["loads"], 1), decimal(row["bytes"] / 1e6, 1),
            _time(row["seconds"]), decimal(row["saved_loads"], 1),
            decimal(row["saved_bytes"] / 1e6, 1), _time(row["saved_seconds"]), count(row["ahead"]),
        )  # fmt: skip
    return made


def _time(seconds: float) -> str:
    return time_of(seconds) if seconds == seconds else "–"
