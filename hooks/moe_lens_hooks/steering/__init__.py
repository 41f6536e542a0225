"""Steering: a model made to route as recorded, or as told."""

from moe_lens_hooks.steering.change import Base, Change
from moe_lens_hooks.steering.force import force_routing
from moe_lens_hooks.steering.forced import Forced
from moe_lens_hooks.steering.interventions import Intervention, Interventions, intervene

__all__ = [
    "Base",
    "Change",
    "Forced",
    "Intervention",
    "Interventions",
    "force_routing",
    "intervene",
]
