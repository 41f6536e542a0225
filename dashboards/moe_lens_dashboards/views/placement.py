"""Placement: which rank should hold which experts, and what that would have given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import streamlit as st

from moe_lens.figures.blank import because
from moe_lens.figures.placement_gains import placement_gains
from moe_lens.figures.rank_load import rank_load
from moe_lens.figures.rank_slowest import rank_slowest
from moe_lens.figures.rank_traffic import rank_traffic
from moe_lens.numbers import count
from moe_lens.replay.placement.balance import rank_rows
from moe_lens.replay.placement.counts import Counts
from moe_lens.replay.placement.fit import Group
from moe_lens.replay.placement.methods import METHODS
from moe_lens.replay.placement.study import Candidate, Question, Study, study
from moe_lens.replay.placement.verdict import LEAST_GAIN, Verdict
from moe_lens_dashboards.components import columns, traces
from moe_lens_dashboards.components.choose import choose
from moe_lens_dashboards.components.notices import made_up_note
from moe_lens_dashboards.components.run import OpenRun
from moe_lens_dashboards.components.show import chart
from moe_lens_dashboards.components.words import plain

_TOKENS = 8_000
"""Of a layer, where rows per token are read: a second or two."""
_SHOWN = 120
"""Forwards of a heat map."""
_LAST = 1 << 62


def page(run: OpenRun) -> None:
    """Draw the page."""
    question = _question(run)
    if question is None:
        st.info(
            "The experts of these layers do not divide among several ranks.", icon=":material/info:"
        )
        return
    now = traces.current(run.path)[1]
    with st.spinner("Placing experts …"):
        found = _found(run.path, now, question)
    st.caption(plain(found.about))
    made_up_note(run)
    _verdict(found.verdict, question.method)
    _table(found.table)
    layer = choose("layer", "Layer", found.layers, found.worst)
    left, right = st.columns(2)
    for side, loads, traffic in zip((left, right), found.loads[layer], found.traffic, strict=True):
        with side:
            chart(rank_load(loads), key=f"load {loads['placement'].iloc[0]} {side is left}")
            chart(because(rank_traffic(traffic), run.info), key=f"traffic {side is left}")
    with left:
        chart(rank_slowest(found.slowest), key="slowest")
    with right:
        chart(placement_gains(found.gains), key="gains")


def _question(run: OpenRun) -> Question | None:
    """What is chosen; None where experts divide among no number of ranks."""
    filters = run.filters
    layers = frozenset(
        x.layer
        for x in run.info.layers
        if x.stream == "main"
        and (filters.first_layer is None or x.layer >= filters.first_layer)
        and (filters.last_layer is None or x.layer <= filters.last_layer)
    )
    experts = next(x.experts for x in run.info.layers if x.layer in layers) if layers else 1
    sizes = [n for n in range(2, min(experts, 256) + 1) if experts % n == 0]
    if not sizes:
        return None
    one, two, three, four = st.columns(4)
    with one:
        ranks = choose("ranks", "Ranks", sizes, min(sizes, key=lambda n: abs(n - 8)))
    with two:
        replicas = choose("replicas", "Replicas a layer", [i * ranks for i in range(5)], 0)
    with three:
        nodes = choose("nodes", "Nodes", [n for n in range(1, 9) if ranks % n == 0], 1)
    with four:
        method = choose("method", "Placement", METHODS[1:], "eplb")
    steps = None
    if filters.first_step is not None or filters.last_step is not None:
        last = _LAST if filters.last_step is None else filters.last_step
        steps = range(filters.first_step or 0, last + 1)
    return Question(
        Group(ranks, replicas, nodes),
        method=method,
        layers=layers,
        phase=filters.phase,
        steps=steps,
        verdict=True,
        tokens=_TOKENS,
    )


@dataclass(frozen=True)
class _Found:
    """What the page shows: tables of figures, and the words around them.

    Attributes:
        loads, traffic: As it is, and placed.
    """

    about: str
    verdict: Verdict | None
    table: pd.DataFrame
    layers: list[int]
    worst: int
    loads: dict[int, tuple[pd.DataFrame, pd.DataFrame]]
    traffic: tuple[pd.DataFrame, pd.DataFrame]
    slowest: pd.DataFrame
    gains: pd.DataFrame


@st.cache_data(max_entries=30, show_spinner=False)
def _found(path: str, now: str, question: Question) -> _Found:
    made = study(path, question)
    shown = [made.now, made.of(question.method)]
    rows = [rank_rows(made.judged_by, each.placement) for each in shown]
    layers = list(made.judged_by.layers)
    ratio_L = rows[0].max(2).sum(0) / np.maximum(rows[0].mean(2).sum(0), 1e-9)
    return _Found(
        about=_about(made),
        verdict=made.verdict,
        table=pd.DataFrame(_rows(made)),
        layers=layers,
        worst=layers[int(np.argmax(ratio_L))],
        loads={
            layer: (
                _load(made.judged_by, rows[0][:, i], layer, _name(made, shown[0])),
                _load(made.judged_by, rows[1][:, i], layer, _name(made, shown[1])),
            )
            for i, layer in enumerate(layers)
        },
        traffic=(_traffic(shown[0], _name(made, shown[0])), _traffic(shown[1], question.method)),
        slowest=_slowest(made, shown, rows),
        gains=_gains(made.verdict, question.least_gain),
    )


def _name(made: Study, of: Candidate) -> str:
    return f"{of.placement.method} (now)" if of is made.now else of.placement.method


def _about(made: Study) -> str:
    counts, plan = made.counts, made.plan
    text = f"{counts.experts} experts of {len(counts.layers)} layers on {plan.ranks} ranks"
    text += f" of {plan.nodes} nodes" if plan.nodes > 1 else ""
    text += f"; {made.fitted_how}."
    if made.now.traffic is not None:
        text += f" What tokens send, and affinity: from about {count(_TOKENS)} tokens of a layer."
    if len(counts.forwards) < counts.recorded - counts.uncounted:
        text += (
            f" {count(len(counts.forwards))} of {count(counts.recorded)} forwards, evenly spread."
        )
    if counts.uncounted:
        text += f" {count(counts.uncounted)} forwards without counts of their own are left out."
    return text


def _verdict(verdict: Verdict | None, method: str) -> None:
    if verdict is None:
        return
    said = plain(f"{method}: {verdict.says}. {verdict.why}")
    if verdict.says == "helps":
        st.success(said, icon=":material/check_circle:")
    elif verdict.says == "does not help":
        st.info(said, icon=":material/do_not_disturb_on:")
    else:
        st.warning(said, icon=":material/help:")


def _rows(made: Study) -> Iterator[dict[str, object]]:
    for of in (made.now, *made.candidates):
        for phase, balance in of.balance.items():
            sent = of.traffic
            yield {
                "placement": _name(made, of),
                "phase": phase,
                "max_over_mean": balance.max_over_mean,
                "mean_over_max": balance.mean_over_max,
                "excess": balance.excess,
                "slowest_p50": balance.slowest_p50,
                "slowest_p99": balance.slowest_p99,
                "ranks": None if sent is None else sent.to_ranks.rows / sent.token_layers,
                "nodes": None if sent is None else sent.to_nodes.rows / sent.token_layers,
                "held": None if of.bytes_per_rank is None else of.bytes_per_rank / 1e6,
                "moved": of.moved,
            }


def _table(rows: pd.DataFrame) -> None:
    shown = {
        "placement": columns.text("placement"),
        "phase": columns.text("phase"),
        "max_over_mean": columns.number(
            "max / mean", help="Over ranks, in each layer of each forward; then the mean."
        ),
        "mean_over_max": columns.number("mean / max", help="As SGLang's balancedness."),
        "excess": columns.number("(max − mean) / mean", help="As TensorRT-LLM's imbalance ratio."),
        "slowest_p50": columns.share(
            "slowest, p50", help="Share of a forward's rows on the slowest rank of each layer."
        ),
        "slowest_p99": columns.share("slowest, p99"),
        "ranks": columns.number(
            "rows to ranks", 2, help="That a token sends in a layer, once for each other rank."
        ),
        "nodes": columns.number("rows to nodes", 2),
        "held": columns.number("MB on a rank", 1, help="Weights of its experts in 16 bits."),
        "moved": columns.whole("to fetch", help="Experts that the busiest rank does not hold now."),
    }
    st.dataframe(rows, hide_index=True, column_config=shown)


def _load(counts: Counts, rows_FR: np.ndarray, layer: int, name: str) -> pd.DataFrame:
    """Loads of at most so many forwards, evenly spread."""
    forwards, ranks = rows_FR.shape
    kept = np.unique(np.linspace(0, forwards - 1, min(_SHOWN, forwards)).round().astype(int))
    mean_F1 = rows_FR[kept].mean(1, keepdims=True)
    load_FR = np.divide(
        rows_FR[kept], mean_F1, out=np.full((len(kept), ranks), np.nan), where=mean_F1 > 0
    )
    return pd.DataFrame(
        {
            "placement": name,
            "layer": layer,
            "forward": np.repeat(np.arange(len(kept)), ranks),
            "step": np.repeat([counts.forwards[i][0] for i in kept], ranks),
            "rank": np.tile(np.arange(ranks), len(kept)),
            "load": load_FR.ravel(),
        }
    )


def _traffic(of: Candidate, name: str) -> pd.DataFrame:
    ranks = of.placement.ranks
    per_thousand = (
        np.full((ranks, ranks), np.nan)
        if of.traffic is None
        else 1000 * of.traffic.rows_RR / of.traffic.token_layers
    )
    return pd.DataFrame(
        {
            "placement": name,
            "source": np.repeat(np.arange(ranks), ranks),
            "destination": np.tile(np.arange(ranks), ranks),
            "rows": per_thousand.ravel(),
        }
    )


def _slowest(made: Study, shown: list[Candidate], rows: list[np.ndarray]) -> pd.DataFrame:
    steps = [step for step, _, _ in made.judged_by.forwards]
    parts = []
    for of, rows_FLR in zip(shown, rows, strict=True):
        most_F, mean_F = rows_FLR.max(2).sum(1), rows_FLR.mean(2).sum(1)
        ratio_F = np.divide(most_F, mean_F, out=np.full(len(steps), np.nan), where=mean_F > 0)
        parts.append(
            pd.DataFrame({"placement": _name(made, of), "step": steps, "slowest": ratio_F})
        )
    return pd.concat(parts).groupby(["placement", "step"], sort=False).mean().reset_index()


def _gains(verdict: Verdict | None, least: float = LEAST_GAIN) -> pd.DataFrame:
    gains = [] if verdict is None else verdict.gains
    return pd.DataFrame({"window": range(1, len(gains) + 1), "gain": gains, "least": least})
