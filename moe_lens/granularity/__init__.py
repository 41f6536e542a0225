"""The granularity laboratory: what does it cost to use fewer experts a token?

Boix-Adsera and Rigollet 2025, The power of fine-grained experts (arXiv 2505.06839): a layer that
uses k of its m experts a token cannot be imitated by one that uses fewer, however wide its experts
are and however many there are. Granularity here is k.

    from moe_lens import granularity

    plan = granularity.plan("quick", hidden=16, teacher=(8, 4), students=[(8, 4), (4, 2)])
    rows = list(granularity.executed(plan.runs, plan.recipe))
    pd.DataFrame(granularity.gap(plan, rows))

Names load what they need (torch) when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_lens.granularity.findings import gap, sweeps
    from moe_lens.granularity.presets import Plan, plan
    from moe_lens.granularity.recorder import record_routing
    from moe_lens.granularity.regions import pictures, realised_sets, region_counts
    from moe_lens.granularity.runs import Row, Run
    from moe_lens.granularity.shapes import Shape
    from moe_lens.granularity.side_by_side import executed
    from moe_lens.granularity.train import Recipe

__all__ = [
    "Plan",
    "Recipe",
    "Row",
    "Run",
    "Shape",
    "executed",
    "gap",
    "pictures",
    "plan",
    "realised_sets",
    "record_routing",
    "region_counts",
    "sweeps",
]

_HOMES = {
    "Plan": "presets",
    "Recipe": "train",
    "Row": "runs",
    "Run": "runs",
    "Shape": "shapes",
    "executed": "side_by_side",
    "gap": "findings",
    "pictures": "regions",
    "plan": "presets",
    "realised_sets": "regions",
    "record_routing": "recorder",
    "region_counts": "regions",
    "sweeps": "findings",
}


def __getattr__(name: str) -> object:
    """Load a public name from its home (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
