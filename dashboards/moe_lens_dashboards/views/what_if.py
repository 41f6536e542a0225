"""What if: what experts and routes are worth, measured by changing them."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from moe_lens.errors import TraceError
from moe_lens.figures.knock_out_by_load import knock_out_by_load
from moe_lens.figures.regret_by_slice import regret_by_slice
from moe_lens.figures.top_k_sweep import top_k_sweep
from moe_lens.numbers import count
from moe_lens.queries.counterfactual import about, newest_first
from moe_lens_dashboards.components import columns
from moe_lens_dashboards.components.choose import choose
from moe_lens_dashboards.components.notices import failed
from moe_lens_dashboards.components.run import Asked, OpenRun
from moe_lens_dashboards.components.show import show, sql
from moe_lens_dashboards.components.words import plain

_PARTIAL = "-interrupted"
"""What the name of an unfinished result ends in."""
_REFUSED = 5
"""So many changes that could not be made are listed."""
_SURE = {
    "margin": "Quarters of each layer's tokens by margin, the k-th choice's score over the next "
    "one's: the router is least sure in the first.",
    "entropy": "Quarters of each layer's tokens by entropy of the router: it is least sure in the "
    "last.",
}


def page(run: OpenRun) -> None:
    """Draw the page."""
    names = newest_first(run.path)
    if not names:
        _none(run)
        return
    whole = [name for name in names if not name.endswith(_PARTIAL)]
    name = choose("result", "Result", names, (whole or names)[0])
    try:
        _about(about(run.path, name))
    except TraceError as e:
        failed(e)
        if name.endswith(_PARTIAL):
            st.caption("It is being measured now, or its program was killed before it could end.")
        return
    _experts(run, name)
    _routes(run, name)
    _changes(run, name)


def _none(run: OpenRun) -> None:
    st.info(
        "Nobody has asked yet what other routes would have done to the loss. It takes the model "
        "that was recorded, and batches: two functions of yours.",
        icon=":material/info:",
    )
    st.code(
        f"moe-lens counterfactual {run.path} --model MODULE:FUNCTION --data MODULE:FUNCTION",
        language="sh",
    )


def _about(said: dict[str, Any]) -> None:
    if said.get("interrupted"):
        st.warning(
            "This measurement was interrupted: it has some of its changes.", icon=":material/pause:"
        )
    st.caption(
        plain(
            f"{said['model']}: {count(said.get('measured_tokens'))} tokens of "
            f"{count(said.get('sequences'))} sequences. Costs are the loss under a change minus "
            "the loss without it, a token; one layer is changed at a time. The loss is the next "
            "token's cross-entropy in nats, unless another was measured (--loss)."
        )
    )
    refused = list(said.get("refused", {}).items())
    for change, why in refused[:_REFUSED]:
        st.caption(plain(f"Not measured: {change}: {why}"))
    if len(refused) > _REFUSED:
        st.caption(f"and {count(len(refused) - _REFUSED)} more")


def _experts(run: OpenRun, name: str) -> None:
    st.subheader("Experts: what the loss would miss", anchor=False)
    asked = run.ask("expert_importance", result=name)
    table = asked.table
    if table.empty:
        show(knock_out_by_load(table), asked, key="experts")
        return
    layers = sorted(set(table["layer"].tolist()))
    layer = choose("layer", "Layer", layers, _worth_a_look(table))
    rows = table[table["layer"] == layer].sort_values("knock_out", ascending=False)
    left, right = st.columns([2, 3])
    with left:
        show(knock_out_by_load(rows), asked, key="experts")
    with right:
        _expert_table(rows, table)


def _worth_a_look(table: pd.DataFrame) -> int:
    """The layer with most experts that are dormant but causal, or else the dearest one."""
    by = table.groupby("layer").agg(
        causal=("dormant_but_causal", "sum"), cost=("knock_out", "max"), load=("load", "max")
    )
    return int(by.fillna(0).sort_values(["causal", "cost", "load"]).index[-1])


def _expert_table(rows: pd.DataFrame, all_layers: pd.DataFrame) -> None:
    st.markdown("**Knocked out, and forced in**")
    causal = all_layers[all_layers["dormant_but_causal"]]
    listed = ", ".join(f"{r.expert} of layer {r.layer}" for r in causal.head(8).itertuples())
    st.caption(
        plain(
            f"Dormant but causal, all layers: {listed}{' …' if len(causal) > 8 else ''}."
            if listed
            else "No expert of these layers is dormant but causal."
        )
    )
    rows = rows.assign(
        word=[
            "but causal" if causal else "yes" if dormant else ""
            for dormant, causal in zip(rows["dormant"], rows["dormant_but_causal"], strict=True)
        ],
    )
    shown = {
        "expert": columns.whole("expert"),
        "word": columns.text(
            "dormant",
            help="Chosen by less than a quarter of K / E of the tokens. But causal: where used, or "
            "forced in, above twice its layer's median and beyond three errors.",
        ),
        "load": columns.share("load", help="Share of the measured tokens that choose it."),
        "knock_out": columns.cost(
            "knocked out",
            help="Cost over all tokens: the router takes its best others instead.",
        ),
        "knock_out_error": columns.number("± error", 4, help="Over sequences."),
        "knock_out_used": columns.cost("where used", help="Over the tokens that chose it."),
        "force_in": columns.cost("forced in", help="In the last place of all other tokens."),
    }
    st.dataframe(rows[list(shown)], hide_index=True, column_config=shown, height=360)


def _routes(run: OpenRun, name: str) -> None:
    st.subheader("Routes: would other experts have served better?", anchor=False)
    by_layer = run.ask("route_regret", result=name)
    if by_layer.table.empty:
        show(regret_by_slice(by_layer.table), by_layer, key="regret")
        return
    sure = choose("by", "How sure the router is", list(_SURE), "margin")
    asked = {
        by: run.ask("route_regret", result=name, by=by, together=True)
        for by in ("margin", "entropy", "tag")
    }
    left, right = st.columns(2)
    with left:
        show(regret_by_slice(asked[sure].table), asked[sure], key="regret by certainty")
        st.caption(_SURE[sure])
    with right:
        show(regret_by_slice(asked["tag"].table), asked["tag"], key="regret by tag")
    _regret_table([by_layer, *asked.values()])


def _regret_table(asked: list[Asked]) -> None:
    parts = []
    for each in asked:
        layer = each.table["layer"].map(lambda n: "all" if n < 0 else str(n))
        parts.append(each.table.assign(layer=layer, of=each.table["routes"] + 1))
    shown = {
        "layer": columns.text("layer"),
        "slice": columns.text(
            "tokens",
            help="Quarters of each layer's tokens. The router is least sure in the first quarter "
            "by margin, and in the last by entropy.",
        ),
        "tokens": columns.whole("n"),
        "regret": columns.cost("regret", help="Loss minus the least loss of the drawn routes."),
        "regret_error": columns.number("± error", 4, help="Over sequences."),
        "positive": columns.share("above 0", help="Of some drawn route the loss is lower."),
        "random_regret": columns.cost(
            "of a drawn route",
            help="A least of several flatters: so much regret has a router that knows nothing.",
        ),
        "mean_route": columns.cost(
            "mean route", help="Mean loss of the drawn routes minus the router's."
        ),
        "rank": columns.number("rank", 1, help="Of the router's route among all: 1 is best."),
        "middle_rank": columns.number("by chance", 1, help="Of a router that draws."),
        "of": columns.number("of", 0),
        "beats": columns.share(
            "beats drawn", help="Share of drawn routes that are worse: 50 % by chance."
        ),
    }
    table = pd.concat(parts)[list(shown)]
    st.dataframe(table, hide_index=True, column_config=shown)
    sql(*asked, key="regrets")


def _changes(run: OpenRun, name: str) -> None:
    st.subheader("Fewer or more experts, and the runner-up", anchor=False)
    asked = run.ask("route_changes", result=name)
    left, right = st.columns(2)
    with left:
        show(top_k_sweep(asked.table), asked, key="top_k")
    swapped = asked.table[asked.table["intervention"] == "runner_up"]
    if swapped.empty:
        return
    with right:
        st.markdown("**The runner-up in the place of the last choice**")
        st.caption("A cost near 0: the last choice was hardly better than the next.")
        shown = {
            "layer": columns.whole("layer"),
            "loss": columns.number("loss", 4, help="Without the change."),
            "cost": columns.cost("cost"),
            "cost_error": columns.number("± error", 4, help="Over sequences."),
            "worse": columns.share("tokens worse", help="Share of tokens whose loss rose."),
        }
        st.dataframe(swapped[list(shown)], hide_index=True, column_config=shown)
