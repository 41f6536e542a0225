"""Granularity: how finely experts divide the work, and what the laboratory found about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import streamlit as st

from moe_lens.figures.sets_by_layer import sets_by_layer
from moe_lens.metrics.catalogue import Measured, measure, metrics
from moe_lens.metrics.configurations import UNDEFINED
from moe_lens.metrics.evidence import Evidence
from moe_lens.numbers import count
from moe_lens.queries import along
from moe_lens.queries.evidence import configuration
from moe_lens.queries.memory import is_chosen_by_token
from moe_lens_dashboards.components import columns, link, traces
from moe_lens_dashboards.components.notices import not_recorded
from moe_lens_dashboards.components.phase import first_with_rows
from moe_lens_dashboards.components.run import Asked, OpenRun
from moe_lens_dashboards.components.sample import tokens_of_a_layer
from moe_lens_dashboards.components.show import show
from moe_lens_dashboards.components.words import plain
from moe_lens_dashboards.views.laboratory import is_of_a_laboratory, laboratory_section

if TYPE_CHECKING:
    from moe_lens.trace.meta import LayerInfo

_CONFIGURED = ("reachable_bits", "granularity")
_SEEN = ("distinct_sets", "set_coverage", "chao1_sets", "effective_sets")


def page(run: OpenRun) -> None:
    """Draw the page: what the run was made to show comes first."""
    parts = [_sets_of_the_run, laboratory_section]
    for part in reversed(parts) if is_of_a_laboratory(run) else parts:
        part(run)


def _sets_of_the_run(run: OpenRun) -> None:
    st.subheader("Sets of experts that tokens choose in this run", anchor=False)
    found = _rows(run)
    layers = _measure(run, found)
    if found is None:
        not_recorded(run, "token rows" if run.info.token_rows == 0 else "rows in these steps")
    else:
        st.caption(_source(run, layers, found[0]))
        show(sets_by_layer(_sets(layers)), found[1], key="sets")
    _table(layers)
    _lacking(layers)
    if st.button("What experts are chosen for", icon=":material/arrow_forward:"):
        link.go("specialisation")


@dataclass(frozen=True)
class _Layer:
    """A layer, and what its metrics say; tokens: how many of it were looked at."""

    info: LayerInfo
    tokens: int
    found: dict[str, Measured]

    def value(self, name: str) -> float:
        return self.found[name].value if name in self.found else math.nan

    @property
    def by_chance(self) -> float:
        """Sets that as many tokens of a router that draws would show."""
        each = self.found.get("distinct_sets")
        return math.nan if each is None or each.chance is None else each.chance.expected

    @property
    def at_least(self) -> float:
        """Chao's estimate of the sets in use, which may go beyond those that there are."""
        used, estimate = self.value("distinct_sets"), self.value("chao1_sets")
        return min(estimate, self.possible) if used <= self.possible else estimate

    @property
    def possible(self) -> float:
        """Sets that the router can reach; no float holds more than 2^1023."""
        bits = self.value("reachable_bits")
        return math.nan if math.isnan(bits) else 2.0 ** min(bits, 1023)


def _rows(run: OpenRun) -> tuple[str, Asked] | None:
    """The same tokens as on the page Specialisation, which are then read once."""
    layers = [x for x in run.layers if is_chosen_by_token(x)]
    if not layers or not run.info.token_rows:
        return None
    most = tokens_of_a_layer(len(layers))
    return first_with_rows(run, lambda phase: run.ask("sequence_choices", phase=phase, most=most))


def _measure(run: OpenRun, found: tuple[str, Asked] | None) -> list[_Layer]:
    asked = None if found is None else found[1]
    rows = pd.DataFrame({"layer": []}) if asked is None else asked.table
    given = "" if asked is None else repr(sorted(asked.parameters.items()))
    infos = run.layers
    now = traces.current(run.path)[1]
    return _measured(run.path, now, given, tuple(x.layer for x in infos), infos, rows)


# A resource, as on the page Specialisation: metrics have functions, which nobody can copy.
@st.cache_resource(max_entries=20, show_spinner="Counting sets of experts …")
def _measured(
    path: str, now: str, given: str, layers: tuple[int, ...],
    _infos: list[LayerInfo], _rows: pd.DataFrame,
) -> list[_Layer]:  # fmt: skip
    return [_look(info, _rows[_rows["layer"] == info.layer]) for info in _infos]


def _look(info: LayerInfo, rows: pd.DataFrame) -> _Layer:
    if not is_chosen_by_token(info):
        rows = rows.iloc[:0]
    ids_NK = along.choices(rows, info.experts)[0] if len(rows) else None
    said = configuration(info)
    why = UNDEFINED | said.pop("why", {})
    known = Evidence(
        experts=info.experts, outputs=info.experts + info.zero_experts, top_k=info.top_k,
        ids_NK=ids_NK, why=why, **said,
    )  # fmt: skip
    wanted = (*_CONFIGURED, *_SEEN) if len(rows) else _CONFIGURED
    return _Layer(info, len(rows), {name: measure(metrics()[name], known) for name in wanted})


def _source(run: OpenRun, layers: list[_Layer], phase: str) -> str:
    tokens = max(x.tokens for x in layers)
    chosen = "" if run.filters.phase else " (the sidebar chooses another)"
    return plain(
        f"Phase {phase}{chosen}: {count(tokens)} tokens, the same in every layer. Few tokens show "
        "few sets: coverage is the probability that the next token's set is one of those seen."
    )


def _sets(layers: list[_Layer]) -> pd.DataFrame:
    rows = [
        {
            "layer": each.info.layer,
            "tokens": each.tokens,
            "used": each.value("distinct_sets"),
            "at_least": each.at_least,
            "chance": each.by_chance,
            "possible": each.possible,
        }
        for each in layers
    ]
    return pd.DataFrame(rows, columns=["layer", "tokens", "used", "at_least", "chance", "possible"])


def _table(layers: list[_Layer]) -> None:
    rows = [
        {
            "layer": each.info.layer,
            "path": each.info.path,
            "experts": each.info.experts,
            "top_k": each.info.top_k,
            "share": _share(each.info),
            "finer": each.value("granularity"),
            "groups": _groups(each.info),
            "bits": each.value("reachable_bits"),
            "used": each.value("distinct_sets"),
            "chance": each.by_chance,
            "coverage": each.value("set_coverage"),
            "at_least": each.at_least,
            "effective": each.value("effective_sets"),
        }
        for each in layers
    ]
    shown = {
        "layer": columns.whole("layer"),
        "path": columns.text("module"),
        "experts": columns.whole("experts", help="m, without those that compute nothing."),
        "top_k": columns.whole("k", help="Experts of a token."),
        "share": columns.share("k / m"),
        "finer": columns.number(
            "granularity", 1, help="How many experts are as wide as a dense layer: 4 d / d_expert."
        ),
        "groups": columns.text("groups", help="A token's experts come from so many of them."),
        "bits": columns.number(
            "log2 sets", 1, help="Of the sets that a token can choose: C(m, k), or fewer by groups."
        ),
        "used": columns.whole("sets seen", help="Different sets that these tokens chose."),
        "chance": columns.whole("by chance", help="Of a router to which all sets are alike."),
        "coverage": columns.share("coverage", help="Good-Turing: 1 - sets seen once / tokens."),
        "at_least": columns.whole("at least", help="Chao 1984: sets in use, unseen ones too."),
        "effective": columns.whole(
            "effective sets",
            help="So many sets, all used alike, would be met again as often as these (Simpson).",
        ),
    }
    table = pd.DataFrame(rows, columns=list(shown))
    table = table.round({"chance": 0, "at_least": 0, "effective": 0})
    unknown = [name for name in ("finer", "groups") if _nothing(table[name])]
    st.dataframe(table.drop(columns=unknown), hide_index=True, column_config=shown)


def _share(info: LayerInfo) -> float:
    return math.nan if info.top_k is None else info.top_k / (info.experts + info.zero_experts)


def _groups(info: LayerInfo) -> str:
    return f"{info.top_groups or info.groups} of {info.groups}" if info.groups else ""


def _nothing(values: pd.Series) -> bool:
    return bool((values.isna() | (values == "")).all())


def _lacking(layers: list[_Layer]) -> None:
    """Why numbers are not there; widths that a recorder was not told are no news."""
    said: dict[str, list[str]] = {}
    for each in layers:
        for name, found in each.found.items():
            if found.lacks and name != "granularity":
                where = said.setdefault(f"{name.replace('_', ' ')}: {found.lacks}", [])
                where.append(str(each.info.layer))
    for why, where in said.items():
        st.caption(plain(f"Not computed in layer {', '.join(where)}: {why}."))
