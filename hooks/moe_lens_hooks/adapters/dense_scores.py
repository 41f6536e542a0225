"""Llama 4: every expert gets every token, scaled by a score that is zero where it was not chosen.

    scores_TE, logits_TE = router(x_TD)        sigmoid of the k largest logits, 0 elsewhere
    y = experts(x repeated for each expert * scores)

The weight stands on the expert's input, not on its output: an expert without biases gives zero for
a zero input, so a score of zero is an expert that does not take part. What was chosen is read off
the scores. A chosen expert's score may round to zero in half precision; then the router's own top-k
of its logits says who that was, and it is checked against the scores.

Legend: T tokens, K choices per token, E experts, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import MoELayer, Observed, Tap, first_int, first_number, stream_of


class DenseScores:
    """Block with children `router` (a `Llama4Router`) and `experts(x)`."""

    name = "dense-scores"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        router, experts = getattr(module, "router", None), getattr(module, "experts", None)
        if not type(router).__name__.endswith("Llama4Router") or not isinstance(experts, nn.Module):
            return None
        assert isinstance(router, nn.Module)
        count, k = int(router.num_experts), int(router.top_k)  # type: ignore[arg-type]
        info = LayerInfo(
            layer=-1,
            path=path,
            experts=count,
            top_k=k,
            block=first_number(path),
            stream=stream_of(path),
            adapter=self.name,
            shared_experts=1,
            hidden_size=first_int(experts, "hidden_size"),
            intermediate_size=first_int(experts, "intermediate_size"),
            weights_on="input",
        )

        def read_router(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            scores_TE, seen.logits_TE = (x.detach() for x in output)
            _choices(seen, scores_TE, seen.logits_TE, k)

        def read_experts(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
        ) -> None:
            rows, tokens = len(args[0]), len(seen.weights_TK) if seen.weights_TK is not None else 0
            if rows != tokens * count:
                seen.problems["rows given to experts, not one for each expert and token"] = rows

        taps = [Tap(router, "output", read_router), Tap(experts, "input", read_experts)]
        return MoELayer(module, info, taps, router)


def _choices(seen: Observed, scores_TE: Tensor, logits_TE: Tensor, k: int) -> None:
    ids_TK = scores_TE.topk(k, dim=-1).indices
    nonzero_T = (scores_TE != 0).sum(-1)
    short_T1 = (nonzero_T < k).unsqueeze(-1)
    ids_TK = torch.where(short_T1, logits_TE.topk(k, dim=1).indices, ids_TK)
    seen.expert_ids_TK = ids_TK
    seen.weights_TK = scores_TE.gather(-1, ids_TK)
    outside_T = (seen.weights_TK != 0).sum(-1) != nonzero_T
    seen.problems["tokens with a score for an expert that was not chosen"] = outside_T.sum()
