"""`check`: what the alarms of `moe_lens.metrics.alarms` say of a run, phase by phase.

The run's steps are cut into blocks, each of which has to be independent of the others while nothing
changes. In decoding, forwards of the same sequences follow each other: a block begins there with a
prefill, and a run that has none cannot be judged for changes.

Legend: C blocks, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.errors import QueryError
from moe_lens.lacking import not_there
from moe_lens.metrics.alarms import ALARMS, BLOCKS, Verdict
from moe_lens.metrics.alarms import check as judge
from moe_lens.metrics.catalogue import Metric, metrics
from moe_lens.metrics.chance import Chance
from moe_lens.metrics.watched import Watched
from moe_lens.queries.evidence import Evidences
from moe_lens.queries.session import Trace, one_run

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from moe_lens.queries.info import RunInfo
    from moe_lens.trace.meta import LayerInfo

_COARSE = 64
"""Steps of a bucket from which long runs are summed from their rollup."""


@dataclass(frozen=True)
class Checked:
    """What the alarms say of one phase.

    Attributes:
        phase: Its name.
        blocks: Blocks of steps that were compared.
        verdicts: Of each alarm, in the order of `ALARMS`.
    """

    phase: str
    blocks: int
    verdicts: list[Verdict]

    @property
    def fired(self) -> int:
        """How many times an alarm fired in a layer, or for an expert."""
        return sum(len(v.fired) for v in self.verdicts)


def check(
    trace: Trace,
    *,
    phase: str | None = None,
    layers: Collection[int] | None = None,
    only: Collection[str] | None = None,
    against: Trace | None = None,
) -> list[Checked]:
    """Look at a run for what is wrong enough that somebody should look.

    Args:
        trace: One run.
        phase: Only this one; None: each, apart.
        layers: Only these; None: all.
        only: Only these alarms.
        against: Another run of the same layers and experts: changes are then between the two runs,
            not inside the one, and phases those that both have.

    Raises:
        QueryError: No such phase, layer or alarm, or the other run has other layers.
    """
    run = one_run(trace)
    _known("alarm", only or (), list(ALARMS))
    _known("phase", [phase] if phase is not None else [], run.phases)
    _known("layer", layers or (), sorted(x.layer for x in run.layers))
    infos = [x for x in run.layers if layers is None or x.layer in layers]
    phases = [phase] if phase is not None else run.phases
    other = None if against is None else one_run(against)
    if other is not None:
        _comparable(run, other, infos)
        phases = [each for each in phases if each in other.phases]
        if not phases:
            raise QueryError(
                f"{other.run} has phases {', '.join(other.phases) or 'none'}, {run.run} has "
                f"{phase or ', '.join(run.phases) or 'none'}: compare runs that have one in common."
            )
    found = []
    for each in phases:
        watched = read(trace, run, each, infos)
        if against is not None and other is not None:
            behind = {x.layer: x for x in read(against, other, each, infos)}
            watched = [replace(x, against=behind[x.layer]) for x in watched if x.layer in behind]
        blocks = max((x.blocks for x in watched), default=0)
        verdicts = [_because(run, verdict) for verdict in judge(watched, only)]
        found.append(Checked(each, blocks, verdicts))
    return found


def _because(run: RunInfo, verdict: Verdict) -> Verdict:
    """With the reasons for which an imported trace lacks something."""
    if not run.imported:
        return verdict
    lacks: dict[str, tuple[int, ...]] = {}
    for reason, layers in verdict.lacks.items():
        text = f"no drops: {not_there(run, 'drops')}" if verdict.alarm == "drops" else reason
        if verdict.alarm in ("z_loss", "entropy"):
            text = f"{reason}: {not_there(run, 'entropy')}"
        lacks[text] = (*lacks.get(text, ()), *layers)
    return replace(verdict, lacks=lacks)


def read(trace: Trace, run: RunInfo, phase: str, infos: Iterable[LayerInfo]) -> list[Watched]:
    """The layers of a phase as alarms see them; those without a choice in it are left out."""
    every = _every(run)
    asked: dict[str, Any] = {"phase": phase, "every": every}
    loads = trace.query("loads_over_time", **asked).df()
    routers = trace.query("router_over_time", **asked).df()
    balance = trace.query("layer_balance", phase=phase).rows()
    tokens_of = {row["layer"]: row["tokens"] for row in balance}
    step_B = np.unique(loads["step"].to_numpy(np.int64))
    first_C = _begins(trace, run, phase, step_B, every)
    drops = _drops(trace, run, phase, infos)
    watched = []
    for info in infos:
        mine = loads[loads["layer"] == info.layer]
        if mine.empty:
            continue
        counts_CE = np.zeros((len(first_C), info.experts), np.int64)
        at = _block(mine, first_C)
        np.add.at(counts_CE, (at, mine["expert"].to_numpy(np.int64)), mine["routed"].to_numpy())
        routed, tokens = counts_CE.sum(), tokens_of[info.layer]
        router = routers[routers["layer"] == info.layer]
        dropped, by_chance = drops.get(info.layer, (None, None))
        watched.append(
            Watched(
                layer=info.layer,
                top_k=float(routed / tokens) if tokens else float(info.top_k or 1),
                counts_CE=counts_CE,
                z_loss_C=_means(router, "zloss", first_C),
                entropy_C=_means(router, "entropy", first_C),
                dropped=dropped,
                dropped_by_chance=by_chance,
                experts_choose=info.router == "expert-choice",
                steps_C=tuple(f"step {step}" for step in first_C),
                unit="batches, each from its prefill on"
                if phase == "decode"
                else "blocks of steps",
            )
        )
    return watched


def _every(run: RunInfo) -> int:
    """Steps of a bucket: `BLOCKS` of them at most, of long runs what the rollup has."""
    steps = (run.last_step or 0) - (run.first_step or 0) + 2
    every = -(-steps // (BLOCKS - 1))
    return every if every < _COARSE else -(-every // _COARSE) * _COARSE


def _begins(
    trace: Trace, run: RunInfo, phase: str, step_B: NDArray[np.int64], every: int
) -> NDArray[np.int64]:
    """`[C]`: the first step of each block, of the buckets that there are."""
    if phase != "decode" or not len(step_B):
        return step_B
    if "prefill" not in run.phases:
        return step_B[:1]
    begun = trace.query("forwards_over_time", phase="prefill", every=every).df()["step"]
    begins_B = np.isin(step_B, begun.to_numpy(np.int64))
    begins_B[0] = True
    return np.asarray(step_B[begins_B])


def _block(rows: pd.DataFrame, first_C: NDArray[np.int64]) -> NDArray[np.int64]:
    steps = rows["step"].to_numpy(np.int64)
    return np.asarray(np.maximum(np.searchsorted(first_C, steps, side="right") - 1, 0))


def _means(rows: pd.DataFrame, name: str, first_C: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """A mean over the tokens of each block; NaN where there is none, None where there never is."""
    known = rows[rows[name].notna()]
    if known.empty:
        return None
    tokens = known["tokens"].to_numpy(float)
    at, C = _block(known, first_C), len(first_C)
    weight_C = np.bincount(at, tokens, C)
    sum_C = np.bincount(at, tokens * known[name].to_numpy(float), C)
    return np.asarray(np.divide(sum_C, weight_C, out=np.full(C, np.nan), where=weight_C > 0))


def _drops(
    trace: Trace, run: RunInfo, phase: str, infos: Iterable[LayerInfo]
) -> dict[int, tuple[float, Chance | None]]:
    """Of layers with a capacity: the share of choices dropped, and that of a uniform router."""
    limited = [x for x in infos if x.capacity_policy is not None]
    rate: Metric = metrics()["dropped_rate"]
    known = Evidences(trace, run, phase, [rate], [x.layer for x in limited])
    found = {}
    for info in limited:
        evidence = known.of(info)
        if evidence.dropped_tokens is not None:
            value = rate.value(evidence)
            if not np.isnan(value):
                found[info.layer] = (value, rate.by_chance(evidence))
    return found


def _known(what: str, names: Iterable[Any], known: list[Any]) -> None:
    for name in names:
        if name not in known:
            raise QueryError(
                f"There is no {what} {name!r}; there are {', '.join(map(str, known)) or 'none'}."
            )


def _comparable(run: RunInfo, other: RunInfo, infos: list[LayerInfo]) -> None:
    theirs = {x.layer: x for x in other.layers}
    for info in infos:
        match = theirs.get(info.layer)
        if match is None or match.experts != info.experts:
            has = "no such layer" if match is None else f"{match.experts} experts there"
            raise QueryError(
                f"layer {info.layer} has {info.experts} experts in {run.run}; {other.run} has "
                f"{has}. Compare runs of one architecture, or name --layers that both have."
            )
