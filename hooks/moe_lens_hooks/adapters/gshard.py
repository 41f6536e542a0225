"""mixture-of-experts and st-moe-pytorch: GShard's dispatch and combine masks, with a capacity.

    dispatch_BNEC, combine_BNEC, … = gate(x_BND)         one slot c of expert e holds one token
    y_BND = combine(experts(dispatch(x)))

What the experts compute is `dispatch`, and what they are weighted by is `combine`. The masks do not
tell a choice that found its expert full from a second choice that was never made (the gates make it
with a probability), so the choices are seen inside the gate: the ids where `topk` returns them, and
whether each was made where the mask of all choices is padded to count places (`pad`), just before
what does not fit is removed. That mask is counted on its own: ids that disagree with it are a
breach.

Each sequence has a capacity of its own. Two levels (`HeirarchicalMoE`) are refused.

Legend: B sequences, N their tokens, T = B N, K choices per token, E experts, C capacity, D hidden.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.errors import UnsupportedRouter
from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import MoELayer, Observed, Tap, first_number, stream_of
from moe_lens_hooks.adapters.torch_calls import TorchCalls, derives


@dataclass
class _Call:
    """What was seen inside the gate in the call that is running."""

    logits_BNE: Tensor | None = None
    """What the softmax was given: with the gate's noise, where it adds some."""
    ids: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    """The choices that were made, one-hot."""


class GShard:
    """`MoE` of mixture_of_experts or st_moe_pytorch."""

    name = "gshard"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        if derives(module, "mixture_of_experts", "HeirarchicalMoE"):
            raise UnsupportedRouter(
                f"{path} ({type(module).__name__}) routes on two levels: a token whose group of "
                "experts is full was never offered to an expert in it, so that drop has no expert "
                "to be counted at. Only the flat MoE of mixture-of-experts is recorded."
            )
        lucidrains = ("mixture_of_experts", "st_moe_pytorch")
        if not any(derives(module, package, "MoE") for package in lucidrains):
            return None
        # Any: attributes of those libraries' own classes, which only this adapter knows
        gate: Any = module.gate
        if not any(derives(gate, package, "Top2Gating", "TopNGating") for package in lucidrains):
            raise UnsupportedRouter(
                f"{path} ({type(module).__name__}) has a {type(gate).__name__} for a gate, whose "
                "choices cannot be seen here. Write an adapter (docs/hooks.md) that does."
            )
        count = int(gate.num_gates)
        policies = {getattr(gate, f"second_policy_{when}", "random") for when in ("train", "eval")}
        fixed = policies == {"all"}
        K = int(getattr(gate, "top_n", 2))
        info = LayerInfo(
            layer=-1,
            path=path,
            experts=count,
            top_k=K if fixed else None,
            block=first_number(path),
            stream=stream_of(path),
            router="token-choice" if fixed else "dynamic-k",
            adapter=self.name,
            shared_experts=0,
            hidden_size=_width(gate),
            capacity_policy="drop-by-position",
        )
        call = _Call()

        def around(seen: Observed) -> AbstractContextManager[Any]:
            call.__init__()  # type: ignore[misc]
            return TorchCalls(see)

        def see(name: str, args: tuple[Any, ...], result: Any) -> None:
            if name == "softmax" and call.logits_BNE is None:
                call.logits_BNE = args[0].detach()
            elif name == "topk":
                call.ids.append(result[1].detach())
            elif name == "pad":  # the mask is changed in place later
                call.masks.append(args[0].detach().clone())

        def read(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            dispatch_BNEC, combine_BNEC = output[0].detach(), output[1].detach()
            B, N, _, C = dispatch_BNEC.shape
            ids_TK = torch.cat(call.ids, -1).reshape(B * N, K)
            masks_KTE = _stacked(call.masks).reshape(K, B * N, count)
            logits_BNE = call.logits_BNE
            assert logits_BNE is not None  # there is no gate without a softmax
            seen.logits_TE = logits_BNE.reshape(-1, count)
            seen.expert_ids_TK = ids_TK
            seen.weights_TK = combine_BNEC.sum(-1).reshape(-1, count).gather(-1, ids_TK)
            # st-moe's dispatch lets gradients through: 1 plus or minus its rounding
            ran_TE = (dispatch_BNEC > 0.5).any(-1).reshape(-1, count)
            seen.kept_TK = ran_TE.gather(-1, ids_TK)
            filled_TK = seen.kept_TK
            if not fixed:
                made_KT1 = masks_KTE.gather(-1, ids_TK.T.unsqueeze(-1))
                seen.chosen_TK = (made_KT1.squeeze(-1) > 0).T
                seen.choices = masks_KTE.sum()
                filled_TK = filled_TK & seen.chosen_TK
            seen.capacity, seen.capacity_groups = C, B
            alien = (dispatch_BNEC > 0.5).sum() - filled_TK.sum()
            seen.problems["slots of experts that hold no choice of the gate"] = alien.abs()
            call.__init__()  # type: ignore[misc]  # keeps no tensor until the next forward

        taps = [Tap(gate, "around", around=around), Tap(gate, "output", read)]
        return MoELayer(module, info, taps, gate)


def _stacked(masks: list[Tensor]) -> Tensor:
    """`[K, B, N, E]`: one mask a choice (mixture-of-experts), or all in one (st-moe)."""
    return masks[0] if len(masks) == 1 else torch.stack(masks)


def _width(gate: Any) -> int | None:
    weight = getattr(gate, "w_gating", None)
    return int(gate.to_gates.in_features if weight is None else weight.shape[-2])
