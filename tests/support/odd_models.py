"""Families of transformers whose experts are reached in an odd way, and what an expert computes.

Models and batches are the zoo's, some with other sizes. What is here is the independent truth: for
each family which tensors hold an expert's output weights, and the expert's arithmetic written out.

Legend: T tokens, D hidden, E experts, F expert intermediate, N rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from support.zoo.build import batch, build
from support.zoo.catalog import ZOO, Architecture
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear


@dataclass(frozen=True)
class Odd:
    """One family.

    Attributes:
        entry: What to build.
        last: An expert's output weights and biases, as views that can be set to zero.
        expert: (block, expert, rows `[N, D]`) to what the expert makes of them.
        probe: (block) the module whose output the experts' sum can be read off.
        fold: (block, output of the probe, its input `[T, D]`) to the experts' sum `[T, D]`.
    """

    entry: Architecture
    last: Callable[[Any, int], list[Tensor]]
    expert: Callable[[Any, int, Tensor], Tensor]
    probe: Callable[[Any], nn.Module] = lambda block: block.experts
    fold: Callable[[Any, Any, Tensor], Tensor] = lambda block, y, x: y

    def build(self, **sizes: Any) -> nn.Module:
        model = build(replace(self.entry, sizes=self.entry.sizes | sizes))
        with torch.no_grad():  # ZAYA: in every layer some tokens skip the experts, not all
            for name, tensor in (*model.named_buffers(), *model.named_parameters()):
                if name.endswith("balancing_biases"):
                    tensor.copy_(torch.linspace(-0.05, 0.05, len(tensor)))
                elif "router_mlp" in name:
                    tensor.mul_(4)
        return model


def batch_of(name: str) -> dict[str, Any]:
    """Two sequences of twelve tokens, some of them padding, or what else the model takes."""
    inputs = batch(ODD[name].entry)
    if name == "jetmoe":  # attention gives nothing back for padding, whatever its experts are
        del inputs["attention_mask"]
    return inputs


@contextmanager
def zeroed(tensors: list[Tensor]) -> Iterator[None]:
    """These tensors are zero inside, and as they were after."""
    saved = [t.detach().clone() for t in tensors]
    with torch.no_grad():
        for t in tensors:
            t.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for t, before in zip(tensors, saved, strict=True):
                t.copy_(before)


def rebuilt(
    odd: Odd, block: Any, x_TD: Tensor, slots: list[list[tuple[int, float]]], *, weights_on: str
) -> Tensor:
    """The experts' sum `[T, D]`, token by token, from captured (id, weight) pairs."""
    out = []
    for x_D, pairs in zip(x_TD, slots, strict=True):
        parts = [torch.zeros(1)]
        for e, w in pairs:
            if weights_on == "input":
                parts.append(odd.expert(block, e, w * x_D[None])[0])
            else:
                parts.append(w * odd.expert(block, e, x_D[None])[0])
        out.append(torch.stack(torch.broadcast_tensors(*parts)).sum(0))
    return torch.stack(torch.broadcast_tensors(*out))


def _fused(block: Any, e: int) -> list[Tensor]:
    parameters = dict(block.experts.named_parameters())
    return [t[e] for n, t in parameters.items() if n in ("down_proj", "down_proj_bias")]


def _glu(block: Any, e: int, x_ND: Tensor) -> Tensor:
    experts = block.experts
    gate, up = linear(x_ND, experts.gate_up_proj[e]).chunk(2, -1)
    return linear(experts.act_fn(gate) * up, experts.down_proj[e])


def _glu_or_itself(block: Any, e: int, x_ND: Tensor) -> Tensor:
    return _glu(block, e, x_ND) if e < block.experts.num_routed_experts else x_ND


def _glu_or_nothing(block: Any, e: int, x_ND: Tensor) -> Tensor:
    return _glu(block, e, x_ND) if e < block.experts.num_experts else torch.zeros_like(x_ND)


def _clamped(block: Any, e: int, x_ND: Tensor) -> Tensor:
    experts = block.experts
    return linear(experts._apply_gate(linear(x_ND, experts.gate_up_proj[e])), experts.down_proj[e])


def _gpt_oss(block: Any, e: int, x_ND: Tensor) -> Tensor:
    experts = block.experts
    inner = experts._apply_gate(x_ND @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e])
    out: Tensor = inner @ experts.down_proj[e] + experts.down_proj_bias[e]
    return out


def _llama4(block: Any, e: int, x_ND: Tensor) -> Tensor:
    gate, up = (x_ND @ block.experts.gate_up_proj[e]).chunk(2, -1)
    out: Tensor = (up * block.experts.act_fn(gate)) @ block.experts.down_proj[e]
    return out


def _jetmoe_owner(block: Any) -> Any:
    """The attention's experts are one module below it."""
    return getattr(block, "experts", block)


def _jetmoe(block: Any, e: int, x_ND: Tensor) -> Tensor:
    gate, up = linear(x_ND, block.input_linear.weight[e]).chunk(2, -1)
    return linear(block.activation(gate) * up, block.output_linear.weight[e])


def _doge(block: Any, e: int, x_ND: Tensor) -> Tensor:
    inner = block.act_fn(x_ND @ block.down_embed.weight[e])
    out: Tensor = inner[:, None] * block.up_embed.weight[e]
    return out


def _doge_shared(block: Any, y: Any, x_TD: Tensor) -> Tensor:
    shared = block.down_proj(block.act_fn(block.gate_proj(x_TD)) * block.up_proj(x_TD))
    out: Tensor = y[0].reshape(x_TD.shape) - shared
    return out


def _dbrx(block: Any, e: int, x_ND: Tensor) -> Tensor:
    mlp, rows = block.experts.mlp, _dbrx_rows(block, e)
    inner = mlp.activation_fn(x_ND @ mlp.w1[rows].T) * (x_ND @ mlp.v1[rows].T)
    out: Tensor = inner @ mlp.w2[rows]
    return out


def _dbrx_rows(block: Any, e: int) -> slice:
    F = block.experts.ffn_hidden_size
    return slice(e * F, (e + 1) * F)


def _dense(block: Any, e: int) -> Any:
    return block.experts.get_submodule(f"expert_{e}")


def _relu_mlp(names: tuple[str, str]) -> Callable[[Any, int, Tensor], Tensor]:
    def expert(block: Any, e: int, x_ND: Tensor) -> Tensor:
        first, second = (getattr(_dense(block, e), n) for n in names)
        out: Tensor = second(functional.relu(first(x_ND)))
        return out

    return expert


def _of(module: nn.Module) -> list[Tensor]:
    return [p.data for p in module.parameters()]


def _fused_family(name: str, expert: Callable[[Any, int, Tensor], Tensor] = _glu) -> Odd:
    return Odd(ZOO[name], _fused, expert)


_JETMOE = Odd(
    ZOO["jetmoe"],
    last=lambda block, e: [_jetmoe_owner(block).output_linear.weight[e]],
    expert=_jetmoe,
    probe=lambda block: block,
    fold=lambda block, y, x: (
        (y[0] if isinstance(y, tuple) else y).reshape(x.shape) - _jetmoe_owner(block).bias
    ),
)
_LLAMA4 = Odd(
    ZOO["llama4"],
    _fused,
    _llama4,
    probe=lambda block: block,
    fold=lambda block, y, x: y[0] - block.shared_expert(x),
)

ODD: dict[str, Odd] = {
    "beam": _fused_family("beam", _clamped),
    "dbrx": Odd(
        ZOO["dbrx"],
        last=lambda block, e: [block.experts.mlp.w2[_dbrx_rows(block, e)]],
        expert=_dbrx,
        fold=lambda block, y, x: y.reshape(x.shape),
    ),
    "deepseek_v4": _fused_family("deepseek_v4", _clamped),
    "diffusion_gemma": _fused_family("diffusion_gemma"),
    "doge": Odd(
        ZOO["doge"],
        last=lambda block, e: [block.up_embed.weight[e]],
        expert=_doge,
        probe=lambda block: block,
        fold=_doge_shared,
    ),
    "ernie4_5_vl_moe": _fused_family("ernie4_5_vl_moe"),
    "gemma4": _fused_family("gemma4"),
    "inkling": _fused_family("inkling"),
    "jetmoe": _JETMOE,
    "laguna": _fused_family("laguna"),
    "llama4": _LLAMA4,
    "llama4_top2": replace(_LLAMA4, entry=ZOO["llama4_top2"]),
    "longcat_flash": _fused_family("longcat_flash", _glu_or_itself),
    "minimax_m3_vl": _fused_family("minimax_m3_vl", _clamped),
    "nllb_moe": Odd(
        ZOO["nllb_moe"],
        lambda block, e: _of(_dense(block, e).fc2),
        _relu_mlp(("fc1", "fc2")),
        fold=lambda block, y, x: y / (1 - block.experts.moe_token_dropout),
    ),
    "openai_privacy_filter": _fused_family("openai_privacy_filter", _gpt_oss),
    "phimoe": _fused_family("phimoe"),
    "step3p7": _fused_family("step3p7", _clamped),
    "switch_transformers": Odd(
        ZOO["switch_transformers"],
        lambda block, e: _of(_dense(block, e).wo),
        _relu_mlp(("wi", "wo")),
    ),
    "vitpose_backbone": Odd(
        ZOO["vitpose_backbone"],
        last=lambda block, e: _of(block.experts[e]),
        expert=lambda block, e, x: block.experts[e](x),
        fold=lambda block, y, x: y.reshape(len(x), -1),
    ),
    "zaya": _fused_family("zaya", _glu_or_nothing),
}
