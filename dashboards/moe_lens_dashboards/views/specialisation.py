"""Specialisation: what experts are chosen for, beside what chance gives."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pandas as pd
import streamlit as st

from moe_lens.figures.beside_chance import beside_chance
from moe_lens.figures.tag_divergence import tag_divergence
from moe_lens.figures.tag_lift import tag_lift
from moe_lens.metrics.by_token import MIN_COUNT, tokens_of_experts
from moe_lens.metrics.catalogue import Measured, Metric, measure, metrics
from moe_lens.metrics.evidence import Evidence
from moe_lens.metrics.specialisation import UNDEFINED, divergences
from moe_lens.numbers import count, digits
from moe_lens.queries import along
from moe_lens.queries.imported import reasons
from moe_lens.queries.memory import is_chosen_by_token
from moe_lens_dashboards.components import columns, traces
from moe_lens_dashboards.components.choose import choose
from moe_lens_dashboards.components.notices import not_recorded
from moe_lens_dashboards.components.phase import first_with_rows
from moe_lens_dashboards.components.run import Asked, OpenRun
from moe_lens_dashboards.components.sample import tokens_of_a_layer
from moe_lens_dashboards.components.show import draw, show
from moe_lens_dashboards.components.words import plain

_FIRST = "domain_information"
_TILES = {
    "domain_information": "Tags, nats",
    "domain_lift": "Strongest lift",
    "vocabulary_specialisation": "Vocabulary",
    "context_independence": "Context plays no part",
}


def page(run: OpenRun) -> None:
    """Draw the page."""
    layers = [x.layer for x in run.layers if is_chosen_by_token(x)]
    if not layers:
        not_recorded(run, "rows in these steps")
        return
    found = None
    if run.info.token_rows:
        most = tokens_of_a_layer(len(layers))
        found = first_with_rows(
            run, lambda phase: run.ask("sequence_choices", phase=phase, most=most)
        )
    if found is None:
        _by_tag(run, choose("layer", "Layer", layers, layers[0]), run.filters.phase)
        not_recorded(run, "token rows" if run.info.token_rows == 0 else "rows in these steps")
        return
    phase, asked = found
    with st.spinner("Permuting tags and tokens, for what chance gives"):
        by_layer = _measure(run, asked, phase)
    known = {m.name: m for m in metrics().values() if m.group == "specialisation"}
    left, right = st.columns(2)
    with left:
        name = choose("metric", "Metric", list(known), _FIRST, words=lambda x: x.replace("_", " "))
    with right:
        layer = choose("layer", "Layer", list(by_layer), _strongest(by_layer, name))
    st.caption(_source(run, asked, phase))
    _tiles(by_layer[layer], layer)
    left, right = st.columns(2)
    with left:
        _metric(known[name], by_layer, asked)
    with right:
        _apart(run, asked, layer)
    _by_tag(run, layer, phase)
    _tokens(run, asked, layer)


def _strongest(by_layer: dict[int, dict[str, Measured]], name: str) -> int:
    """The layer where the metric is highest."""

    def value(layer: int) -> float:
        return -math.inf if math.isnan(by_layer[layer][name].value) else by_layer[layer][name].value

    return max(by_layer, key=value)


def _measure(run: OpenRun, asked: Asked, phase: str) -> dict[int, dict[str, Measured]]:
    tagged = run.ask("tag_load", phase=phase)
    given = tuple(sorted((k, str(v)) for k, v in asked.parameters.items()))
    infos = {x.layer: x for x in run.info.layers}
    now = traces.current(run.path)[1]
    why = reasons(run.info)
    return _measured(now, run.path, given, asked.table, tagged.table, infos, why)


# A resource, since metrics have functions that nobody can copy; nothing here is changed. Streamlit
# leaves arguments that begin with an underscore out of the key.
@st.cache_resource(max_entries=20, show_spinner=False)
def _measured(
    now: str, path: str, given: tuple[tuple[str, str], ...], _rows: pd.DataFrame,
    _tagged: pd.DataFrame, _infos: dict[int, Any], _reasons: dict[str, str],
) -> dict[int, dict[str, Measured]]:  # fmt: skip
    wanted = [m for m in metrics().values() if m.group == "specialisation"]
    out: dict[int, dict[str, Measured]] = {}
    for layer in sorted(set(_rows["layer"])):
        rows, info = _rows[_rows["layer"] == layer], _infos[layer]
        fields = along.fields(rows.reset_index(drop=True), info)
        of_layer = along.by_tag(_tagged[_tagged["layer"] == layer], info.experts)
        why = UNDEFINED | fields.pop("why", {}) | _reasons
        known = Evidence(
            experts=info.experts, outputs=info.experts + info.zero_experts, top_k=info.top_k,
            why=why, **fields, **of_layer,
        )  # fmt: skip
        out[layer] = {each.name: measure(each, known) for each in wanted}
    return out


def _source(run: OpenRun, asked: Asked, phase: str) -> str:
    layer = asked.table["layer"].iloc[0]
    of = asked.table[asked.table["layer"] == layer]
    texts = count(len(of.groupby(["rank", "sequence"])))
    text = f"Phase {phase}{'' if run.filters.phase else ' (the sidebar chooses another)'}: "
    return plain(
        f"{text}{count(len(of))} tokens of {texts} sequences, the same in every layer; "
        "experts by tag are of every token. Chance permutes tags over sequences, or ids over "
        "tokens: beyond all 199 of them is beyond 0.5 %."
    )


def _tiles(found: dict[str, Measured], layer: int) -> None:
    st.subheader(f"Layer {layer}", anchor=False)
    for column, (name, label) in zip(st.columns(len(_TILES)), _TILES.items(), strict=True):
        each = found[name]
        chance = None
        if each.chance is not None and not math.isnan(each.chance.expected):
            beyond = {"high": ": above", "low": ": below"}.get(each.beyond, "")
            chance = f"chance {digits(each.chance.expected)}{beyond}"
        column.metric(
            label,
            "not known" if each.lacks else digits(each.value),
            chance,
            delta_color="off",
            delta_arrow="off",
            help=plain(each.lacks or f"{name}: {each.metric.diagnoses}"),
            border=True,
        )


def _metric(asked: Metric, by_layer: dict[int, dict[str, Measured]], rows: Asked) -> None:
    table = pd.DataFrame(
        [
            {
                "run": rows.table["run"].iloc[0],
                "layer": layer,
                "value": found[asked.name].value,
                "chance": getattr(found[asked.name].chance, "expected", None),
                "low": getattr(found[asked.name].chance, "low", None),
                "high": getattr(found[asked.name].chance, "high", None),
            }
            for layer, found in by_layer.items()
        ]
    )
    show(
        beside_chance(
            table, asked.name.replace("_", " ").capitalize(), asked.unit or "value", asked.diagnoses
        ),
        rows,
        key="specialisation",
    )
    reasons = dict.fromkeys(found[asked.name].lacks for found in by_layer.values())
    for lacks in filter(None, reasons):
        st.caption(plain(f"Not computed: {lacks}."))


def _apart(run: OpenRun, asked: Asked, layer: int) -> None:
    tagged = _here(run).ask("tag_load", phase=asked.parameters["phase"], **_only(layer))
    table, rows = tagged.table, []
    if len(set(table["tag"])) > 1:
        wide = table.pivot(index="tag", columns="expert", values="routed")
        for tag, of_tag in zip(wide.index, divergences(wide.to_numpy()), strict=True):
            for other, nats in zip(wide.index, of_tag.tolist(), strict=True):
                rows.append({"tag": tag, "other": other, "divergence": nats})
    made = pd.DataFrame(rows, columns=["tag", "other", "divergence"])
    show(tag_divergence(made), tagged, key="divergence")


def _by_tag(run: OpenRun, layer: int, phase: str | None) -> None:
    only: dict[str, Any] = {} if phase is None else {"phase": phase}
    draw(_here(run), tag_lift, "tag_load", key="tag_lift", **only, **_only(layer))


def _tokens(run: OpenRun, asked: Asked, layer: int) -> None:
    st.subheader(f"Vocabulary ids that experts of layer {layer} take most of", anchor=False)
    rows = asked.table[asked.table["layer"] == layer].reset_index(drop=True)
    (info,) = (x for x in run.info.layers if x.layer == layer)
    known = along.fields(rows, info) if len(rows) else {}
    if "token_id_N" not in known:
        not_recorded(run, "token ids")
        return
    table = tokens_of_experts(known["ids_NK"], known["token_id_N"], info.experts, top=5)
    shown = {
        "expert": columns.whole("expert"),
        "token_id": columns.whole("vocabulary id"),
        "tokens": columns.whole("tokens", help="With this id."),
        "chosen": columns.whole("chosen", help="Of those, by the expert."),
        "share": columns.share("share"),
        "lift": columns.number("lift", 1, help="Over the share of all tokens."),
    }
    st.dataframe(table[list(shown)], hide_index=True, column_config=shown)
    st.caption(
        f"The five of largest share of each expert, of ids that occur at least {MIN_COUNT} times "
        "in these tokens: of rarer ones any expert has a large share by chance."
    )


def _here(run: OpenRun) -> OpenRun:
    """Without the filters of layers, within which the layer was chosen."""
    filters = dataclasses.replace(run.filters, first_layer=None, last_layer=None)
    return dataclasses.replace(run, filters=filters)


def _only(layer: int) -> dict[str, Any]:
    return {"first_layer": layer, "last_layer": layer}
