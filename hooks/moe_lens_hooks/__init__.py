"""Capture: hooks that see each routing decision of a model, and the recorder that keeps them."""

from moe_lens_hooks.adapter import Adapter, MoELayer, Observed, Tap
from moe_lens_hooks.recorder import Recorder, record
from moe_lens_hooks.sampling import Sampling, every

__all__ = ["Adapter", "MoELayer", "Observed", "Recorder", "Sampling", "Tap", "every", "record"]
