"""Capture: hooks that see each routing decision of a model, and the recorder that keeps them."""

from moe_lens_hooks.adapter import Adapter, MoELayer, Observed, Tap
from moe_lens_hooks.recorder import Recorder, record
from moe_lens_hooks.sampling import Sampling, every
from moe_lens_hooks.weights import expert_cosines, router_rows, selection_biases

__all__ = [
    "Adapter",
    "MoELayer",
    "Observed",
    "Recorder",
    "Sampling",
    "Tap",
    "every",
    "expert_cosines",
    "record",
    "router_rows",
    "selection_biases",
]
