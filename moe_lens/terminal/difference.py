"""What `moe-lens diff` prints: where two runs of the same tokens route differently."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from moe_lens.numbers import NONE, count, decimal, percent
from moe_lens.terminal.grid import add_numbers, add_row, notes, table
from moe_lens.terminal.plain import print_plain

if TYPE_CHECKING:
    from moe_lens.queries.diff import Difference


def render(found: Difference, console: Console) -> None:
    """Print the comparison.

    Args:
        found: What `diff` returned.
        console: Where to; its width decides how much is shown.
    """
    title = Text(f"moe_lens · {found.a} and {found.b}", style="bold")
    parts: list[RenderableType] = [Rule(title, align="left"), Padding.indent(_heading(found), 2)]
    parts += _section("By layer", _layers(found, console.width - 2))
    if found.matched:
        parts += _section("Experts matched by the tokens they serve", _matched(found))
    if len(found.flips):
        parts += _section("The first decisions that differ", _flips(found))
    print_plain(console, *parts)


def _heading(found: Difference) -> Table:
    flips, compared = int(found.layers["flips"].sum()), int(found.layers["tokens"].sum())
    aligned = "rank, step, forward and token"
    if found.by == "position":
        aligned = "sequence and position"
    facts = {
        "tokens": f"{count(found.tokens)} valid ones in both, aligned by {aligned}",
        "flips": f"{count(flips)} of {count(compared)} token-layers have other experts "
        f"({percent(found.flip_rate)}); overlap {decimal(found.overlap, 4)}",
        "tokens hit": f"{count(found.diverged_tokens)} differ in some layer "
        f"({percent(found.diverged_tokens / max(found.tokens, 1))})",
        "first": _first(found),
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for label, text in facts.items():
        add_row(grid, label, text)
    return grid


def _first(found: Difference) -> str:
    if not len(found.flips):
        return "none" if not found.diverged_tokens else "not listed"
    row = found.flips.to_dict("records")[0]
    return f"{_where(row)}, position {row['position']}, layer {row['layer']}"


def _where(row: dict[Any, Any]) -> str:
    request = row["request"]
    return f"sequence {row['sequence']}" if not isinstance(request, str) else request


def _layers(found: Difference, width: int) -> RenderableType:
    made = table("layer")
    add_numbers(made, "tokens", "flipped", "top-1\nflipped", "overlap")
    add_numbers(made, "weights\nmean", "\nlargest")
    add_numbers(made, "margin\nmedian", "\nat flips", "first\nhere")
    for row in found.layers.to_dict("records"):
        add_row(
            made,
            f"{row['layer']}",
            count(row["tokens"]),
            Text(percent(row["flip_rate"]), style="bold yellow" if row["flips"] else ""),
            percent(row["top1_flip_rate"]),
            decimal(row["overlap"], 4),
            _small(row["weight_diff_mean"]),
            _small(row["weight_diff_max"]),
            _small(row["margin"]),
            _small(row["margin_at_flips"]),
            count(row["first_flips"]),
        )
    texts = [
        "flipped: share of tokens whose set of experts differs. overlap: |A and B| / k. weights: "
        f"absolute difference on the experts both chose. margin: of {found.a}, k-th minus next "
        "selection score; flips far below the median margin are near ties. first here: tokens "
        "that differ in no earlier layer."
    ]
    if found.rounded:
        texts.append(
            "A run keeps weights rounded to bf16: differences up to 2^-8 of a weight may be of "
            'that. record(..., weights="exact") keeps them whole.'
        )
    if found.no_weights:
        texts.append(
            "No gate weights to compare, and none that would tell a token's first choice, in "
            f"{'; '.join(found.no_weights)}."
        )
    return Group(made, notes(*texts))


def _matched(found: Difference) -> RenderableType:
    made = table("layer")
    add_numbers(made, "tokens", "same\nnumber", "\nchance", "matched", "\nchance", "\nhighest")
    add_numbers(made, "renumbered")
    for layer, match in found.matched.items():
        if match is None:
            add_row(made, f"{layer}", "too few")
            continue
        moved = int((match.expert_E != range(len(match.expert_E))).sum())
        add_row(
            made, f"{layer}", count(match.tokens), decimal(match.before, 4),
            decimal(match.before_by_chance, 4),
            Text(decimal(match.after, 4), style="bold yellow" if match.beyond else ""),
            decimal(match.after_by_chance, 4), decimal(match.high, 4), count(moved),
        )  # fmt: skip
    return Group(
        made,
        notes(
            "Overlap |A and B| / k of experts of the same number, and of matched ones. Matched on "
            "every second sequence, counted on the others: what matching finds in noise is not in "
            "these numbers. chance: routers of these loads that know nothing of each other; "
            "highest: of 99 shifts of one run's tokens. renumbered: experts of "
            f"{found.a} that match another number in {found.b}."
        ),
    )


def _flips(found: Difference) -> RenderableType:
    made = table("sequence")
    add_numbers(made, "position", "layer", "margin")
    for name in (found.a, found.b):
        made.add_column(f"only in {name}", justify="left", vertical="bottom")
    for row in found.flips.to_dict("records"):
        add_row(
            made,
            _where(row),
            count(row["position"]),
            count(row["layer"]),
            _small(row["margin"]),
            _alone(row["ids_a"], row["weights_a"], row["ids_b"]),
            _alone(row["ids_b"], row["weights_b"], row["ids_a"]),
        )
    return Group(made, notes("only in: experts that the other did not choose, with their weight."))


def _alone(ids: Any, weights: Any, others: Any, most: int = 3) -> str:
    """Experts that are not among the others, with the weight of each where that is known."""
    known = [None] * len(ids) if weights is None else weights
    pairs = [(e, w) for e, w in zip(ids, known, strict=True) if e not in list(others)]
    shown = ", ".join(f"{e}" if w is None else f"{e} ({w:.3f})" for e, w in pairs[:most])
    return f"{shown}, …" if len(pairs) > most else shown


def _small(value: float | None) -> str:
    """Three digits, however small."""
    return NONE if value is None or value != value else f"{value:.3g}"


def _section(title: str, body: RenderableType) -> list[RenderableType]:
    return ["", Text(title, style="bold"), Padding.indent(body, 2)]
