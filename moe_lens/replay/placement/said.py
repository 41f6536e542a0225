"""A study as plain values: what `moe-lens place --json` prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moe_lens.replay.placement.study import Candidate, Study
from moe_lens.replay.placement.what_if import Traffic


def as_dict(study: Study, path: str, bytes_per_s: float) -> dict[str, Any]:
    """Everything that was found.

    Args:
        study: The answer.
        path: Of the plan that was written.
        bytes_per_s: At which a rank fetches experts.
    """
    counts = study.counts
    return {
        "plan": path,
        "layers": list(counts.layers),
        "experts": counts.experts,
        "forwards": len(counts.forwards),
        "recorded_forwards": counts.recorded,
        "uncounted_forwards": counts.uncounted,
        "fitted_to": len(study.fitted_to.forwards),
        "judged_by": len(study.judged_by.forwards),
        "now": _candidate(study.now, bytes_per_s),
        "placements": [_candidate(c, bytes_per_s) for c in study.candidates],
        "made_steps": study.made_steps,
        "verdict": None if study.verdict is None else asdict(study.verdict),
    }


def _candidate(of: Candidate, bytes_per_s: float) -> dict[str, Any]:
    plan = of.placement
    return {
        "method": plan.method,
        "ranks": plan.ranks,
        "nodes": plan.nodes,
        "replicas": plan.slots - plan.experts,
        "balance": {phase: asdict(balance) for phase, balance in of.balance.items()},
        "traffic": None if of.traffic is None else _traffic(of.traffic),
        "bytes_per_rank": of.bytes_per_rank,
        "moved_experts": of.moved,
        "moved_bytes": of.moved_bytes,
        "moving_s": moving_s(of, bytes_per_s),
    }


def _traffic(of: Traffic) -> dict[str, Any]:
    said = asdict(of)
    said["rows_RR"] = of.rows_RR.tolist()
    return said


def moving_s(of: Candidate, bytes_per_s: float) -> float | None:
    """Seconds until the rank that fetches most has its experts; None where sizes are unknown."""
    return None if of.moved_bytes is None else of.moved_bytes / bytes_per_s
