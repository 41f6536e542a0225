"""A block that nobody described: recognised by its looks, believed when it has proved itself.

Asked last, and only of modules that neither hold an MoE layer nor stand in one. See
`moe_lens_hooks.inside` for what is proved, and how.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from moe_lens_hooks.adapter import MoELayer
from moe_lens_hooks.inside.layer import watched_layer
from moe_lens_hooks.inside.looks import look

NAME = "fallback"
_MOE = re.compile(r"(MoE|Moe|MOE|MixtureOfExperts)(Layer|Block|FFN|FeedForward)?$")


def undescribed(
    modules: Iterable[tuple[str, nn.Module]], found: Iterable[MoELayer]
) -> Iterator[MoELayer]:
    """Layers for what looks like an MoE block, innermost first.

    Args:
        modules: Of the model, by path.
        found: The layers that adapters recognised.
    """
    apart = _Apart(x.block for x in found)
    for path, module in reversed(list(modules)):
        if not apart.stands(module):
            continue
        looks = look(module)
        if looks is not None:
            apart.take(module)
            yield watched_layer(path, module, looks.bank, looks.gate, NAME)


def unseen(modules: Iterable[tuple[str, nn.Module]], found: Iterable[MoELayer]) -> list[str]:
    """What to say of modules that are MoE blocks by name, but that nothing recognises."""
    apart = _Apart(x.block for x in found)
    return [
        f"{path} ({type(module).__name__}) is an MoE block by name, but no adapter recognises it: "
        "its routing is not recorded. Write an adapter for it (docs/hooks.md)"
        for path, module in modules
        if _MOE.search(type(module).__name__)
        and apart.stands(module)
        and next(module.parameters(), None) is not None
    ]


class _Apart:
    """Blocks that are taken, and with them what they hold and what holds them."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self._blocks: set[nn.Module] = set()
        self._inside: set[nn.Module] = set()
        for block in blocks:
            self.take(block)

    def take(self, block: nn.Module) -> None:
        self._blocks.add(block)
        self._inside.update(block.modules())

    def stands(self, module: nn.Module) -> bool:
        """It holds no block and stands in none."""
        return module not in self._inside and self._blocks.isdisjoint(module.modules())
