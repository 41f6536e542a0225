"""What experts are chosen for: kinds of text, token ids, positions; and whether all share a few.

A domain is a tag. Everything here is above 0, or above its floor, by chance, and far above where
texts are few: read the value beside its null. Choices are what is counted: each of a token's k
choices is one, whatever its weight.

Legend: ... any leading axes (draws), G tags, E experts, B octaves of positions.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from moe_lens.metrics.by_tag import (
    ENOUGH,
    PERMUTATIONS,
    Counts,
    committee,
    compared,
    entropies,
    leading,
    mean_of_pairs,
    mutual_information,
)
from moe_lens.metrics.by_token import MIN_COUNT, OfIds
from moe_lens.metrics.catalogue import metric
from moe_lens.metrics.chance import Floats, of_draws
from moe_lens.metrics.drift import jsd

_OLMOE = "OLMoE (Muennighoff et al. 2024, arXiv 2409.02060)"
_BANDARKAR = "Bandarkar et al., entropy-normalised divergence of routing"
_NATS = "nats"
_MOVED = f"the same with the tags permuted over the sequences, {PERMUTATIONS} times"
_UNIFORM = "the same of a uniform router, with the choices of each tag"
_IDS = f"the same with the ids moved against the choices, {PERMUTATIONS} times"

_FEW_TAGS = f"fewer than two tags with {ENOUGH} choices per expert"
_FEW_IDS = f"no token id occurs {MIN_COUNT} times in these tokens"
UNDEFINED = {
    "domain_specialisation": f"no tag with {ENOUGH} choices per expert",
    "domain_lift": f"no expert of which a tag would make {ENOUGH} choices",
    "domain_divergence": _FEW_TAGS,
    "domain_divergence_norm": _FEW_TAGS,
    "committee_size": _FEW_TAGS,
    "committee_share": _FEW_TAGS,
    "committee_overlap": _FEW_TAGS,
    "domain_information_given_token": _FEW_IDS,
    "vocabulary_specialisation": _FEW_IDS,
    "context_independence": f"{_FEW_IDS}, or every token chooses every expert",
    "same_token_agreement": _FEW_IDS,
    "position_information": "the positions of these tokens lie in one octave",
}
"""Why a metric has no value, where what it reads is there."""


def divergences(counts_GE: Counts) -> Floats:
    """Jensen-Shannon divergence of each pair of tags, `[..., G, G]`: nats, 0 to ln 2.

    NaN for a tag without choices.
    """
    counts = np.asarray(counts_GE)
    tags = counts.shape[-2]
    out_GG = np.empty((*counts.shape[:-1], tags))
    for g in range(tags):
        out_GG[..., g, g:] = jsd(counts[..., g:, :], counts[..., g : g + 1, :])
        out_GG[..., g:, g] = out_GG[..., g, g:]
    return out_GG


_by_tag = partial(metric, group="specialisation", null=_MOVED, drawn=True)


@_by_tag(
    formula="I(D; i) = sum p(D, i) ln[p(D, i) / (p(D) p(i))] over choices",
    range="0 to min(H_D, H_i)",
    unit=_NATS,
)
def domain_information(tagged_GE: Counts) -> Any:
    """How much the tag says about the expert. Every tag weighs as much as its choices."""
    return mutual_information(tagged_GE)


@_by_tag(formula="I(D; i) / min(H_D, H_i)", range="0 to 1")
def domain_information_norm(tagged_GE: Counts) -> Any:
    """The same, comparable between runs of other tags and experts; 1: one gives the other away."""
    counts = np.asarray(tagged_GE)
    least = np.minimum(entropies(counts.sum(-1)), entropies(counts.sum(-2)))
    return mutual_information(counts) / np.where(least > 0, least, np.nan)


@_by_tag(
    formula=f"max f_i(D) / f_i over the pairs with N_D f_i >= {ENOUGH}",
    range="1 to 1 / the tag's share of all choices",
)
def domain_lift(tagged_GE: Counts) -> Any:
    """The most characteristic pair of expert and tag: how much likelier the choice is there."""
    counts = np.asarray(tagged_GE, float)
    total = counts.sum((-1, -2), keepdims=True)
    expected = counts.sum(-1, keepdims=True) * counts.sum(-2, keepdims=True)
    expected = expected / np.where(total > 0, total, np.nan)
    enough = expected >= ENOUGH
    lift = np.where(enough, counts / np.where(enough, expected, 1.0), 0.0).max((-1, -2))
    return np.where(enough.any((-1, -2)), lift, np.nan)


@metric(
    group="specialisation",
    formula="max F_i(D), share of a tag's tokens that choose an expert, over tags with "
    f"{ENOUGH} choices per expert",
    range="k/E to 1",
    source=f"{_OLMOE}, eq. 7",
    null=f"{_UNIFORM}: k/E, and what the largest is above it",
    drawn=True,
)
def domain_specialisation(counts_GE: Counts, tokens_G: Counts) -> Any:
    """The expert that a tag uses most. High too where all tags do: domain_lift tells.

    From every token; the stored question `tag_load` has all tags and experts.
    """
    share_GE = np.asarray(counts_GE) / np.maximum(tokens_G, 1)[:, None]
    enough_G = compared(counts_GE)
    most = np.where(enough_G, share_GE.max(-1), 0.0).max(-1)
    return np.where(enough_G.any(-1), most, np.nan)


@_by_tag(
    formula="mean over pairs of tags of JSD(f(D), f(D')), tags with "
    f"{ENOUGH} choices per expert; by independent choices about (E - 1)/8 (1/N_D + 1/N_D')",
    range="0 to ln 2",
    unit=_NATS,
)
def domain_divergence(tagged_GE: Counts) -> Any:
    """How differently tags use the experts; all tags weigh alike."""
    return mean_of_pairs(divergences(tagged_GE), compared(tagged_GE))


@_by_tag(
    formula="mean over pairs of tags of JSD / (ln E - (H(D) + H(D')) / 2)",
    range="0 to 1",
    source=_BANDARKAR,
)
def domain_divergence_norm(tagged_GE: Counts) -> Any:
    """The same of what it could be with loads as uneven as these: comparable between layers.

    Of nearly even loads it is noise divided by noise, large and without meaning.
    """
    counts = np.asarray(tagged_GE)
    own_G = entropies(counts)
    room_GG = np.log(counts.shape[-1]) - (own_G[..., :, None] + own_G[..., None, :]) / 2
    room_GG = np.where(room_GG > 1e-12, room_GG, np.inf)  # two even profiles: 0, not 0 / 0
    norm_GG = divergences(counts) / room_GG
    return mean_of_pairs(norm_GG, compared(counts))


@metric(
    group="specialisation",
    formula="#{experts that are, in every tag, of the fewest that take half of its choices}",
    range="0 to E",
    unit="experts",
    source="after Committee Audit, arXiv 2601.03425; thresholds are ours",
    null=_UNIFORM,
    drawn=True,
)
def committee_size(counts_GE: Counts) -> Any:
    """A standing committee: few experts that lead whatever the text. Half of E: an even load."""
    return np.where(compared(counts_GE).sum(-1) > 1, committee(counts_GE).sum(-1), np.nan)


@metric(
    group="specialisation",
    formula="the smallest share, over tags, of choices that the committee takes",
    range="0 to 1",
    source="after Committee Audit, arXiv 2601.03425; thresholds are ours",
    null=_UNIFORM,
    drawn=True,
)
def committee_share(counts_GE: Counts) -> Any:
    """How much of every domain the committee serves; above size / E, more than its part."""
    counts, enough_G = np.asarray(counts_GE, float), compared(counts_GE)
    taken_G = (counts * committee(counts_GE)[..., None, :]).sum(-1)
    share_G = taken_G / np.maximum(counts.sum(-1), 1)
    least = np.where(enough_G, share_G, np.inf).min(-1)
    return np.where(enough_G.sum(-1) > 1, least, np.nan)


@_by_tag(
    formula="mean over pairs of tags of |A and B| / |A or B|, the fewest experts that take half of "
    "each one's choices",
    range="0 to 1",
)
def committee_overlap(tagged_GE: Counts) -> Any:
    """Whether tags have the same leading experts; below the null, they have some of their own."""
    lead = leading(tagged_GE).astype(float)
    both_GG = lead @ lead.swapaxes(-1, -2)
    size_G = lead.sum(-1)
    any_GG = size_G[..., :, None] + size_G[..., None, :] - both_GG
    return mean_of_pairs(both_GG / np.maximum(any_GG, 1), compared(tagged_GE))


@metric(
    group="specialisation",
    formula="sum over D of p(D) KL(f(D) || g(D)), g the mean over D's tokens of f(x), the choices "
    f"of all tokens with the id x; ids with N_x >= {MIN_COUNT}",
    range="0 to I(D; i | x)",
    unit=_NATS,
    null=f"{_MOVED}; without a lower end: an id that one tag alone has says nothing, until tags "
    "are permuted",
    chance=lambda given_ids_R: replace(of_draws(given_ids_R[1:]), low=None),
)
def domain_information_given_token(given_ids_R: Floats) -> float:
    """What the tag says about the expert beyond the token's id; 0: domains only differ in words.

    A lower bound of I(D; i | x), which cannot be told from a few tokens of each id.
    """
    return float(given_ids_R[0])


_by_id = partial(metric, group="specialisation", null=_IDS)


@_by_id(
    formula=f"mean over ids x of max_i N_(x,i) / N_x, all k choices, ids with N_x >= {MIN_COUNT}",
    range="k/E to 1",
    source=f"{_OLMOE}, eq. 8; its script takes first choices only, and ids that occur once too",
    chance=lambda of_ids: of_draws(of_ids.max_share[1:]),
)
def vocabulary_specialisation(of_ids: OfIds) -> float:
    """Whether ids have an expert of their own; by chance and load alone it is above k/E too."""
    return float(of_ids.max_share[0])


@_by_id(
    formula="(I(i; x) - chance) / (I(i; token) - chance), I(i; token) = H(i) - ln k, over ids with "
    f"N_x >= {MIN_COUNT}",
    range="about 0 to 1",
    source="after OpenMoE (Xue et al. 2024, arXiv 2402.01739), which only shows it",
    chance=lambda of_ids: replace(of_draws(_independence(of_ids)[1:]), expected=0.0),
)
def context_independence(of_ids: OfIds) -> float:
    """Of what a token says about its experts, the part that its id says; 1: a lookup table."""
    return float(_independence(of_ids)[0])


def _independence(of_ids: OfIds) -> Floats:
    bias = of_ids.information[1:].mean()
    room = of_ids.most - bias
    return np.asarray((of_ids.information - bias) / (room if room > 1e-12 else np.nan))


@_by_id(
    formula="P(same first choice | same id), two tokens with an id that occurs "
    f"{MIN_COUNT} times or more; each token weighs alike",
    range="0 to 1",
    source="OpenMoE (Xue et al. 2024, arXiv 2402.01739)",
    chance=lambda ranked_ids: of_draws(ranked_ids.agreement[1:]),
)
def same_token_agreement(ranked_ids: OfIds) -> float:
    """How often a token goes where another one with its id goes; 1: the context has no part."""
    return float(ranked_ids.agreement[0])


@metric(
    group="specialisation",
    formula="I(b; i) over choices, b the octave of the position: 0, 1, 2 to 3, 4 to 7, ...",
    range="0 to H_b",
    unit=_NATS,
    null=f"the same with each sequence's choices turned by a random stretch, {PERMUTATIONS} times",
    drawn=True,
)
def position_information(placed_BE: Counts) -> Any:
    """How much the place in the text says about the expert."""
    counts = np.asarray(placed_BE)
    several = (counts.sum(-1) > 0).sum(-1) > 1
    return np.where(several, mutual_information(counts), np.nan)
