"""NLLB-MoE: two experts a token, a capacity, and experts that are not those the router chose.

    mask_TE, gates_TE, logits_TE = router(x_TD, padding_mask)
    y_TD = experts(x_TD, mask_TE, gates_TE)

`mask` is 1 at the first choice where its expert had room; `gates` holds the weights of both choices
where they had room. transformers 5 reads the 0 and 1 of the mask as expert ids: a first choice runs
on expert 1, a second on expert 0, with the weights of those who were meant. Both are recorded:
`router_ids` is what the router chose, `expert_ids` what ran, and a note counts where they differ.
How many rows each expert was called with is compared with this, so a transformers that mends it is
noticed.

After the gate weights, experts' outputs are scaled by 1 - `moe_token_dropout` (`output_scale`), or
dropped out in training.

A choice that found its expert full has weight zero, and nothing computes it. Whom it wanted is in
no tensor, and taken by the router's own operations on its own logits.

Legend: T tokens, K = 2 choices, E experts, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import MoELayer, Observed, Read, Tap, first_number, stream_of

OTHER = "choices ran on another expert than the router chose (transformers 5: only 0 and 1 run)"


@dataclass
class _Call:
    """What is known of the call that is running."""

    padding_mask: Tensor | None = None
    logits_TE: Tensor | None = None
    """Before noise is added to them in place."""
    drawn_T: Tensor | None = None
    """Random numbers that decide whether a second choice is made (policy "random")."""
    wish_TK: Tensor | None = None
    """What the router chose."""
    chosen_TK: Tensor | None = None
    """Where it made a choice at all; None: everywhere."""
    mask_TE: Tensor | None = None
    rows: dict[int, int] = field(default_factory=dict)
    """Rows that each expert was called with."""

    def clear(self) -> None:
        for name, value in vars(_Call()).items():
            setattr(self, name, value)


class Nllb:
    """`NllbMoeSparseMLP` of transformers 5."""

    name = "nllb"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        if type(module).__name__ != "NllbMoeSparseMLP":
            return None
        # Any: attributes of transformers' own classes, which only this adapter knows
        router: Any = module.router
        experts: Any = module.experts
        count = int(router.num_experts)
        drawn = router.second_expert_policy == "random"  # then a token may have one choice
        dense: Any = experts.get_submodule("expert_0")
        info = LayerInfo(
            layer=-1,
            path=path,
            experts=count,
            top_k=None if drawn else 2,
            router="dynamic-k" if drawn else "token-choice",
            block=first_number(path),
            stream=stream_of(path),
            adapter=self.name,
            shared_experts=0,
            hidden_size=int(dense.fc1.in_features),
            intermediate_size=int(dense.fc1.out_features),
            capacity_policy="drop-by-probability"
            if router.batch_prioritized_routing
            else "drop-by-position",
            faithful=False,
            output_scale=1 - float(experts.moe_token_dropout)
            if experts.moe_token_dropout
            else None,
        )
        call = _Call()
        taps = [
            Tap(router, "input", _read_padding(call)),
            Tap(router.classifier, "output", _read_logits(call)),
            Tap(router, "output", _read_router(call, router)),
            Tap(experts, "input", _read_experts(call, router)),
            *(
                Tap(experts.get_submodule(f"expert_{e}"), "input", _count_rows(call, e))
                for e in range(count)
            ),
            Tap(experts, "output", _compare_rows(call)),
        ]
        if drawn:
            taps.append(Tap(router, "around", around=lambda _: _Draws(call)))
        return MoELayer(module, info, taps, router)


class _Draws(TorchFunctionMode):
    """Keeps what the router draws with `rand_like`."""

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self._call = call

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.rand_like:
            self._call.drawn_T = result
        return result


def _read_padding(call: _Call) -> Read:
    def read(seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        call.clear()
        call.padding_mask = args[1] if len(args) > 1 else kwargs.get("padding_mask")

    return read


def _read_logits(call: _Call) -> Read:
    def read(seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call.logits_TE = output.detach().clone()

    return read


def _read_router(call: _Call, router: Any) -> Read:
    def read(seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        clean_TE, noisy_TE = call.logits_TE, output[2].detach()
        assert clean_TE is not None
        # As the router does it: the first by probability, the second by logits with their noise.
        probs_TE = torch.softmax(clean_TE, dim=-1, dtype=router.dtype).to(router.input_dtype)
        first_T1 = probs_TE.argmax(-1, keepdim=True)
        others_TE = noisy_TE.scatter(-1, first_T1, -torch.inf)
        call.wish_TK = torch.cat([first_T1, others_TE.argmax(-1, keepdim=True)], -1)
        call.chosen_TK = _chosen(call, router, probs_TE.gather(-1, call.wish_TK))
        seen.logits_TE, seen.router_ids_TK = clean_TE, call.wish_TK

    return read


def _chosen(call: _Call, router: Any, probs_TK: Tensor) -> Tensor | None:
    mask, chosen_TK = call.padding_mask, None
    if mask is not None and not router.router_ignore_padding_tokens:
        if mask.ndim == 4:  # as the router reads it: the last row of an attention mask
            mask = mask[:, :, -1, :].reshape(-1)[-len(probs_TK) :]
        chosen_TK = (~mask.bool()).reshape(-1, 1).expand(-1, 2)
    if call.drawn_T is not None:
        second_T = (2 * probs_TK[:, 1]) > call.drawn_T
        both_TK = torch.stack([torch.ones_like(second_T), second_T], -1)
        chosen_TK = both_TK if chosen_TK is None else both_TK & chosen_TK
    return chosen_TK


def _read_experts(call: _Call, router: Any) -> Read:
    def read(seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        mask_TE, gates_TE = (x.detach() for x in (*args, *kwargs.values())[1:3])
        wish_TK, chosen_TK = call.wish_TK, call.chosen_TK
        assert wish_TK is not None  # the router ran just before
        weights_TK = gates_TE.gather(-1, wish_TK)
        ran_TK = mask_TE.gather(-1, wish_TK)
        kept_TK = torch.cat([ran_TK[:, :1] > 0, weights_TK[:, 1:] > 0], -1)
        seen.expert_ids_TK = torch.where(kept_TK, ran_TK, wish_TK)
        seen.weights_TK, seen.kept_TK = weights_TK, kept_TK
        seen.capacity = int(router.expert_capacity)
        unmade = torch.zeros((), dtype=torch.int64, device=kept_TK.device)
        if chosen_TK is not None:
            seen.chosen_TK, seen.choices = chosen_TK, chosen_TK.sum()
            unmade = (kept_TK & ~chosen_TK).sum()
        alien_T = (mask_TE.sum(-1) != kept_TK[:, 0]) | ((gates_TE != 0).sum(-1) != kept_TK.sum(-1))
        seen.problems["experts given gates that their router did not choose"] = (
            alien_T.sum() + unmade
        )
        seen.notes[OTHER] = (kept_TK & (ran_TK != wish_TK)).sum()
        call.mask_TE = mask_TE

    return read


def _count_rows(call: _Call, expert: int) -> Read:
    def read(seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        call.rows[expert] = len(args[0])

    return read


def _compare_rows(call: _Call) -> Read:
    def read(seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        mask_TE, rows = call.mask_TE, call.rows
        assert mask_TE is not None
        ones = mask_TE.sum()
        wrong = (ones - rows.get(1, 0)).abs() + (mask_TE.numel() - ones - rows.get(0, 0)).abs()
        others = sum(n for expert, n in rows.items() if expert > 1)
        seen.problems["rows that NLLB's experts ran otherwise than this adapter knows"] = (
            wrong + others
        )
        call.clear()  # the model's tensors are not ours to keep

    return read
