"""What a page shows of one run, asked once of the trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_lens.queries.info import RunInfo, phase_order
from moe_lens.queries.tells_tags import TellsTags, tells_tags

if TYPE_CHECKING:
    from moe_lens.queries.session import Trace

Rows = list[dict[str, Any]]

HOTTEST = 5


@dataclass
class Answers:
    """Rows of stored questions, of one run and one choice of phase."""

    info: RunInfo
    phase: str | None
    load: Rows
    balance: Rows
    confidence: Rows
    """All tags together."""
    confidence_by_tag: Rows
    drops: dict[str, Rows]
    """By phase, all tags together."""
    drops_by_tag: Rows
    """All phases of the choice together."""
    hottest: Rows
    losses: Rows
    health: Rows
    replayed: Rows
    """Empty where the run was not replayed."""
    hottest_by: str = field(default="lift")
    tells_tags: TellsTags | None = None
    """Null with fewer than two tags, without rows of single tokens, and beside other runs."""

    @property
    def phases(self) -> list[str]:
        return [self.phase] if self.phase else self.info.phases

    @property
    def tags(self) -> list[str]:
        return list(dict.fromkeys(row["tag"] for row in self.losses))


def gather(trace: Trace, phase: str | None = None) -> list[Answers]:
    """Ask all questions of a page; one `Answers` a run."""
    infos = trace.info().runs
    phases = [phase] if phase else sorted({p for i in infos for p in i.phases}, key=phase_order)
    load = trace.query("load_map", phase=phase).rows()
    balance = trace.query("layer_balance", phase=phase).rows()
    confidence = trace.query("router_confidence", phase=phase, by_tag=False).rows()
    confidence_by_tag = trace.query("router_confidence", phase=phase).rows()
    drops_by_tag = trace.query("dropped_tokens", phase=phase).rows()
    losses = trace.query("loss_by_tag", phase=phase).rows()
    health = trace.query("capture_health", phase=phase).rows()
    replayed = trace.query("replay_layers", phase=phase).rows()
    drops = {p: trace.query("dropped_tokens", phase=p, by_tag=False).rows() for p in phases}
    # A lift compares tags: with one there is nothing to compare, and the share is what there is.
    tags = {i.run: {row["tag"] for row in of(losses, i.run)} for i in infos}
    by = {run: "lift" if len(found) > 1 else "share" for run, found in tags.items()}
    hottest = {
        ranking: trace.query("hottest_experts", phase=phase, by=ranking, top=HOTTEST).rows()
        for ranking in set(by.values())
    }
    return [
        Answers(
            info=info,
            phase=phase,
            load=of(load, info.run),
            balance=of(balance, info.run),
            confidence=of(confidence, info.run),
            confidence_by_tag=of(confidence_by_tag, info.run),
            drops={p: of(rows, info.run) for p, rows in drops.items() if of(rows, info.run)},
            drops_by_tag=of(drops_by_tag, info.run),
            hottest=of(hottest[by[info.run]], info.run),
            losses=of(losses, info.run),
            health=of(health, info.run),
            replayed=of(replayed, info.run),
            hottest_by=by[info.run],
            tells_tags=tells_tags(trace, info, phase) if len(infos) == 1 else None,
        )
        for info in infos
    ]


def of(rows: Rows, run: str) -> Rows:
    """The rows of one run."""
    return [row for row in rows if row["run"] == run]


def total(rows: Rows, column: str) -> int:
    """Sum of a count over rows."""
    return sum(row[column] or 0 for row in rows)
