"""Steering: a model made to route as recorded, or as told."""

from moe_lens_hooks.steering.force import force_routing
from moe_lens_hooks.steering.forced import Forced

__all__ = ["Forced", "force_routing"]
