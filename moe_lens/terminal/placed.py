"""Placements beside each other: how even they are, what they send, what moving to them takes."""

from __future__ import annotations

import math

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.text import Text

from moe_lens.lacking import made_up
from moe_lens.numbers import NONE, count, counted, decimal, percent
from moe_lens.replay.placement.said import moving_s
from moe_lens.replay.placement.study import Candidate, Study
from moe_lens.replay.placement.verdict import Verdict
from moe_lens.terminal.grid import add_numbers, add_row, notes, table
from moe_lens.terminal.plain import print_plain

_INDENT = 2
_LABEL = 10
"""Letters of a placement's name: the widest table has room for no more."""


def print_study(
    console: Console, study: Study, path: str, bytes_per_s: float, *, by_layer: bool = False
) -> None:
    """Print what was found.

    Args:
        console: Where to.
        study: It.
        path: Of the plan that was written.
        bytes_per_s: At which a rank fetches experts.
        by_layer: Print a table by layer too.
    """
    every = [study.now, *study.candidates]
    plan = study.plan
    print_plain(console, Padding.indent(Text(_what(study), style="dim"), _INDENT))
    for phase in study.now.balance:
        judged = sum(key[2] == phase for key in study.judged_by.forwards)
        title = f"{phase}: rows per rank, {counted(judged, 'forward')} of {_layers(study)}"
        print_plain(console, "", Text(title, style="bold"))
        print_plain(console, Padding.indent(_balance(every, study, phase), _INDENT))
        if by_layer:
            print_plain(console, "", Padding.indent(_by_layer(every, study, phase), _INDENT))
    even = f"{1 / plan.ranks:.1%}".replace("%", " %")
    chance = ", ".join(
        f"{phase} {balance.by_chance:.3f}"
        for phase, balance in study.now.balance.items()
        if not math.isnan(balance.by_chance)
    )
    print_plain(
        console,
        Padding.indent(
            notes(
                "mean and max over ranks, in each layer of each forward, then averaged; summed: "
                "the layers' means over the layers' maxima, as vLLM prints it; slowest: share of a "
                f"forward's rows on the slowest ranks, layer by layer (even: {even}), "
                "percentiles over forwards."
                + _of_files(every)
                + (f" max/mean of a fair router, by chance alone: {chance}." if chance else "")
            ),
            _INDENT,
        ),
    )
    if study.now.traffic is not None:
        print_plain(console, "", Text("rows that a token sends in a layer", style="bold"))
        print_plain(console, Padding.indent(_traffic(every, study), _INDENT))
    print_plain(console, "", Text("weights of a rank, all layers", style="bold"))
    print_plain(console, Padding.indent(_weights(every, study, bytes_per_s), _INDENT))
    print_plain(console, Padding.indent(notes(*_cost_notes(study, bytes_per_s)), _INDENT), "")
    label = f"plan of {plan.method}, fitted to all forwards: "
    print_plain(console, Text.assemble((label, "dim"), path), whole=True)
    if study.verdict is not None:
        print_plain(console, "", *_verdict(study, study.verdict, bytes_per_s))


def _what(study: Study) -> str:
    counts, plan = study.counts, study.plan
    text = f"{counts.experts} experts on {plan.ranks} ranks"
    text += f" of {plan.nodes} nodes" if plan.nodes > 1 else ""
    if plan.slots > plan.experts:
        text += f", {plan.slots - plan.experts} replicas a layer"
    text += f"; {study.fitted_how}"
    looked = len(counts.forwards)
    if looked < counts.recorded - counts.uncounted:
        text += f"; {count(looked)} of {count(counts.recorded)} forwards, evenly spread"
    if counts.uncounted:
        text += (
            f"; without counts of their own, and left out: {counted(counts.uncounted, 'forward')}"
        )
    return text


def _of_files(every: list[Candidate]) -> str:
    if any(of.placement.method.endswith(".json") for of in every):
        return " A plan from a file may have been fitted to the forwards that judge it."
    return ""


def _layers(study: Study) -> str:
    n = len(study.counts.layers)
    return f"{n} layers" if n > 1 else "one layer"


def _label(of: Candidate, study: Study) -> str:
    name = of.placement.method.removesuffix(".json")
    name = name if len(name) <= _LABEL else f"{name[: _LABEL - 1]}…"
    return f"{name} (now)" if of is study.now else name


def _balance(every: list[Candidate], study: Study, phase: str) -> RenderableType:
    made = table("placement")
    add_numbers(made, "mean/\nmax", "max/\nmean", "(max−mean)\n/mean", "summed")
    add_numbers(made, "slowest\np50", "p95", "p99")
    for of in every:
        b = of.balance[phase]
        add_row(
            made,
            _label(of, study),
            decimal(b.mean_over_max, 3),
            decimal(b.max_over_mean, 3),
            decimal(b.excess, 3),
            decimal(b.summed, 3),
            *(percent(share) for share in (b.slowest_p50, b.slowest_p95, b.slowest_p99)),
        )
    return made


def _by_layer(every: list[Candidate], study: Study, phase: str) -> RenderableType:
    made = table("layer")
    add_numbers(made, *(f"{_label(of, study)}\nmax/mean" for of in every))
    for i, layer in enumerate(study.counts.layers):
        ratios = (of.balance[phase].by_layer[i] for of in every)
        add_row(made, str(layer), *(decimal(ratio, 3) for ratio in ratios))
    return made


def _traffic(every: list[Candidate], study: Study) -> RenderableType:
    made = table("placement")
    add_numbers(made, "to other\nranks", "once per\nchoice", "KB")
    if study.plan.nodes > 1:
        add_numbers(made, "to other\nnodes", "once per\nchoice", "KB")
    for of in every:
        t = of.traffic
        if t is None:
            continue
        kinds = [(t.to_ranks, t.to_ranks_by_choice), (t.to_nodes, t.to_nodes_by_choice)]
        cells: list[str] = []
        for once, by_choice in kinds if study.plan.nodes > 1 else kinds[:1]:
            cells += [decimal(kind.rows / t.token_layers) for kind in (once, by_choice)]
            size = once.bytes
            cells.append(NONE if size is None else decimal(size / t.token_layers / 1e3))
        add_row(made, _label(of, study), *cells)
    return made


def _weights(every: list[Candidate], study: Study, bytes_per_s: float) -> RenderableType:
    made = table("placement")
    add_numbers(
        made, "slots of\na layer", "held", "experts\nto fetch", "weights\nto fetch", "takes"
    )
    for of in every:
        seconds = moving_s(of, bytes_per_s)
        add_row(
            made,
            _label(of, study),
            count(of.placement.slots_per_rank),
            _size(of.bytes_per_rank),
            count(of.moved),
            _size(of.moved_bytes),
            NONE if seconds is None else _seconds(seconds),
        )
    return made


def _cost_notes(study: Study, bytes_per_s: float) -> list[str]:
    traffic = study.now.traffic
    if traffic is None:
        texts = ["The run has no rows per token, so it is not known what tokens send."]
    else:
        texts = [
            "A token is sent once to each rank or node that has any of its experts, or once per "
            "choice; as much comes back. KB: of the former. From "
            f"{count(traffic.token_layers)} tokens of layers."
        ]
    if study.now.bytes_per_rank is None:
        texts.append("The trace does not know the experts' sizes, so no weights are given.")
    texts.append(
        "To fetch: what the busiest rank does not hold now, in all layers together, at "
        f"{bytes_per_s / 1e9:g} GB/s."
    )
    if study.made_steps:
        texts.append(made_up(study.made_steps))
    return texts


def _verdict(study: Study, of: Verdict, bytes_per_s: float) -> list[Text]:
    said = Text(f"{study.plan.method}: {of.says}. ", style="bold").append(of.why, style="not bold")
    if not of.gains:
        return [said]
    rest = (
        f"Judged by windows of {of.forwards} forwards, each by the plan of the one before. By the "
        f"forwards that plans were fitted to it would have been {100 * of.fitted_gain:.1f} %. "
        f"Following them, the busiest rank fetches {of.moved:,.0f} experts a window"
    )
    if study.now.bytes_per_rank is not None:
        held = study.now.placement.slots_per_rank * len(study.counts.layers)
        size = of.moved * study.now.bytes_per_rank / held
        rest += f": {_size(int(size))}, {_seconds(size / bytes_per_s)}"
    rest += ". "
    phases = list(study.now.balance)
    if len(phases) > 1:
        rest += f"All phases together, by their rows: --phase {phases[-1]} judges one. "
    rest += "Rows are not time: moe-lens replay --ep measures that."
    return [said, Text(rest, style="dim")]


def _size(size: int | None) -> str:
    if size is None:
        return NONE
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _seconds(seconds: float) -> str:
    for scale, unit in ((1, "s"), (1e3, "ms")):
        if seconds * scale >= 1:
            return f"{seconds * scale:,.1f} {unit}"
    return f"{1e6 * seconds:,.0f} µs"
