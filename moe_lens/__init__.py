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
    from moe_lens.queries.diff import Difference, diff
    from moe_lens.queries.session import Trace
    from moe_lens.queries.session import open_trace as open
    from moe_lens.trace.recover import recover
    from moe_lens_hooks import Recorder, every, record
    from moe_lens_hooks.steering import Forced, force_routing

    __version__: str

__all__ = [
    "CaptureBreach",
    "CommandError",
    "Difference",
    "Forced",
    "MoeLensError",
    "NoMoELayers",
    "QueryError",
    "Recorder",
    "SteeringError",
    "Trace",
    "TraceError",
    "TraceLocked",
    "TraceWriteError",
    "UnsupportedRouter",
    "__version__",
    "diff",
    "every",
    "force_routing",
    "open",
    "record",
    "recover",
]

_HOMES = {
    "Difference": ("moe_lens.queries.diff", "Difference"),
    "Forced": ("moe_lens_hooks.steering", "Forced"),
    "Recorder": ("moe_lens_hooks", "Recorder"),
    "Trace": ("moe_lens.queries.session", "Trace"),
    "diff": ("moe_lens.queries.diff", "diff"),
    "every": ("moe_lens_hooks", "every"),
    "force_routing": ("moe_lens_hooks.steering", "force_routing"),
    "open": ("moe_lens.queries.session", "open_trace"),
    "record": ("moe_lens_hooks", "record"),
    "recover": ("moe_lens.trace.recover", "recover"),
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
