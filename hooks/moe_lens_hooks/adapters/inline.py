"""The style of transformers 4, which remote code still has: top-k inside the block's own forward.

    self.gate = nn.Linear(D, E)               or a router module
    self.experts = nn.ModuleList([...])       looped over

No module is handed ids and weights, so they are looked for inside the block while it runs, and
proved on its first forward (`moe_lens_hooks.inside`).
"""

from __future__ import annotations

from torch import nn

from moe_lens_hooks.adapter import MoELayer
from moe_lens_hooks.inside.layer import watched_layer
from moe_lens_hooks.inside.looks import bank_of_list, gate_for

_GATES = ("gate", "router")


class Inline:
    """Block with a child `gate` or `router`, and one module for each expert in a list `experts`."""

    name = "inline"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        bank = bank_of_list(getattr(module, "experts", None))
        if bank is None:
            return None
        named = [getattr(module, name, None) for name in _GATES]
        gate = next((g for g in named if isinstance(g, nn.Module)), None)
        if gate is None or gate_for(gate, bank.count) is None:
            return None
        return watched_layer(path, module, bank, gate, self.name)
