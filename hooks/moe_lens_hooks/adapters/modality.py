"""Ernie 4.5 VL: text and vision tokens have routers and experts of their own.

    y_BSD = block(x_BSD, moe_mm_token_type_ids_BS)       0 is text, anything else is vision
        y[text] = text_moe(x[text]),  y[vision] = vision_moe(x[vision])

Each of the two is an ordinary block of fused experts that is given some of the tokens, one after
another; which ones, only the block above them is told. Without a vision token `text_moe` gets
everything as it is.

Legend: B sequences, S positions, T tokens, D hidden.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from moe_lens_hooks.adapter import MoELayer, Observed, Tap
from moe_lens_hooks.adapters.fused_experts import FusedExperts

_KIND = "moe_mm_token_type_ids"


class Modality:
    """Blocks `text_moe` and `vision_moe` in a module that is told the kind of each token."""

    name = "modality"

    def __init__(self) -> None:
        self._parents: WeakKeyDictionary[nn.Module, tuple[nn.Module, bool]] = WeakKeyDictionary()
        """Of the blocks that were met: what they stand in, and whether they are for vision."""

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        text, vision = getattr(module, "text_moe", None), getattr(module, "vision_moe", None)
        if isinstance(text, nn.Module) and isinstance(vision, nn.Module):
            # A model names a module before what is in it.
            self._parents[text], self._parents[vision] = (module, False), (module, True)
            return None
        if module not in self._parents:
            return None
        parent, is_vision = self._parents[module]
        layer = FusedExperts().layer(path, module)
        if layer is None:
            return None
        names = list(inspect.signature(type(parent).forward).parameters)[1:]

        def read_parent(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
        ) -> None:
            kinds_BS = (dict(zip(names, args, strict=False)) | kwargs).get(_KIND)
            # The block, too, splits the tokens only where there is vision, and looks on the host.
            if isinstance(kinds_BS, Tensor) and kinds_BS.any():
                vision_T = kinds_BS.bool().reshape(-1)
                seen.token_T = (vision_T == is_vision).nonzero().squeeze(-1)

        def read_rows(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
        ) -> None:
            ids_TK = seen.expert_ids_TK
            if seen.token_T is not None and ids_TK is not None and len(ids_TK) != len(seen.token_T):
                seen.problems["tokens routed, not as many as are of this kind"] = len(ids_TK)
                seen.token_T = None

        taps = [
            Tap(parent, "input", read_parent),
            *layer.taps,
            Tap(module, "output", read_rows),
        ]
        info = replace(layer.info, adapter=self.name)
        return MoELayer(module, info, taps, layer.router)
