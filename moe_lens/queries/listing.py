"""The stored questions by subject, as Markdown, for docs/queries.md.

    python -m moe_lens.queries.listing docs/queries.md

The part of the page between the two comments below is this text; a test compares them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from moe_lens.queries.catalog import Question, questions

BEGIN, END = "<!-- questions: begin -->", "<!-- questions: end -->"

SUBJECTS = {
    "The run": (
        "run_totals", "capture_health", "forwards_over_time", "slowest_forwards", "all_to_all",
        "recent",
    ),
    "Load and balance": (
        "load_map", "expert_load", "layer_balance", "load_over_time", "loads_over_time",
        "dead_experts", "hottest_experts", "forward_loads", "tag_load", "group_load",
        "identity_load",
    ),
    "Capacity and drops": (
        "dropped_tokens", "recorded_capacity", "capacity_sweep", "unserved_by_position",
    ),
    "The router": (
        "router_confidence", "router_over_time", "near_ties", "group_entropy", "expert_sets",
    ),
    "One expert": (
        "expert_over_time", "expert_tags", "expert_serves", "expert_companions",
    ),
    "Paths": ("co_activation", "repetition", "layer_transitions", "sequence_choices"),
    "Memory": ("token_experts", "sequence_starts"),
    "Quality": ("loss_by_tag", "quality_by_tag", "quality_of_dropped"),
    "Cost on real kernels": ("replay_layers", "replay_ranks"),
    "What if": ("expert_importance", "route_regret", "route_changes"),
    "Requests": ("requests", "request_load", "request_tokens"),
    "Two runs of the same tokens": ("diff_tokens", "diff_layers", "diff_flips", "diff_choices"),
}  # fmt: skip
"""Which question stands where on the page; those that no subject names come last."""


def markdown() -> str:
    """Every stored question in one line, by subject, with its parameters beyond the filters."""
    known = questions()
    named = {name for names in SUBJECTS.values() for name in names}
    parts = []
    for subject, names in (SUBJECTS | {"More": tuple(n for n in known if n not in named)}).items():
        lines = [_line(known[name]) for name in names if name in known]
        if lines:
            table = [
                "| question | what it answers | parameters of its own |",
                "|---|---|---|",
                *lines,
            ]
            parts.append(f"### {subject}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


def renewed(page: str) -> str:
    """The page with its list replaced by the current one.

    Raises:
        ValueError: The page lacks the two comments between which the list stands.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"The page has no {BEGIN} … {END}: put both where the list belongs.")
    return f"{before}{BEGIN}\n\n{markdown()}\n{END}{after}"


_FILTERS = {"first_step", "last_step", "phase", "tag", "rank", "first_layer", "last_layer"}


def _line(asked: Question) -> str:
    own = [
        f"`{p.name}`" if p.default is None else f"`{p.name}={_text(p.default)}`"
        for p in asked.parameters
        if p.name not in _FILTERS or p.default is not None
    ]
    return f"| `{asked.name}` | {first_sentence(asked.doc)} | {', '.join(own)} |"


def first_sentence(doc: str) -> str:
    """The first sentence of a head comment, on one line, as a cell of a Markdown table."""
    text = " ".join(doc.split())
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0].replace("|", "\\|")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
