"""`tells_tags`: the layer whose experts say most about a token's tag, beside what chance gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_lens.metrics.catalogue import Measured, measure, metrics
from moe_lens.metrics.specialisation import domain_information
from moe_lens.queries import along
from moe_lens.queries.evidence import Evidences

if TYPE_CHECKING:
    from moe_lens.queries.info import RunInfo
    from moe_lens.queries.session import Trace

_ORDER = ("eval", "decode", "prefill", "train")
"""Which phase is looked at where nobody says: of a model that stands still, if there is one."""


@dataclass(frozen=True)
class TellsTags:
    """What was found of one layer.

    Attributes:
        phase: Which phase was looked at.
        layer: The one whose choices, of every token, carry most of the tag.
        layers: How many it was chosen from.
        found: `domain_information` there, of kept tokens.
        tokens: How many these are.
    """

    phase: str
    layer: int
    layers: int
    found: Measured
    tokens: int


def tells_tags(trace: Trace, run: RunInfo, phase: str | None = None) -> TellsTags | None:
    """Look for it; None with fewer than two tags, or without rows of single tokens.

    Args:
        trace: One run.
        run: What is known of it.
        phase: Only this one; None: one of them, `eval` if there is one.
    """
    if run.token_rows == 0:
        return None
    names = (
        [phase] if phase is not None else sorted(run.phases, key=lambda p: (*_ORDER, p).index(p))
    )
    asked = metrics()["domain_information"]
    for name in names:
        counts = trace.query("tag_load", phase=name).df()
        said = {}
        for info in run.layers:
            of_layer = along.by_tag(counts[counts["layer"] == info.layer], info.experts)
            if of_layer and info.router != "expert-choice":
                said[info.layer] = float(domain_information(of_layer["counts_GE"]))
        if not said:
            continue
        layer = max(said, key=said.__getitem__)
        (info,) = (x for x in run.layers if x.layer == layer)
        known = Evidences(trace, run, name, [asked], [layer]).of(info)
        found = measure(asked, known)
        if not found.lacks and known.ids_NK is not None:
            return TellsTags(name, layer, len(said), found, len(known.ids_NK))
    return None
