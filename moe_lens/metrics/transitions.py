"""From layer to layer: what a token's experts in one layer say of its experts in the next.

An expert's number means nothing across layers: expert 3 of one layer and expert 3 of the next have
no more in common than any other two. So nothing here compares by number; a table of transitions may
have its rows and columns in any order.

Transitions are of pairs: each of a token's k choices with each of its k in the next layer. The
released analysis of OLMoE pairs only choices of the same rank (first with first, second with
second): `moves.transition_matrix(..., same_rank=True)`. Where one number per token is needed it is
the first choice, the expert of the largest gate weight.
"""

from __future__ import annotations

from moe_lens.metrics.catalogue import metric
from moe_lens.metrics.chance import Chance, of_draws
from moe_lens.metrics.moves import Moves, Prefetched

_ONE = "fewer than two tokens with choices: nothing to fit on, or nothing to score"
UNDEFINED = {
    "transition_uncertainty": "all tokens have one first choice: nothing is uncertain",
    "affinity": "no tokens with a choice in both layers",
    "prefetch_recall": _ONE,
    "prefetch_exact": _ONE,
}
"""Why a metric has no value, where what it reads is there."""

_SHUFFLED = "tokens shuffled between the layers, which keeps both loads"
_FIT = "fitted on the first half of the sequences, scored on the second"


@metric(
    group="transitions",
    formula="I(e; e') / H(e'), e and e' a token's first choices in the layer before and here",
    range="0 to 1",
    source="Theil's uncertainty coefficient",
    null=f"{_SHUFFLED}: I is about (E - 1)(E' - 1) / 2T nats too high by counting alone",
    chance=lambda moves: of_draws(moves.uncertainty_R[1:]),
)
def transition_uncertainty(moves: Moves) -> float:
    """How much of a token's first choice is settled by that of the layer before."""
    return float(moves.uncertainty_R[0])


@metric(
    group="transitions",
    formula="mean over experts e, weighted by tokens, of max over e' of P(e' | e); first choices",
    range="largest share of one expert to 1",
    source="Yao et al. 2024, ExFlow, arXiv 2401.08383",
    null=f"{_SHUFFLED}: a little above the largest share of one expert",
    chance=lambda moves: of_draws(moves.affinity_R[1:]),
)
def affinity(moves: Moves) -> float:
    """Tokens that go where most tokens of their expert go.

    Experts that follow each other can be placed on one device. Weighted, since an expert with one
    token has all its tokens in one place.
    """
    return float(moves.affinity_R[0])


@metric(
    group="transitions",
    formula="share of choices among the k experts of the largest sums of P(e' | e), e in the "
    f"token's choices in the layer before; {_FIT}",
    range="0 to 1",
    null="the k most popular experts of the first half instead; k / E where all are alike",
    chance=lambda prefetched: Chance(prefetched.recall["popularity"]),
)
def prefetch_recall(prefetched: Prefetched) -> float:
    """What prefetching k experts a layer ahead would find there, from a table of counts alone."""
    return prefetched.recall["last_layer"]


@metric(
    group="transitions",
    formula=f"share of tokens all of whose experts are among these k; {_FIT}",
    range="0 to prefetch_recall",
    null="the k most popular experts of the first half instead",
    chance=lambda prefetched: Chance(prefetched.exact["popularity"]),
)
def prefetch_exact(prefetched: Prefetched) -> float:
    """Tokens that would not wait at all: one missing expert stalls as four do."""
    return prefetched.exact["last_layer"]
