"""Tables that are too wide for the page: columns follow below, and nothing is cut."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType
from rich.padding import Padding

from moe_lens.terminal.grid import Grid, add_numbers, add_row, table


def lines(made: RenderableType, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(Padding.indent(made, 2))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def losses() -> Grid:
    made = table("layer", "tokens")
    add_numbers(made, "cost", "± error")
    add_numbers(made, "mean\nroute", "rank")
    add_row(made, "0", "all", "+0.2211", "0.1317", "+1.3232", "2.9")
    add_row(made, "1", "code", "-0.0807", "0.0227", "+0.0971", "14.5")
    return made


def test_a_table_that_fits_is_one() -> None:
    assert lines(losses(), 50) == [
        "                                      mean",
        "  layer  tokens     cost  ± error    route  rank",
        "  ──────────────────────────────────────────────",
        "  0      all     +0.2211   0.1317  +1.3232   2.9",
        "  1      code    -0.0807   0.0227  +0.0971  14.5",
    ]


def test_columns_stand_closer_before_they_part() -> None:
    assert lines(losses(), 43)[1:] == [
        "  layer tokens    cost ± error   route rank",
        "  ─────────────────────────────────────────",
        "  0     all    +0.2211  0.1317 +1.3232  2.9",
        "  1     code   -0.0807  0.0227 +0.0971 14.5",
    ]


def test_columns_added_together_stay_together_beside_their_names() -> None:
    assert lines(losses(), 42) == [
        "  layer  tokens     cost  ± error",
        "  ───────────────────────────────",
        "  0      all     +0.2211   0.1317",
        "  1      code    -0.0807   0.0227",
        "",
        "                    mean",
        "  layer  tokens    route  rank",
        "  ────────────────────────────",
        "  0      all     +1.3232   2.9",
        "  1      code    +0.0971  14.5",
    ]


def test_a_long_name_is_folded_and_its_numbers_are_whole() -> None:
    made = table("tag")
    add_numbers(made, "grouped", "mixed")
    add_row(made, "conversations-of-engineers", "0.123", "4,567")
    text = lines(made, 30)
    assert text[-1].endswith("  0.123  4,567")
    assert "".join(line.split()[0] for line in text[2:]) == "conversations-of-engineers"


def test_sections_and_styles_stay() -> None:
    made = losses()
    made.add_section()
    add_row(made, "all", "", "+0.07", "0.01", "+0.71", "8.7", style="bold")
    assert lines(made, 42)[4:6] == ["", "  all              +0.07     0.01"]
    drawn = Console(file=io.StringIO(), width=40, force_terminal=True, color_system="standard")
    drawn.print(made)
    assert drawn.file.getvalue().count("\x1b[1mall") == 2  # type: ignore[attr-defined]


@given(
    blocks=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=4),
    name=st.integers(1, 40),
    width=st.integers(30, 120),
)
def test_every_number_is_there_once(blocks: list[list[int]], name: int, width: int) -> None:
    made = table("of")
    numbers = iter(range(10_000))
    row = ["n" * name]
    for block in blocks:
        add_numbers(made, *("head" for _ in block))
        row += [f"{next(numbers) % 10}{'7' * (size - 1)}" for size in block]
    add_row(made, *row)
    text = lines(made, width)
    assert max(map(len, text)) <= width
    found = [word for line in text for word in line.split() if word.isdigit()]
    assert found == row[1:]
