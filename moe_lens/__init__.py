"""moe_lens: see and query the routing of Mixture-of-Experts models.

The front door. Names load what they need when they are first used, so that `import moe_lens` costs
nothing and works where torch, duckdb or streamlit are missing.

    with moe_lens.record(model, "traces/run1") as rec: ...
    trace = moe_lens.open("traces/run1")
    trace.query("expert_load").df()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from moe_lens.errors import (
    CaptureBreach,
    CommandError,
    MoeLensError,
    NoMoELayers,
    QueryError,
    SteeringError,
    TraceError,
    TraceLocked,
    TraceWriteError,
    UnsupportedRouter,
)

if TYPE_CHECKING:
    from moe_lens.importers.live import LiveTrace
    from moe_lens.queries.diff import Difference, diff
    from moe_lens.queries.session import Trace
    from moe_lens.queries.session import open_trace as open
    from moe_lens.trace.counterfactual import Counterfactual
    from moe_lens.trace.precision import Precision
    from moe_lens.trace.recover import recover
    from moe_lens_hooks import Recorder, every, record
    from moe_lens_hooks.serve import serve
    from moe_lens_hooks.steering import Forced, Interventions, force_routing, intervene
    from moe_lens_hooks.steering.counterfactual import counterfactual
    from moe_lens_hooks.steering.precision import precision

    __version__: str

__all__ = [
    "CaptureBreach",
    "CommandError",
    "Counterfactual",
    "Difference",
    "Forced",
    "Interventions",
    "LiveTrace",
    "MoeLensError",
    "NoMoELayers",
    "Precision",
    "QueryError",
    "Recorder",
    "SteeringError",
    "Trace",
    "TraceError",
    "TraceLocked",
    "TraceWriteError",
    "UnsupportedRouter",
    "__version__",
    "counterfactual",
    "diff",
    "every",
    "force_routing",
    "intervene",
    "open",
    "precision",
    "record",
    "recover",
    "serve",
]

_HOMES = {
    "Counterfactual": ("moe_lens.trace.counterfactual", "Counterfactual"),
    "Difference": ("moe_lens.queries.diff", "Difference"),
    "Forced": ("moe_lens_hooks.steering", "Forced"),
    "Interventions": ("moe_lens_hooks.steering", "Interventions"),
    "LiveTrace": ("moe_lens.importers.live", "LiveTrace"),
    "Precision": ("moe_lens.trace.precision", "Precision"),
    "Recorder": ("moe_lens_hooks", "Recorder"),
    "Trace": ("moe_lens.queries.session", "Trace"),
    "counterfactual": ("moe_lens_hooks.steering.counterfactual", "counterfactual"),
    "diff": ("moe_lens.queries.diff", "diff"),
    "every": ("moe_lens_hooks", "every"),
    "force_routing": ("moe_lens_hooks.steering", "force_routing"),
    "intervene": ("moe_lens_hooks.steering", "intervene"),
    "open": ("moe_lens.queries.session", "open_trace"),
    "precision": ("moe_lens_hooks.steering.precision", "precision"),
    "record": ("moe_lens_hooks", "record"),
    "recover": ("moe_lens.trace.recover", "recover"),
    "serve": ("moe_lens_hooks.serve", "serve"),
}


def __getattr__(name: str) -> object:
    """Load a public name from its home (PEP 562)."""
    if name == "__version__":
        value: object = _version()
    elif name in _HOMES:
        module, attribute = _HOMES[name]
        value = getattr(import_module(module), attribute)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("moe-lens")
    except PackageNotFoundError:
        return "not installed"
