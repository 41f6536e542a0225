"""`evidence`: what a trace knows of one layer in one phase, for the metrics of the catalogue.

Asks stored questions about that layer, and only those that the metrics asked for need; what is not
a sum is bounded: 32 forwards (whole steps), 4,096 tokens (whole forwards), 16,384 tokens of whole
sequences.

Legend: E experts, V outputs of the router, F forwards, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.metrics.catalogue import Metric
from moe_lens.metrics.confidence import probabilities
from moe_lens.metrics.evidence import Evidence
from moe_lens.queries import along
from moe_lens.queries.memory import previous_layer
from moe_lens.queries.session import Trace

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from moe_lens.queries.info import RunInfo
    from moe_lens.trace.meta import LayerInfo

FORWARDS = 32
TOKENS = 4_096

_BY_EXPERTS = "experts choose their tokens here, and are balanced by that"
_NO_ROWS = "no per-token rows: record with tokens=1.0 (moe-lens record --tokens 1)"
_NO_LOGITS = "no router logits of single tokens: record with tokens=1.0 and logits=True"

Fields = dict[str, Any]


@dataclass(frozen=True)
class _Asked:
    """One layer of one run in one phase."""

    trace: Trace
    run: RunInfo
    info: LayerInfo
    phase: str

    def of_layer(self, question: str, **more: object) -> pd.DataFrame:
        layer = self.info.layer
        asked = {"phase": self.phase, "first_layer": layer, "last_layer": layer, **more}
        return self.trace.query(question, **asked).df()

    def about_layer(self, question: str, **more: object) -> pd.DataFrame:
        asked = {"phase": self.phase, "layer": self.info.layer, **more}
        return self.trace.query(question, **asked).df()

    @property
    def outputs(self) -> int:
        return self.info.experts + self.info.zero_experts


def evidence(
    trace: Trace, run: RunInfo, info: LayerInfo, phase: str, metrics: Iterable[Metric]
) -> Evidence:
    """What these metrics need to know of a layer in a phase."""
    asked = _Asked(trace, run, info, phase)
    wanted = {name for each in metrics for name in each.needs}
    fields: Fields = {}
    why: dict[str, str] = {}
    for names, read in _READERS:
        if not wanted.isdisjoint(names):
            experts_choose = info.router == "expert-choice" and read in _OF_TOKENS_CHOICES
            found = {"why": dict.fromkeys(names, _BY_EXPERTS)} if experts_choose else read(asked)
            why |= found.pop("why", {})
            fields |= found
    return Evidence(
        experts=info.experts, outputs=asked.outputs, top_k=info.top_k, why=why, **fields
    )


def _balance(asked: _Asked) -> Fields:
    row = asked.of_layer("layer_balance").to_dict("records")[0]
    answer = _numbers(row)
    needed = answer.get("tokens_needed") or 0
    short = f"too few tokens: with fewer than {needed:,.0f} an expert is missed by chance"
    why = {"dead_experts": short, "dormant_experts": short}
    return {"layer_balance": answer, "tokens": int(row.get("tokens", 0)), "why": why}


def _loads(asked: _Asked) -> Fields:
    rows = asked.of_layer("expert_load")
    counts_E = rows["routed"].to_numpy(np.int64)
    if not counts_E.sum():
        return {"why": {"counts_E": "no choices by valid tokens in this phase"}}
    out: Fields = {"counts_E": counts_E}
    chosen = rows[rows["routed"] > 0]
    if chosen["weight_sum"].notna().all():
        out["gate_E"] = rows["weight_sum"].fillna(0.0).to_numpy(float)
    if asked.info.zero_experts:
        words = "no sums of probabilities of zero-compute experts: expert_load leaves these out"
        return out | {"why": {"prob_V": words}}
    if chosen["prob_sum"].notna().all():
        prob_V = rows["prob_sum"].fillna(0.0).to_numpy(float)
        out["prob_V"] = prob_V / prob_V.sum()
    return out


def _halves(asked: _Asked) -> Fields:
    balance = asked.of_layer("load_over_time", every=asked.run.every())
    steps = np.unique(balance["step"].to_numpy(np.int64))
    if len(steps) < 2:
        return {}
    middle = int(steps[len(steps) // 2])
    first = asked.of_layer("expert_load", last_step=middle - 1)
    second = asked.of_layer("expert_load", first_step=middle)
    return {"counts_HE": np.stack([x["routed"].to_numpy(np.int64) for x in (first, second)])}


def _confidence(asked: _Asked) -> Fields:
    return {"router_confidence": _row(asked.of_layer("router_confidence", by_tag=False))}


def _drops(asked: _Asked) -> Fields:
    if asked.info.capacity_policy is None:
        return {"why": {"dropped_tokens": "no capacity: the layer is dropless"}}
    return {"dropped_tokens": _row(asked.of_layer("dropped_tokens", by_tag=False))}


def _forwards(asked: _Asked) -> Fields:
    rows = asked.about_layer("forward_loads", most=FORWARDS)
    if not rows["routed"].sum():
        return {}
    heads = rows.groupby(["step", "rank", "window"], sort=False)
    at_N = heads.ngroup().to_numpy(np.int64)
    head = heads.first().reset_index()
    E, V = asked.info.experts, asked.outputs

    def dense(name: str) -> NDArray[np.float64]:
        out_FV = np.zeros((len(head), V))
        out_FV[at_N, rows["expert"].to_numpy(np.int64)] = rows[name].fillna(0.0).to_numpy(float)
        return out_FV

    out: Fields = {
        "counts_FE": dense("routed")[:, :E].astype(np.int64),
        "computed_FE": dense("processed")[:, :E].astype(np.int64),
        "tokens_F": head["tokens"].to_numpy(np.int64),
        "step_F": head["step"].to_numpy(np.int64),
        "rank_F": head["rank"].to_numpy(np.int64),
    }
    if rows["prob_sum"].notna().all():
        sums_FV = dense("prob_sum")
        if (sums_FV.sum(1) > 0).all():
            out["prob_FV"] = sums_FV / sums_FV.sum(1, keepdims=True)
    if rows["capacity"].notna().all():
        out["overflowed_FE"] = dense("overflowed")[:, :E].astype(np.int64)
        if (rows["capacity_groups"].fillna(1) == 1).all():
            out["capacity_F"] = head["capacity"].to_numpy(np.int64)
        else:
            out["why"] = {"capacity_F": "no capacity of whole forwards: each sequence has its own"}
    return out


def _sweep(asked: _Asked) -> Fields:
    rows = asked.of_layer("capacity_sweep", lowest=0.5, highest=4.0, points=71)
    if rows.empty:
        return {}
    above = "more than 1 % is dropped at a capacity factor of 4 too"
    curve = rows[["capacity_factor", "dropped_share"]]
    return {"sweep": curve, "why": {"capacity_for_1": above}}


def _positions(asked: _Asked) -> Fields:
    if asked.run.token_rows == 0:
        return {"why": {"drops_by_position": _NO_ROWS}}
    rows = asked.of_layer("unserved_by_position", width=1)
    if rows.empty or not rows["dropped"].sum():
        return {"why": {"drops_by_position": "no dropped choice in the kept rows"}}
    return {"drops_by_position": rows[["position", "tokens", "dropped_rate"]]}


def _rows(asked: _Asked) -> Fields:
    names = ("chosen_TV", "weight_TV", "dropped_TV", "sequence_T", "logits_TV", "prob_TV")
    if asked.run.token_rows == 0:
        return {"why": dict.fromkeys(names, _NO_ROWS)}
    rows = asked.about_layer("token_choices", most=TOKENS)
    if rows.empty:
        return {"why": dict.fromkeys(names, "no per-token rows of this phase")}
    out: Fields = {}
    why = dict.fromkeys(("logits_TV", "prob_TV"), _NO_LOGITS)
    if rows["logits"].notna().any():
        rows, logits_TV = _finite(rows)
        known = asked.info.score is not None and len(rows) > 0
        if len(rows):
            out["logits_TV"] = logits_TV
        if known:
            out["prob_TV"] = probabilities(logits_TV, str(asked.info.score))
        why = (
            {}
            if known
            else {"prob_TV": "the router's score is unknown: logits have no probabilities"}
        )
    chosen = rows["router_ids"].where(rows["router_ids"].notna(), rows["expert_ids"])
    out["chosen_TV"] = _marked(chosen, asked.outputs) > 0
    out["weight_TV"] = _marked(rows["expert_ids"], asked.outputs, rows["weights"])
    dropped_TV = _dropped(rows, asked.outputs)
    if dropped_TV.any():
        out["dropped_TV"] = dropped_TV
    else:
        why["dropped_TV"] = "no dropped choice in the kept rows"
    by = rows.groupby(["rank", "sequence"], sort=False)
    out["sequence_T"] = by.ngroup().to_numpy(np.int64)
    return out | {"why": why}


def _along(asked: _Asked) -> Fields:
    if asked.run.token_rows == 0:
        return {"why": dict.fromkeys(along.FIELDS, _NO_ROWS)}
    rows = asked.about_layer("sequence_choices")
    if rows.empty:
        return {"why": dict.fromkeys(along.FIELDS, "no per-token rows of this phase")}
    return along.fields(rows, asked.info.experts)


def _before(asked: _Asked) -> Fields:
    previous = previous_layer(asked.run, asked.info)
    if previous is None or asked.run.token_rows == 0:
        return {}
    rows = asked.about_layer("sequence_choices")
    of_previous = _Asked(asked.trace, asked.run, previous, asked.phase)
    return along.before(rows, of_previous.about_layer("sequence_choices"), previous.experts)


def _finite(rows: pd.DataFrame) -> tuple[pd.DataFrame, NDArray[np.float64]]:
    """The tokens with logits, and these; -inf masks an expert out, NaN and +inf mean nothing."""
    with_logits = rows[rows["logits"].notna()]
    logits_TV = np.stack(with_logits["logits"].to_list()).astype(float)
    usable_T = ~np.isnan(logits_TV).any(1) & np.isfinite(logits_TV.max(1))
    return with_logits[usable_T], logits_TV[usable_T]


def _marked(
    ids: pd.Series[Any], outputs: int, weights: pd.Series[Any] | None = None
) -> NDArray[np.float64]:
    """`[T, V]`: 1, or the weight, where an output was chosen."""
    out_TV = np.zeros((len(ids), outputs))
    at = np.repeat(np.arange(len(ids)), [len(x) for x in ids])
    flat = 1.0 if weights is None else np.concatenate([*weights, []])
    np.add.at(out_TV, (at, np.concatenate([*ids, []]).astype(np.int64)), flat)
    return out_TV


def _dropped(rows: pd.DataFrame, outputs: int) -> NDArray[np.bool_]:
    lost = rows[rows["dropped"].notna()]
    out_TV = np.zeros((len(rows), outputs), bool)
    places = np.flatnonzero(rows["dropped"].notna())
    for at, ids, slots in zip(places, lost["expert_ids"], lost["dropped"], strict=True):
        out_TV[at, np.asarray(ids)[np.asarray(slots, np.int64)]] = True
    return out_TV


def _row(rows: pd.DataFrame) -> dict[str, float | None] | None:
    return None if rows.empty else _numbers(rows.to_dict("records")[0])


def _numbers(row: dict[Any, Any]) -> dict[str, float | None]:
    """The numbers of a row; null as None."""
    return {
        str(k): None if v is None or v != v else float(v)
        for k, v in row.items()
        if not isinstance(v, str)
    }


_READERS: list[tuple[Collection[str], Callable[[_Asked], Fields]]] = [
    (("layer_balance", "tokens"), _balance),
    (("counts_E", "prob_V", "gate_E"), _loads),
    (("counts_HE",), _halves),
    (("router_confidence",), _confidence),
    (("dropped_tokens",), _drops),
    (
        ("counts_FE", "computed_FE", "overflowed_FE", "prob_FV", "tokens_F", "step_F", "rank_F",
         "capacity_F"),
        _forwards,
    ),
    (("sweep",), _sweep),
    (("drops_by_position",), _positions),
    (("chosen_TV", "weight_TV", "dropped_TV", "sequence_T", "logits_TV", "prob_TV"), _rows),
    (along.FIELDS, _along),
    (("before_NK",), _before),
]  # fmt: skip
"""Which fields each question fills in."""

_OF_TOKENS_CHOICES = (_loads, _halves, _forwards, _sweep, _along, _before)
"""What has no meaning where experts choose their tokens."""
