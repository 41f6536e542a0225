"""Where the weights of a layer's experts lie: stacked in parameters, or one module each.

What `weights` reads and compares, and by which layers that run the same experts are known: two
experts are the same where their weights lie in the same memory.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from moe_lens_hooks.adapter import MoELayer
from moe_lens_hooks.inside.looks import bank_of_list


def stacked(layer: MoELayer) -> list[nn.Parameter]:
    """Parameters `[E, ., .]`; or `[E F, .]` (dbrx), inside of `experts`; empty: there are none."""
    E = layer.info.experts
    of_router = {id(p) for p in layer.router.parameters()} if layer.router is not None else set()
    own = [p for p in layer.block.parameters() if id(p) not in of_router and _is_float(p)]
    found = [p for p in own if p.ndim == 3 and p.shape[0] == E]
    experts = getattr(layer.block, "experts", None)
    if not found and isinstance(experts, nn.Module) and bank_of_list(experts) is None:
        inside = (p for p in experts.parameters() if _is_float(p))
        found = [p for p in inside if p.ndim == 2 and p.shape[0] % E == 0 and p.shape[0] > E]
    return found


def members(layer: MoELayer) -> list[nn.Module]:
    """One module an expert, by expert id; empty: the block has no such list."""
    E = layer.info.experts
    for child in layer.block.modules():
        bank = bank_of_list(child)
        if bank is not None and len(bank.members) - bank.zero == E:
            return bank.members[:E]
    return []


def places(layers: Sequence[MoELayer]) -> dict[nn.Module, list[Hashable]]:
    """For each block, where the weights of each of its experts lie; equal: the same weights.

    To be asked of all layers at one moment: memory is used again. A block whose experts cannot be
    told apart has places of its own.
    """
    return {layer.block: _places(layer) for layer in layers}


def _places(layer: MoELayer) -> list[Hashable]:
    E = layer.info.experts
    stacks = stacked(layer)
    if stacks:
        return [tuple(_place(p, e, E) for p in stacks) for e in range(E)]
    each = [[_place(p, 0, 1) for p in m.parameters() if p.numel()] for m in members(layer)]
    if each and all(each):
        return [tuple(x) for x in each]
    return [(id(layer.block), e) for e in range(E)]


def _place(p: Tensor, e: int, of: int) -> Hashable:
    """Where part `e` of the first dimension begins; or the object and `e`, if that is not known."""
    plain = type(p) in (Tensor, nn.Parameter) and p.device.type != "meta" and not is_lazy(p)
    at = p.data_ptr() if plain else 0  # 0: there is none, as under FSDP between two forwards
    if not at:
        return id(p), e
    return p.device, at + e * (p.shape[0] // of if p.ndim else 1) * _stride(p) * p.element_size()


def _stride(p: Tensor) -> int:
    return p.stride(0) if p.ndim else 1


def _is_float(p: Tensor) -> bool:
    return not is_lazy(p) and p.is_floating_point()
