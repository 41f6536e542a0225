"""The adapters that come with moe_lens, one family a file."""

from __future__ import annotations

from importlib.metadata import entry_points

from moe_lens_hooks.adapter import Adapter
from moe_lens_hooks.adapters.capacity_slots import CapacitySlots
from moe_lens_hooks.adapters.fused_experts import FusedExperts
from moe_lens_hooks.adapters.switch import Switch


def all_adapters() -> list[Adapter]:
    """Ours and those that installed packages registered, in the order they are asked."""
    theirs = [point.load()() for point in entry_points(group="moe_lens.adapters")]
    return [*theirs, Switch(), CapacitySlots(), FusedExperts()]
