"""What the HTML report shows: figures by section, each with the question behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from moe_lens.figures.all_to_all import all_to_all
from moe_lens.figures.blank import because
from moe_lens.figures.capacity_curve import capacity_curve
from moe_lens.figures.drops_by_layer import drops_by_layer
from moe_lens.figures.drops_by_tag import drops_by_tag
from moe_lens.figures.drops_over_time import drops_over_time
from moe_lens.figures.entropy_by_layer import entropy_by_layer
from moe_lens.figures.forwards_over_time import forwards_over_time
from moe_lens.figures.hottest import hottest
from moe_lens.figures.load_heatmap import load_heatmap
from moe_lens.figures.load_over_time import load_over_time
from moe_lens.figures.loss_by_tag import loss_by_tag
from moe_lens.figures.near_ties import near_ties
from moe_lens.figures.quality_by_tag import quality_by_tag
from moe_lens.figures.quality_of_dropped import quality_of_dropped
from moe_lens.figures.repetition import repetition
from moe_lens.figures.replay_layers import replay_layers
from moe_lens.figures.router_over_time import router_over_time
from moe_lens.figures.unserved_by_position import unserved_by_position
from moe_lens.queries.catalog import question
from moe_lens.queries.imported import no_drops

if TYPE_CHECKING:
    import pandas as pd

    from moe_lens.queries.info import RunInfo
    from moe_lens.queries.session import Trace


@dataclass(frozen=True)
class Shown:
    """A figure of the report."""

    name: str
    question: str
    draw: Callable[[pd.DataFrame], go.Figure]
    wide: bool = False
    over_time: bool = False
    needs_rows: bool = False
    """Left out where the answer is empty, instead of saying so."""
    of_drops: bool = False
    """Left out where it is not known what was dropped; the facts say so."""


@dataclass
class Drawn:
    """A figure, and what was asked for it."""

    shown: Shown
    figure: go.Figure
    sql: str
    parameters: dict[str, Any] = field(default_factory=dict)
    """Those that differ from the question's defaults."""


SECTIONS: dict[str, tuple[Shown, ...]] = {
    "Load": (
        Shown("load_heatmap", "load_map", load_heatmap, wide=True),
        Shown("load_over_time", "load_over_time", load_over_time, over_time=True),
        Shown("hottest", "hottest_experts", hottest),
    ),
    "Capacity": (
        Shown("drops_by_layer", "dropped_tokens", drops_by_layer, of_drops=True),
        Shown("drops_by_tag", "dropped_tokens", drops_by_tag, of_drops=True),
        Shown("drops_over_time", "load_over_time", drops_over_time, over_time=True, of_drops=True),
        Shown("capacity_curve", "capacity_sweep", capacity_curve),
        Shown("unserved_by_position", "unserved_by_position", unserved_by_position, of_drops=True),
    ),
    "Router": (
        Shown("router_over_time", "router_over_time", router_over_time, over_time=True),
        Shown("entropy_by_layer", "router_confidence", entropy_by_layer),
        Shown("near_ties", "near_ties", near_ties),
        Shown("repetition", "repetition", repetition),
    ),
    "Quality": (
        Shown("loss_by_tag", "loss_by_tag", loss_by_tag),
        Shown("quality_by_tag", "quality_by_tag", quality_by_tag),
        Shown("quality_of_dropped", "quality_of_dropped", quality_of_dropped, of_drops=True),
    ),
    "Speed": (
        Shown("forwards_over_time", "forwards_over_time", forwards_over_time, over_time=True),
        Shown("all_to_all", "all_to_all", all_to_all, over_time=True),
        Shown("replay_layers", "replay_layers", replay_layers, needs_rows=True),
    ),
}


def draw(trace: Trace, info: RunInfo, phase: str | None) -> dict[str, list[Drawn]]:
    """Ask and draw everything, of one run.

    Args:
        trace: An open trace.
        info: Which run of it.
        phase: Count this phase only.
    """
    every = info.every()
    asked: dict[tuple[str, int], pd.DataFrame] = {}
    out: dict[str, list[Drawn]] = {}
    for section, figures in SECTIONS.items():
        for shown in figures:
            if shown.of_drops and not info.knows_drops:
                continue
            steps = every if shown.over_time else 1
            key = shown.question, steps
            parameters = {"every": steps} if steps > 1 else {}
            if phase is not None:
                parameters["phase"] = phase  # type: ignore[assignment]
            if key not in asked:
                asked[key] = trace.query(shown.question, **parameters).df()
            table = asked[key][asked[key]["run"] == info.run]
            if shown.needs_rows and table.empty:
                continue
            figure = because(shown.draw(no_drops(table, info)), info)
            sql = question(shown.question).sql
            out.setdefault(section, []).append(Drawn(shown, figure, sql, parameters))
    return out
