"""The report as one HTML file that opens without a network: `moe-lens report RUN --html FILE`."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from moe_lens.errors import CommandError
from moe_lens.figures.theme import template
from moe_lens.numbers import count, decimal
from moe_lens.report.answers import Answers, gather
from moe_lens.report.contents import Drawn, draw
from moe_lens.report.facts import checks, facts

if TYPE_CHECKING:
    from moe_lens.queries.session import Trace

# Nothing is asked of a network, whatever a trace has put into the page.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)

_COLUMNS = (
    "layer", "tokens", "router entropy", "load entropy", "max/mean", "by chance", "dead", "dormant",
)  # fmt: skip
_EXPLAINED = (
    "Entropies run from 0 to 1 (over ln E): router, of its distribution per token; load, of the "
    "tokens over experts. by chance: the max/mean that a router without favourites would show. "
    "dormant: below 10 % of the fair share, dead ones among them; – where too few tokens were "
    "routed to tell a dead expert from chance."
)


def save_page(trace: Trace, path: Path, phase: str | None = None) -> None:
    """Write the report of a trace.

    Args:
        trace: An open trace.
        path: The file, replaced if it is there.
        phase: Count this phase only.

    Raises:
        CommandError: The file cannot be written.
    """
    text = page(trace, phase)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise CommandError(f"cannot write {path}: {e}", exit_code=1) from e


def page(trace: Trace, phase: str | None = None) -> str:
    """The report of every run of a trace, as the text of an HTML file."""
    runs: list[str] = []
    figures: list[go.Figure] = []
    all_answers = gather(trace, phase)
    for answers in all_answers:
        sections = draw(trace, answers.info, phase)
        runs.append("".join(_run(answers, sections, len(figures))))
        figures += [each.figure for section in sections.values() for each in section]
    names = [answers.info.run for answers in all_answers]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(", ".join(names))} · moe_lens</title>
<style>{_resource("page.css")}</style>
</head>
<body>
{"".join(runs)}
<p id="problem" role="alert"></p>
<noscript>The figures of this page are drawn by JavaScript, which is switched off.</noscript>
<script type="text/plain" id="plotly">{_packed(get_plotlyjs())}</script>
<script type="text/plain" id="figures">{_packed(_drawings(figures))}</script>
<script>{_resource("page.js")}</script>
</body>
</html>
"""


def _run(answers: Answers, sections: dict[str, list[Drawn]], first: int) -> Iterator[str]:
    """The part of the page about one run, whose figures are numbered from `first`."""
    where = f"phase {answers.phase}" if answers.phase else "all phases"
    yield f"<h1>{escape(answers.info.run)}</h1>\n<dl>"
    for label, text in facts(answers).items():
        yield f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>"
    yield f"<dt>counted</dt><dd>{escape(where)}</dd></dl>\n"
    for section, drawn in sections.items():
        yield f'<h2>{escape(section)}</h2>\n<div class="figures">'
        for each in drawn:
            yield _figure(each, first)
            first += 1
        yield "</div>\n"
        if section == "Load":
            yield _layers(answers)
    yield '<h2>Capture</h2>\n<ul class="checks">'
    for fine, text in checks(answers):
        yield f"<li{'' if fine else ' class=bad'}>{escape(text)}</li>"
    yield "</ul>\n"


def _figure(drawn: Drawn, number: int) -> str:
    given = ", ".join(f"${name} = {value!r}" for name, value in drawn.parameters.items())
    height = int(drawn.figure.layout.height)  # so that nothing moves while they are drawn
    return (
        f"<figure{' class=wide' if drawn.shown.wide else ''}>"
        f'<div id="figure-{number}" data-name="{escape(drawn.shown.name)}" '
        f'style="height:{height}px"></div>'
        f"<details><summary>SQL: {escape(drawn.shown.question)}"
        f"{escape(f' ({given})') if given else ''}</summary>"
        f"<pre>{escape(drawn.sql)}</pre></details></figure>"
    )


def _layers(answers: Answers) -> str:
    """The terminal report's table of layers, folded: a row a layer."""
    sure = {row["layer"]: row for row in answers.confidence}
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    rows = []
    for row in answers.balance:
        cells = (
            f"{row['layer']}",
            count(row["tokens"]),
            decimal(sure.get(row["layer"], {}).get("entropy_norm")),
            decimal(row["load_entropy_norm"], 3),
            decimal(row["max_over_mean"]),
            decimal(row["max_over_mean_floor"]),
            count(row["dead_experts"]),
            count(row["dormant_experts"]),
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return (
        f"<details><summary>Routers and balance by layer ({len(rows):,})</summary>"
        f'<div class="scroll"><table class="layers"><tr>{head}</tr>{"".join(rows)}</table></div>'
        f"<p>{escape(_EXPLAINED)}</p></details>\n"
    )


def _drawings(figures: list[go.Figure]) -> str:
    """The figures without their look, and the two looks, as JSON."""
    bare = []
    for figure in figures:
        spec = json.loads(figure.to_json())
        del spec["layout"]["template"]
        bare.append(spec)
    looks = {look: template(dark=look == "dark").to_plotly_json() for look in ("light", "dark")}
    return json.dumps({"figures": bare, **looks})


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
