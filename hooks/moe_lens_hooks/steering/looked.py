"""What the routers of a model do by themselves: ids, confidence, whether they can be changed.

Legend: T tokens, K choices per token, E experts.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_lens_hooks.adapter import MoELayer, Observed
from moe_lens_hooks.semantics import learn, probabilities
from moe_lens_hooks.steering.source import Wanted


@dataclass
class Looked:
    """One layer in one forward.

    Attributes:
        layer: The layer.
        ids_TK: What its experts were given (or its router chose, where that is not the same).
        margin_T: Worst score chosen minus best score left, of those that may be chosen; NaN where
            the router's choice is not made from the scores of all experts at once.
        entropy_T: Of the router's full distribution, nats; NaN where it is not known.
        ranked: The choice is made from the scores of all experts at once: it can be changed.
        whole: It sees all tokens of its stream.
        learns: Find out `score`, how logits become probabilities, and so `entropy_T`.
        keeps: Keep `logits_TE` (float32, on the host).
        own_TK: With `keeps`, what a ranked router chose by itself, whatever its experts were given.
    """

    layer: MoELayer
    ids_TK: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    margin_T: Tensor = field(default_factory=lambda: torch.zeros(0))
    entropy_T: Tensor = field(default_factory=lambda: torch.zeros(0))
    ranked: bool = False
    whole: bool = True
    learns: bool = True
    keeps: bool = False
    logits_TE: Tensor | None = None
    score: str | None = None
    own_TK: Tensor | None = None

    def choice(self, scores_TE: Tensor, allowed_TE: Tensor, own_TK: Tensor) -> None:
        """The router makes its choice; it is left as it is."""
        chosen_TE = torch.zeros_like(allowed_TE).scatter_(1, own_TK, True)
        worst_T = scores_TE.gather(1, own_TK).amin(-1)
        left_TE = scores_TE.masked_fill(chosen_TE | ~allowed_TE, -torch.inf)
        margin_T = (worst_T - left_TE.amax(-1)).cpu().float()
        self.margin_T = torch.where(margin_T.isfinite(), margin_T, torch.nan)
        self.own_TK = own_TK.detach().cpu().long().clone() if self.keeps else None
        self.ranked = True

    def saw(self, seen: Observed) -> None:
        """The block is through."""
        info = self.layer.info
        ids = seen.expert_ids_TK if info.faithful else seen.router_ids_TK
        assert ids is not None  # Forced raises before
        self.ids_TK = ids.detach().cpu().long().clone()
        if self.keeps and seen.logits_TE is not None:
            self.logits_TE = seen.logits_TE.detach().float().cpu().clone()
        nothing_T = torch.full((len(self.ids_TK),), torch.nan)
        if not self.ranked:
            self.margin_T = nothing_T
        self.entropy_T = nothing_T
        if self.learns:
            self._learn(seen)

    def _learn(self, seen: Observed) -> None:
        info = self.layer.info
        known = learn(seen, self.layer.router, info.experts + info.zero_experts, info)
        if known is not None and known.score is not None and seen.logits_TE is not None:
            self.score = known.score
            prob_TE = probabilities(seen.logits_TE.detach().float(), known.score)
            self.entropy_T = torch.special.entr(prob_TE).sum(-1).cpu()


class Looking:
    """Looks at every layer of a forward.

    Args:
        keeps: Layers of which logits are kept.
        held: What each layer is to choose, by number: as it did when it was looked at before. None:
            they choose by themselves.
        learns: As in `Looked`: it takes longer than all the rest.
    """

    def __init__(
        self,
        keeps: Container[int] = (),
        held: Sequence[Looked] | None = None,
        *,
        learns: bool = True,
    ) -> None:
        self.layers: list[Looked] = []
        self._keeps, self._held, self._learns = keeps, held, learns

    def make(self, number: int, layer: MoELayer, token_T: Tensor | None) -> Wanted:
        keeps = number in self._keeps
        looked = Looked(layer, whole=token_T is None, learns=self._learns, keeps=keeps)
        self.layers.append(looked)
        if self._held is None:
            return Wanted(None, edit=looked.choice, saw=looked.saw)
        before = self._held[number]
        if not before.ranked:
            return Wanted(before.ids_TK, saw=looked.saw)

        def hold(scores_TE: Tensor, allowed_TE: Tensor, own_TK: Tensor) -> Tensor:
            looked.choice(scores_TE, allowed_TE, own_TK)
            return before.ids_TK.to(own_TK.device)

        return Wanted(None, edit=hold, saw=looked.saw)
