"""DeepSpeed-MoE: `MOELayer` with a `TopKGate`, a capacity, and choices marked -1 where it was full.

    l_aux, C, E, ids_KT, places_KT, gates_KT, counts_E = gate(x_TD, used_token, sparse_routes=True)
    l_aux, combine_TEC, dispatch_TEC, counts_E         = gate(x_TD, used_token)

The first is what 0.19 calls, the second what releases before it called; both are read. `counts`
is of the choices before anything is dropped, and is compared with them. What a dropped choice
wanted is in neither, so the ids are seen inside the gate, where `argmax` (k = 1, 2) or `topk`
returns them, noise and all: with `RSample` or a sampled second expert they follow from no tensor
that is kept.

A token that `used_token` leaves out makes no choice (k = 1; the other gates ignore the argument).

Rows that other ranks send to an expert arrive in zero-padded slots and are not counted anywhere,
so `received` stays null.

Legend: T tokens, K choices per token, E experts, C capacity, D hidden.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.errors import UnsupportedRouter
from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import MoELayer, Observed, Tap, first_number
from moe_lens_hooks.adapters.torch_calls import TorchCalls, derives, rows_of_each


@dataclass
class _Call:
    """What was seen inside the gate in the call that is running."""

    logits_TE: Tensor | None = None
    """Before the gate adds noise to them."""
    ids: list[Tensor] = field(default_factory=list)


class DeepSpeed:
    """`MOELayer` of deepspeed.moe, inside its `MoE`."""

    name = "deepspeed"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        if derives(module, "deepspeed", "AutoEPMoELayer"):
            return None
        if not derives(module, "deepspeed", "MOELayer"):
            return None
        # Any: attributes of DeepSpeed's own classes, which only this adapter knows
        gate: Any = module.gate
        if not derives(gate, "deepspeed", "TopKGate"):
            raise UnsupportedRouter(
                f"{path} ({type(module).__name__}) has a {type(gate).__name__} for a gate, whose "
                "choices cannot be seen here. Write an adapter (docs/hooks.md) that does."
            )
        K, count = int(gate.k), int(gate.wg.out_features)
        info = LayerInfo(
            layer=-1,
            path=path,
            experts=count,
            top_k=K,
            block=first_number(path),
            adapter=self.name,
            shared_experts=0,
            hidden_size=int(gate.wg.in_features),
            capacity_policy=_policy(gate),
        )
        call = _Call()

        def around(seen: Observed) -> AbstractContextManager[Any]:
            call.__init__()  # type: ignore[misc]
            return TorchCalls(see)

        def see(name: str, args: tuple[Any, ...], result: Any) -> None:
            if name == "softmax" and call.logits_TE is None:
                call.logits_TE = args[0].detach().clone()  # noise is added to it in place
            elif name == "argmax" and K <= 2:
                call.ids.append(result.unsqueeze(-1))
            elif name == "topk" and K > 2 and not call.ids:
                call.ids.append(result[1])

        def read(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            ids_TK = torch.cat(call.ids, -1)
            if len(output) == 4:
                weights_TK, kept_TK, wrong = _dense(output, ids_TK)
            else:
                weights_TK, kept_TK, wrong = _sparse(output, ids_TK)
            seen.expert_ids_TK, seen.weights_TK = ids_TK, weights_TK
            seen.logits_TE = call.logits_TE
            counts_E = output[-1]
            rows_E = rows_of_each(ids_TK, count)
            used = args[1] if len(args) > 1 else kwargs.get("used_token")
            if used is not None and K == 1:
                seen.chosen_TK = used.reshape(-1, 1) != 0
                rows_E = rows_of_each(torch.where(seen.chosen_TK, ids_TK, count), count + 1)[:-1]
            seen.choices = counts_E.sum().long()
            if gate.drop_tokens:
                seen.kept_TK = kept_TK
                seen.capacity = _capacity(output)
            else:
                wrong = wrong + (~kept_TK).sum()
            seen.problems["experts ran other tokens than the gate chose"] = wrong
            seen.problems["choices that the gate did not count"] = (rows_E - counts_E).abs().sum()
            call.__init__()  # type: ignore[misc]  # keeps no tensor until the next forward

        taps = [Tap(gate, "around", around=around), Tap(gate, "output", read)]
        return MoELayer(module, info, taps, gate)


def _policy(gate: Any) -> str | None:
    """Which choices are dropped, as the three gate functions do it."""
    if not gate.drop_tokens:
        return None
    if gate.k == 1:
        return "drop-at-random" if gate.use_rts else "drop-by-position"
    return "drop-by-position" if gate.k == 2 else "drop-by-probability"


def _sparse(output: Any, ids_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, kept, and how many kept choices have another id than was seen."""
    _, _, _, ids_KT, _, gates_KT, _ = output
    ran_TK = ids_KT.detach().T
    kept_TK = ran_TK >= 0
    return gates_KT.detach().T, kept_TK, (kept_TK & (ran_TK != ids_TK)).sum()


def _dense(output: Any, ids_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the masks."""
    _, combine_TEC, dispatch_TEC, _ = output
    ran_TE = dispatch_TEC.detach().any(-1)
    kept_TK = ran_TE.gather(-1, ids_TK)
    weights_TK = combine_TEC.detach().sum(-1).gather(-1, ids_TK)
    return weights_TK, kept_TK, (ran_TE.sum() - kept_TK.sum()).abs()


def _capacity(output: Any) -> int:
    """Slots of one expert. A gate that drops makes it on the host: nothing is waited for."""
    return int(output[1].shape[-1] if len(output) == 4 else output[1])
