"""Writes the table of docs/supported-models.md, by proving every architecture once more.

    make models, or: PYTHONPATH=tests python -m support.zoo.table

Only what stands between the two markers of the page is written; the rest of it is by hand.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from support.zoo.build import batch, build
from support.zoo.catalog import NO_ROUTED_EXPERTS, REFUSED, ZOO, Architecture
from support.zoo.proof import Captured, Proof, prove, record

PAGE = Path(__file__).parents[3] / "docs" / "supported-models.md"
BEGIN, END = "<!-- written by support.zoo.table: begin -->", "<!-- end -->"
HEAD = [
    "| architecture | model | adapter | router | ids: wrong / checked | null | weights: error |",
    "|---|---|---|---|---|---|---|",
]


def row(entry: Architecture, captured: list[Captured], proofs: list[Proof]) -> str:
    """One line of the table: what was learned and found of an architecture."""
    infos = [c.info for c in captured]
    wrong, checked = sum(p.wrong for p in proofs), sum(p.checked for p in proofs)
    errors = [p.weight_error for p in proofs if p.weight_error is not None]
    error = f"{max(errors):.0e}" if len(errors) == len(proofs) else "not checked"
    nulls = dict.fromkeys(c.nulls for c in captured if c.nulls)
    cells = [
        entry.name,
        f"`{entry.model}`",
        ", ".join(dict.fromkeys(i.adapter for i in infos)),
        "; ".join(dict.fromkeys(_router(c) for c in captured)),
        f"{wrong} / {checked:,}",
        "; ".join(nulls)
        + (" (some layers)" if nulls and not all(c.nulls for c in captured) else ""),
        error,
    ]
    return f"| {' | '.join(cells)} |"


def _router(captured: Captured) -> str:
    info = captured.info
    other = {"task": "expert named by the caller", "hash": "hash of the token's id"}
    parts = [info.selection or other.get(info.router, info.router)]
    if info.score and info.score not in parts[0]:
        parts.append(f"{info.score} weights")
    if info.role != "mlp":
        parts.append(f"also in {info.role}")
    if info.zero_experts:
        parts.append(f"{info.zero_experts} compute nothing")
    if info.capacity_policy:
        parts.append(f"capacity, {info.capacity_policy}")
    if not info.faithful:
        parts.append("runs other experts than were chosen")
    return ", ".join(parts)


def same(a: str, b: str) -> bool:
    """Two rows agree in everything but the digits of the error, which differ between machines."""
    return a.rsplit("|", 2)[0] == b.rsplit("|", 2)[0]


def committed() -> dict[str, str]:
    """Rows of the page as it is, by architecture."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    lines = [line for line in rest.partition(END)[0].splitlines() if line.startswith("| ")]
    return {line.split("|")[1].strip(): line for line in lines[1:]}


def page(rows: list[str]) -> str:
    """The page with these rows in the place of its own."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    left_out = [
        f"- `{name}`: {why}." for name, why in sorted({**REFUSED, **NO_ROUTED_EXPERTS}.items())
    ]
    lines = [BEGIN, *HEAD, *rows, "", "Not in the table:", "", *left_out, "", END]
    return before + "\n".join(lines) + rest.partition(END)[2]


def main() -> None:
    """Prove the zoo and write the page."""
    rows = []
    for name, entry in ZOO.items():
        model, inputs = build(entry), batch(entry)
        with tempfile.TemporaryDirectory() as folder:
            captured = record(model, inputs, Path(folder) / "run")
        rows.append(row(entry, captured, prove(model, inputs, captured)))
        print(name, file=sys.stderr)
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
