"""What a model's weights say of its routing, without running it.

`moe_lens.metrics.similarity` and `moe_lens.metrics.bias` tell what it means.

Keys are the paths of the MoE blocks (`layers` of a trace's meta has them): layers are numbered by
their call order, and nothing is called here. A layer whose weights cannot be told apart for sure
is left out: no matrix of the router has a row for each expert (hash routers), or several have;
experts are quantised, or held by other ranks.

Legend: E experts, V outputs of the router (E and zero-compute experts), D width, P weights of one
expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_lens_hooks.adapter import Adapter, MoELayer
from moe_lens_hooks.adapters import all_adapters
from moe_lens_hooks.expert_weights import members, stacked
from moe_lens_hooks.finding import find_layers
from moe_lens_hooks.semantics import correction_bias

_AT_ONCE = 1 << 24
"""Elements that are held in float32 at a time."""


def router_rows(
    model: nn.Module, *, adapters: Sequence[Adapter] = ()
) -> dict[str, NDArray[np.float32]]:
    """The matrix that gives each MoE layer's logits, `[V, D]`: a row an output, by path.

    Of a router of several products, its last: D is then the width inside it.

    Args:
        model: Any that `record` takes.
        adapters: As in `record`.

    Raises:
        NoMoELayers: None was recognised.
        UnsupportedRouter: A block is an MoE whose routing cannot be seen.
    """
    found = ((x.info.path, _rows(x)) for x in _layers(model, adapters))
    return {path: _numpy(rows_VD.float()) for path, rows_VD in found if rows_VD is not None}


def expert_cosines(
    model: nn.Module, *, adapters: Sequence[Adapter] = ()
) -> dict[str, NDArray[np.float64]]:
    """Cosine of the flattened weights of each pair of experts, `[E, E]`, by path.

    1: a copy. Experts that were copied and trained on (upcycling) keep their neurons in order, and
    show. Two that compute the same with their neurons in another order do not: near 0 is no proof
    that they differ. Biases are left out where weights are stacked.

    Args:
        model: Any that `record` takes.
        adapters: As in `record`.

    Raises:
        NoMoELayers: None was recognised.
        UnsupportedRouter: A block is an MoE whose routing cannot be seen.
    """
    out: dict[str, NDArray[np.float64]] = {}
    for layer in _layers(model, adapters):
        gram_EE = _gram(layer)
        if gram_EE is not None:
            length_E = gram_EE.diagonal().sqrt()
            cosine_EE = gram_EE / (length_E[:, None] * length_E)
            out[layer.info.path] = _numpy(cosine_EE.clamp(-1, 1))
    return out


def selection_biases(
    model: nn.Module, *, adapters: Sequence[Adapter] = ()
) -> dict[str, NDArray[np.float32]]:
    """A copy of what each router adds to its scores for selection only, `[V]`, by path.

    Layers without one are left out; called once in a while during training it gives the steps that
    `moe_lens.metrics.bias` looks at. A bias that is handed to a router from outside of its MoE
    block is not found.

    Args:
        model: Any that `record` takes.
        adapters: As in `record`.

    Raises:
        NoMoELayers: No MoE layer was recognised.
        UnsupportedRouter: A block is an MoE whose routing cannot be seen.
    """
    out: dict[str, NDArray[np.float32]] = {}
    for layer in _layers(model, adapters):
        homes = (layer.router, layer.block)
        read = (correction_bias(home, n) for home in homes for n in _outputs(layer))
        bias_V = next((b for b in read if b is not None), None)
        if bias_V is not None:
            out[layer.info.path] = _numpy(bias_V.float())
    return out


def _layers(model: nn.Module, adapters: Sequence[Adapter]) -> list[MoELayer]:
    return find_layers([model], [*adapters, *all_adapters()])


def _outputs(layer: MoELayer) -> tuple[int, ...]:
    """What V can be: with zero-compute experts, or the bare experts."""
    info = layer.info
    return tuple(dict.fromkeys((info.experts + info.zero_experts, info.experts)))


def _rows(layer: MoELayer) -> Tensor | None:
    """The one matrix of the router with a row, or a column, for each output."""
    if layer.router is None:
        return None
    for outputs in _outputs(layer):
        found: dict[int, Tensor] = {}
        for module in layer.router.modules():
            for p in module.parameters(recurse=False):
                if p.ndim != 2 or not p.is_floating_point():
                    continue
                if p.shape[0] == outputs and (p.shape[1] != outputs or type(module) is nn.Linear):
                    found[id(p)] = p.detach()
                elif p.shape[1] == outputs != p.shape[0] > 1 and type(module) is not nn.Linear:
                    found[id(p)] = p.detach().T
        if len(found) == 1:
            return next(iter(found.values()))
    return None


def _gram(layer: MoELayer) -> Tensor | None:
    """Inner products `[E, E]` of the experts' flattened weights, in float64."""
    parts = list(_stacked(layer)) or list(_listed(layer))
    if not parts:
        return None
    E = layer.info.experts
    gram_EE = torch.zeros(E, E, dtype=torch.float64)
    for rows_E in parts:
        each = max(_AT_ONCE // E, 1)
        for at in range(0, rows_E[0].numel(), each):
            part = torch.stack([row[at : at + each].float() for row in rows_E])
            gram_EE += (part @ part.T).double().cpu()
    return gram_EE


def _stacked(layer: MoELayer) -> Iterator[list[Tensor]]:
    """Of each stack of parameters: every expert's part, flattened."""
    for p in stacked(layer):
        yield [x.reshape(-1) for x in p.detach().chunk(layer.info.experts)]


def _listed(layer: MoELayer) -> Iterator[list[Tensor]]:
    """One module an expert: the parameters of one name, of all of them."""
    each = [dict(m.named_parameters()) for m in members(layer)]
    for name, first in each[0].items() if each else ():
        if first.is_floating_point() and first.ndim > 1:
            yield [x[name].detach().reshape(-1) for x in each]


def _numpy(x: Tensor) -> NDArray[Any]:
    return np.array(x.detach().cpu().numpy())  # a copy: training moves on
