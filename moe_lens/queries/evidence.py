"""`Evidences`: what a trace knows of the layers of a phase, for the metrics of the catalogue.

Asks stored questions, and only those that the metrics asked for need, of several layers at a time,
since most of what a question costs does not depend on how many. What is not a sum is bounded: 32
forwards (whole steps), and tokens of whole sequences.

Legend: E experts, V outputs of the router, F forwards, T, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.metrics import (
    coactivation,
    configurations,
    locality,
    quality,
    specialisation,
    transitions,
)
from moe_lens.metrics.catalogue import Metric
from moe_lens.metrics.evidence import Evidence
from moe_lens.queries import along
from moe_lens.queries.imported import reasons
from moe_lens.queries.memory import previous_layer
from moe_lens.queries.session import Trace

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from moe_lens.queries.info import RunInfo
    from moe_lens.trace.meta import LayerInfo

FORWARDS = 32
BLOCK = 16
"""Layers that are read at a time."""
TOKENS = 196_608
"""Of all layers together; of one layer at least `FEWEST` and at most `MOST`."""
FEWEST, MOST = 4_096, 16_384

_BY_EXPERTS = "experts choose their tokens here, and are balanced by that"
_UNDEFINED = (
    specialisation.UNDEFINED
    | coactivation.UNDEFINED
    | locality.UNDEFINED
    | configurations.UNDEFINED
    | transitions.UNDEFINED
    | quality.UNDEFINED
)

Fields = dict[str, Any]


@dataclass
class _Asked:
    """The answers of one phase, of a block of layers each; those of the last blocks are kept."""

    trace: Trace
    run: RunInfo
    phase: str
    layers: Sequence[int]
    answers: dict[tuple[str, int, int, str], pd.DataFrame] = field(default_factory=dict)

    def of(self, info: LayerInfo, question: str, **more: object) -> pd.DataFrame:
        """The rows of the layer."""
        first, last = self._block(info.layer)
        key = (question, first, last, repr(sorted(more.items())))
        if key not in self.answers:
            self._forget(first)
            asked = {"phase": self.phase, "first_layer": first, "last_layer": last, **more}
            self.answers[key] = self.trace.query(question, **asked).df()
        found = self.answers[key]
        return found[found["layer"] == info.layer].reset_index(drop=True)

    def tokens(self, info: LayerInfo) -> pd.DataFrame:
        """The tokens of whole sequences, the same in all layers of a stream."""
        most = min(max(TOKENS // max(len(self.layers), 1), FEWEST), MOST)
        return self.of(info, "sequence_choices", most=most)

    def _block(self, layer: int) -> tuple[int, int]:
        """The layers that are asked for together: those around it that follow each other."""
        if layer not in self.layers:
            return layer, layer
        at = self.layers.index(layer)
        first = at - at % BLOCK
        block = self.layers[first : first + BLOCK]
        return block[0], block[-1]

    def _forget(self, first: int) -> None:
        """Answers before the layer that comes before this block."""
        for key in [k for k in self.answers if k[2] < first - 1]:
            del self.answers[key]


def _outputs(info: LayerInfo) -> int:
    return info.experts + info.zero_experts


class Evidences:
    """What these metrics need to know of the layers of a phase.

    Args:
        trace: One run.
        run: What is known of it.
        phase: Which.
        metrics: Those that will be measured.
        layers: Those that will be asked for, one after another; None: all.
    """

    def __init__(
        self,
        trace: Trace,
        run: RunInfo,
        phase: str,
        metrics: Iterable[Metric],
        layers: Collection[int] | None = None,
    ) -> None:
        chosen = [x.layer for x in run.layers if layers is None or x.layer in layers]
        self._asked = _Asked(trace, run, phase, chosen)
        self._reasons = reasons(run)
        self._wanted = {name for each in metrics for name in each.needs}
        if not self._wanted.isdisjoint(along.FIELDS):
            self._wanted.add("tokens")  # of how many those looked at are a share

    def of(self, info: LayerInfo) -> Evidence:
        """Of one layer."""
        fields: Fields = {}
        why: dict[str, str] = {}
        for names, read in _READERS:
            if not self._wanted.isdisjoint(names):
                experts_choose = info.router == "expert-choice" and read in _OF_TOKENS_CHOICES
                found = (
                    {"why": dict.fromkeys(names, _BY_EXPERTS)}
                    if experts_choose
                    else read(self._asked, info)
                )
                why |= found.pop("why", {})
                fields |= found
        why |= {k: v for k, v in self._reasons.items() if why.get(k) != _BY_EXPERTS}
        return Evidence(
            experts=info.experts, outputs=_outputs(info), top_k=info.top_k, why=why, **fields
        )


def evidence(
    trace: Trace, run: RunInfo, info: LayerInfo, phase: str, metrics: Iterable[Metric]
) -> Evidence:
    """What these metrics need to know of one layer in a phase."""
    return Evidences(trace, run, phase, metrics, [info.layer]).of(info)


def _balance(asked: _Asked, info: LayerInfo) -> Fields:
    row = asked.of(info, "layer_balance").to_dict("records")[0]
    answer = _numbers(row)
    needed = answer.get("tokens_needed") or 0
    short = f"too few tokens: with fewer than {needed:,.0f} an expert is missed by chance"
    why = {"dead_experts": short, "dormant_experts": short}
    return {"layer_balance": answer, "tokens": int(row.get("tokens", 0)), "why": why}


def _loads(asked: _Asked, info: LayerInfo) -> Fields:
    rows = asked.of(info, "expert_load")
    counts_E = rows["routed"].to_numpy(np.int64)
    if not counts_E.sum():
        return {"why": {"counts_E": "no choices by valid tokens in this phase"}}
    out: Fields = {"counts_E": counts_E}
    chosen = rows[rows["routed"] > 0]
    if chosen["weight_sum"].notna().all():
        out["gate_E"] = rows["weight_sum"].fillna(0.0).to_numpy(float)
    if info.zero_experts:
        words = "no sums of probabilities of zero-compute experts: expert_load leaves these out"
        return out | {"why": {"prob_V": words}}
    if chosen["prob_sum"].notna().all():
        prob_V = rows["prob_sum"].fillna(0.0).to_numpy(float)
        out["prob_V"] = prob_V / prob_V.sum()
    return out


def _halves(asked: _Asked, info: LayerInfo) -> Fields:
    balance = asked.of(info, "load_over_time", every=asked.run.every())
    steps = np.unique(balance["step"].to_numpy(np.int64))
    if len(steps) < 2:
        return {}
    middle = int(steps[len(steps) // 2])
    first = asked.of(info, "expert_load", last_step=middle - 1)
    second = asked.of(info, "expert_load", first_step=middle)
    return {"counts_HE": np.stack([x["routed"].to_numpy(np.int64) for x in (first, second)])}


def _confidence(asked: _Asked, info: LayerInfo) -> Fields:
    return {"router_confidence": _row(asked.of(info, "router_confidence", by_tag=False))}


def _drops(asked: _Asked, info: LayerInfo) -> Fields:
    if info.capacity_policy is None:
        return {"why": {"dropped_tokens": "no capacity: the layer is dropless"}}
    return {"dropped_tokens": _row(asked.of(info, "dropped_tokens", by_tag=False))}


def _forwards(asked: _Asked, info: LayerInfo) -> Fields:
    rows = asked.of(info, "forward_loads", most=FORWARDS)
    if not rows["routed"].sum():
        return {}
    heads = rows.groupby(["step", "rank", "window"], sort=False)
    at_N = heads.ngroup().to_numpy(np.int64)
    head = heads.first().reset_index()
    E, V = info.experts, _outputs(info)

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


def _sweep(asked: _Asked, info: LayerInfo) -> Fields:
    rows = asked.of(info, "capacity_sweep", lowest=0.5, highest=4.0, points=71)
    if rows.empty:
        return {}
    above = "more than 1 % is dropped at a capacity factor of 4 too"
    curve = rows[["capacity_factor", "dropped_share"]]
    return {"sweep": curve, "why": {"capacity_for_1": above}}


def _tokens(asked: _Asked, info: LayerInfo) -> Fields:
    if asked.run.token_rows == 0:
        return {"why": dict.fromkeys(along.FIELDS, asked.run.no_rows)}
    rows = asked.tokens(info)
    if rows.empty:
        return {"why": dict.fromkeys(along.FIELDS, "no per-token rows of this phase")}
    found = along.fields(rows, info)
    return found | {"why": _UNDEFINED | found["why"]}


def configuration(info: LayerInfo) -> Fields:
    """How the router is configured, as fields of `Evidence`; those that are not known left out."""
    out: Fields = {}
    if info.hidden_size and info.intermediate_size:
        out["widths"] = (info.hidden_size, info.intermediate_size)
    groups, top_groups = info.groups or 1, info.top_groups or info.groups or 1
    if info.zero_experts:
        lacks = "tokens that choose zero-compute experts have sets of other sizes"
    elif info.experts % groups or top_groups > groups:
        lacks = f"{groups} groups of {info.experts} experts, of which a token uses {top_groups}"
    else:
        return out | {"group_limit": (groups, top_groups)}
    return out | {"why": {"group_limit": lacks}}


def _tags(asked: _Asked, info: LayerInfo) -> Fields:
    return {"why": _UNDEFINED, **along.by_tag(asked.of(info, "tag_load"), info.experts)}


def _before(asked: _Asked, info: LayerInfo) -> Fields:
    previous = previous_layer(asked.run, info)
    if previous is None or asked.run.token_rows == 0:
        return {}
    return along.before(asked.tokens(info), asked.tokens(previous), previous.experts)


def _row(rows: pd.DataFrame) -> dict[str, float | None] | None:
    return None if rows.empty else _numbers(rows.to_dict("records")[0])


def _numbers(row: dict[Any, Any]) -> dict[str, float | None]:
    """The numbers of a row; null as None."""
    return {
        str(k): None if v is None or v != v else float(v)
        for k, v in row.items()
        if not isinstance(v, str)
    }


_READERS: list[tuple[Collection[str], Callable[[_Asked, LayerInfo], Fields]]] = [
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
    (along.FIELDS, _tokens),
    (("group_limit", "widths"), lambda asked, info: configuration(info)),
    (("counts_GE", "tokens_G"), _tags),
    (("before_NK",), _before),
]  # fmt: skip
"""Which fields each question fills in."""

_OF_TOKENS_CHOICES = (_loads, _halves, _forwards, _sweep, _tokens, _tags, _before)
"""What has no meaning where experts choose their tokens."""
