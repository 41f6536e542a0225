"""The weights that a router and its experts multiply with: found by form, or refused by name.

Experts are stacked in parameters `[E, ., .]`, or a list of modules of `nn.Linear`. Which axis of a
stack is the input decides which weights share a scale: the module says so (`is_transposed`, as in
transformers), or the sizes do. Biases and shared experts are left out.

Legend: E experts, D width of what experts are given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moe_lens.errors import UnsupportedRouter
from moe_lens_hooks.adapter import MoELayer
from moe_lens_hooks.expert_weights import members
from moe_lens_hooks.steering.fake_quant import Format

Part = Literal["router", "experts"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DOWN = re.compile(r"(^|[._])(down|w2|wo|fc2|out|output)([._]|$)", re.IGNORECASE)
"""Names of the product that leads back to the model's width."""


@dataclass(frozen=True)
class Weights:
    """One parameter of a router or of experts.

    Attributes:
        parameter: The model's own.
        transposed: Inputs come before outputs.
        expert: Whose it is; None: the router's, or all experts' (three axes).
    """

    parameter: nn.Parameter
    transposed: bool
    expert: int | None = None

    def matrices(self) -> list[tuple[int | None, Tensor]]:
        """(whose, matrix `[outputs, inputs]`), views of the parameter."""
        return self._views(self.parameter.detach())

    def rounded(self, to: Format) -> Tensor:
        """The parameter as the format holds it; a new tensor, laid out alike."""
        new = torch.empty_like(self.parameter.detach())
        for (_, matrix), (_, place) in zip(self.matrices(), self._views(new), strict=True):
            place.copy_(to.rounded(matrix))
        return new

    def _views(self, whole: Tensor) -> list[tuple[int | None, Tensor]]:
        each = [(self.expert, whole)] if whole.ndim == 2 else list(enumerate(whole))
        return [(e, x.T if self.transposed else x) for e, x in each]


def weights_of(layer: MoELayer, part: Part) -> list[Weights]:
    """What this part of a layer multiplies with.

    Raises:
        UnsupportedRouter: It is not to be told for sure, or not plain floats at hand.
    """
    found = [_router(layer)] if part == "router" else _stacked(layer) or _listed(layer)
    if not found:
        raise _unknown(
            layer,
            "its experts are neither stacked in parameters [experts, ., .] nor a list of modules "
            'of nn.Linear. parts=["router"] asks of routers alone',
        )
    inside = {id(p) for p in layer.block.parameters()}
    for weights in found:
        _check(layer, weights.parameter)
        if id(weights.parameter) not in inside:
            raise _unknown(layer, f"its {part} is not in its block")
    return found


def _router(layer: MoELayer) -> Weights:
    """The one matrix with a row, or a column, for each output of the router."""
    info, router = layer.info, layer.router
    modules = [] if router is None else list(router.modules())
    for outputs in dict.fromkeys((info.experts + info.zero_experts, info.experts)):
        found: dict[int, Weights] = {}
        for module in modules:
            linear = isinstance(module, nn.Linear)
            for p in module.parameters(recurse=False):
                if p.ndim != 2 or outputs not in p.shape or min(p.shape) < 2:
                    continue
                if p.shape[0] == p.shape[1] and not linear:
                    raise _unknown(layer, f"the router's {list(p.shape)} may be meant either way")
                if p.shape[0] == outputs:
                    found[id(p)] = Weights(p, transposed=False)
                elif not linear:
                    found[id(p)] = Weights(p, transposed=True)
        if len(found) == 1:
            return next(iter(found.values()))
    raise _unknown(
        layer,
        "no single matrix of its router has a row for each expert. "
        'parts=["experts"] asks of experts alone',
    )


def _stacked(layer: MoELayer) -> list[Weights]:
    """Parameters `[E, ., .]` of the block, the router's left out."""
    of_router = {id(p) for p in layer.router.parameters()} if layer.router is not None else set()
    rows = (layer.info.experts, layer.info.experts + layer.info.zero_experts)
    found: dict[int, Weights] = {}
    silent: dict[str, nn.Parameter] = {}
    for path, module in layer.block.named_modules():
        said = getattr(module, "is_transposed", None)
        for name, p in module.named_parameters(recurse=False):
            if p.ndim != 3 or len(p) not in rows or id(p) in of_router:
                continue
            if isinstance(said, bool):
                found[id(p)] = Weights(p, said)
            else:
                silent[f"{path}.{name}".strip(".")] = p
    if silent:
        transposed = _transposed(layer, silent)
        found |= {id(p): Weights(p, transposed) for p in silent.values()}
    return list(found.values())


def _transposed(layer: MoELayer, stacks: dict[str, nn.Parameter]) -> bool:
    """These are `[E, inputs, outputs]`: the way back to the width D, known by its name, says so.

    All that have D on one axis alone must agree.
    """
    D = layer.info.dispatch_width or layer.info.hidden_size
    votes, down = set(), False
    for path, p in stacks.items():
        if D is not None and (p.shape[1] == D) != (p.shape[2] == D):
            leads_back = _DOWN.search(".".join(path.split(".")[-2:])) is not None
            votes.add((p.shape[1] == D) != leads_back)
            down |= leads_back
    if down and len(votes) == 1:
        return votes.pop()
    shapes = ", ".join(f"{name} {list(p.shape)}" for name, p in stacks.items())
    raise _unknown(
        layer,
        f"which axis of {shapes} is the input is not to be seen. Say so on the module that holds "
        "it: is_transposed = True for [experts, inputs, outputs], else False",
    )


def _listed(layer: MoELayer) -> list[Weights]:
    """One module an expert: its `nn.Linear`s."""
    each = enumerate(members(layer))
    return [w for e, member in each for w in _linears(layer, e, member)]


def _linears(layer: MoELayer, expert: int, member: nn.Module) -> Iterator[Weights]:
    for path, module in member.named_modules():
        linear = isinstance(module, nn.Linear)
        own = dict(module.named_parameters(recurse=False))
        wide = [name for name, p in own.items() if p.ndim > 1]
        if linear and "weight" not in own:
            raise _unknown(layer, f"{path}.weight of an expert is no parameter of its own")
        if wide and (not linear or wide != ["weight"]):
            raise _unknown(
                layer, f"{path or 'an expert'}.{wide[0]} of an expert is no weight of nn.Linear"
            )
        if linear:
            yield Weights(own["weight"], transposed=False, expert=expert)


def _check(layer: MoELayer, p: nn.Parameter) -> None:
    """Raise if the parameter is not plain floats at hand."""
    kind = type(p.data).__name__ if type(p) is nn.Parameter else type(p).__name__
    if p.is_meta:
        raise _unknown(layer, "its weights are on the meta device. Load them first")
    if kind not in ("Tensor", "Parameter") or p.dtype not in _FLOATS:
        raise _unknown(
            layer,
            f"its weights are {p.dtype} in a {kind}: quantised already, or spread over ranks. Give "
            "the model with plain floating-point weights",
        )
    if p.is_inference():
        raise _unknown(layer, "its weights were made under torch.inference_mode. Load them outside")


def _unknown(layer: MoELayer, why: str) -> UnsupportedRouter:
    return UnsupportedRouter(
        f"{layer.info.path} ({type(layer.block).__name__}) cannot be quantised: {why}."
    )


def each_once(weights: Iterable[Weights]) -> list[Weights]:
    """Tied weights once."""
    return list({id(w.parameter): w for w in weights}.values())
