"""Loss by slice: do tokens that are dropped, near a tie, or on a crowded expert do worse?

A difference of means alone does not say. Tokens of one sequence resemble each other, in their loss
and in how they are routed, and both depend on the position: a test that takes them for independent
calls nearly everything significant. So the null moves whole sequences: each keeps its losses in
their order, and is laid beside the choices of another one. That holds whatever is alike inside a
sequence; it does not hold the tag, so text that is both hard and routed alike shows here too:
`slices` within one tag tells (`moe_lens query quality_of_dropped` compares within tags).

Losses are in the user's unit (nats for a perplexity), and of the prediction made at the token.

Legend: N tokens of whole sequences, one after another, M those with a loss, S sequences, D slices,
R draws, K choices of a token, E experts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from moe_lens.metrics.catalogue import metric
from moe_lens.metrics.chance import SEED, Chance, Floats, Ints, of_draws

DRAWS = 199
"""Permutations of the sequences: beyond all of them is beyond 0.5 %, on either side."""
FEWEST = 6
"""Sequences that a permutation needs: five have only 120 orders."""
RESAMPLES = 999
"""Of the sequences, for an interval."""

_NULL = (
    "about 0: the losses of each sequence beside the choices of another, "
    f"{DRAWS} permutations; not drawn below {FEWEST} sequences"
)
UNDEFINED = {
    "loss_of_dropped": "no token with a loss was dropped, or all were",
    "loss_at_low_margin": "no two margins, of tokens with a loss, that differ enough",
    "loss_of_hottest": "all tokens with a loss chose the most loaded expert, or none did",
    "loss_by_exposure": "fewer than three sequences with losses, or all are exposed alike",
}
"""Why a metric has no value, where what it reads is there."""

_contrast = partial(metric, group="quality", range="any", unit="of the loss", null=_NULL)


def _difference(of_N: NDArray[np.bool_], against_N: NDArray[np.bool_], loss_N: Floats) -> Floats:
    """Weights `[M]` of the tokens with a loss; their sum with it is mean minus mean. NaN: none."""
    known_N = np.isfinite(loss_N)
    of_M, against_M = of_N[known_N], against_N[known_N]
    if not of_M.any() or not against_M.any():
        return np.full(len(of_M), np.nan)
    return np.asarray(of_M / of_M.sum() - against_M / against_M.sum())


def _value(weight_M: Floats, loss_N: Floats) -> float:
    return float(weight_M @ loss_N[np.isfinite(loss_N)]) if len(weight_M) else float("nan")


def _moved(weight_M: Floats, loss_N: Floats, sequence_N: Ints) -> Chance:
    """The chance of a difference, when sequences change places."""
    known_N = np.isfinite(loss_N)
    loss_M, sequence_M = loss_N[known_N], sequence_N[known_N]
    starts_S = np.flatnonzero(np.diff(sequence_M, prepend=sequence_M[:1] - 1))
    if len(starts_S) < FEWEST:
        return Chance(0.0)
    sizes_S = np.diff(starts_S, append=len(loss_M))
    rng = np.random.default_rng(SEED)
    at_M = np.arange(len(loss_M))
    values_R = np.empty(DRAWS)
    for r in range(DRAWS):
        order_S = rng.permutation(len(starts_S))
        sizes, before_S = sizes_S[order_S], starts_S[order_S]
        before_S = before_S - np.cumsum(sizes) + sizes  # what to add to a place for its token
        values_R[r] = weight_M[np.repeat(before_S, sizes) + at_M] @ loss_M
    return of_draws(values_R)


def _dropped(loss_N: Floats, dropped_N: Ints) -> Floats:
    return _difference(dropped_N > 0, dropped_N == 0, loss_N)


@_contrast(
    formula="mean loss of tokens with a dropped choice - mean loss of the others",
    chance=lambda loss_N, dropped_N, sequence_N: _moved(
        _dropped(loss_N, dropped_N), loss_N, sequence_N
    ),
)
def loss_of_dropped(loss_N: Floats, dropped_N: Ints) -> float:
    """What a drop in this layer goes with; above 0, dropped tokens are predicted worse.

    The stored question `quality_of_dropped` compares within tags, over all layers.
    """
    return _value(_dropped(loss_N, dropped_N), loss_N)


def _low_margin(loss_N: Floats, margin_N: Floats) -> Floats:
    known_N = np.isfinite(loss_N) & np.isfinite(margin_N)
    if not known_N.any():
        return np.full(int(np.isfinite(loss_N).sum()), np.nan)
    low, high = np.quantile(margin_N[known_N], [0.25, 0.75])
    if low == high:
        return np.full(int(np.isfinite(loss_N).sum()), np.nan)
    return _difference(margin_N <= low, margin_N >= high, loss_N)


@_contrast(
    formula="mean loss of the quarter of tokens with the smallest margin - mean loss of the "
    "quarter with the largest",
    chance=lambda loss_N, margin_N, sequence_N: _moved(
        _low_margin(loss_N, margin_N), loss_N, sequence_N
    ),
)
def loss_at_low_margin(loss_N: Floats, margin_N: Floats) -> float:
    """Whether tokens that are nearly routed elsewhere are the hard ones.

    The margin is that of the score that decides, k-th minus next.
    """
    return _value(_low_margin(loss_N, margin_N), loss_N)


def _hottest(loss_N: Floats, ids_NK: Ints, counts_E: Ints) -> Floats:
    on_N = (ids_NK == int(np.argmax(counts_E))).any(1)
    return _difference(on_N, ~on_N, loss_N)


@_contrast(
    formula="mean loss of tokens that choose the layer's most loaded expert - that of the others",
    chance=lambda loss_N, ids_NK, counts_E, sequence_N: _moved(
        _hottest(loss_N, ids_NK, counts_E), loss_N, sequence_N
    ),
)
def loss_of_hottest(loss_N: Floats, ids_NK: Ints, counts_E: Ints) -> float:
    """Whether the expert that most tokens choose serves them worse, or better, than the others."""
    return _value(_hottest(loss_N, ids_NK, counts_E), loss_N)


def _exposure(
    loss_N: Floats, ids_NK: Ints, counts_E: Ints, sequence_N: Ints
) -> tuple[Floats, Floats]:
    """Of each sequence with a loss: its exposure, and its mean loss.

    Exposure is the share of its choices on the hottest expert, in standard deviations from the
    mean over sequences.
    """
    _, at_N = np.unique(sequence_N, return_inverse=True)
    known_N = np.isfinite(loss_N)
    losses_S = np.bincount(at_N[known_N], minlength=int(at_N.max(initial=-1)) + 1)
    sums_S = np.bincount(at_N[known_N], loss_N[known_N], len(losses_S))
    hot_S = np.bincount(at_N, (ids_NK == int(np.argmax(counts_E))).sum(1), len(losses_S))
    choices_S = np.bincount(at_N, (ids_NK >= 0).sum(1), len(losses_S))
    usable_S = (losses_S > 0) & (choices_S > 0)
    share_S = hot_S[usable_S] / choices_S[usable_S]
    loss_S = sums_S[usable_S] / losses_S[usable_S]
    if len(share_S) < 3 or np.ptp(share_S) < 1e-12:
        return np.full(len(share_S), np.nan), loss_S
    return np.asarray((share_S - share_S.mean()) / share_S.std()), loss_S


def _exposure_by_chance(loss_N: Floats, ids_NK: Ints, counts_E: Ints, sequence_N: Ints) -> Chance:
    share_S, loss_S = _exposure(loss_N, ids_NK, counts_E, sequence_N)
    if len(share_S) < FEWEST:
        return Chance(0.0)
    moved_RS = np.random.default_rng(SEED).permuted(np.tile(loss_S, (DRAWS, 1)), axis=1)
    return of_draws(moved_RS @ share_S / len(share_S))


@_contrast(
    formula="slope of a sequence's mean loss on its share of choices of the most loaded expert, "
    "times the standard deviation of that share",
    chance=_exposure_by_chance,
)
def loss_by_exposure(loss_N: Floats, ids_NK: Ints, counts_E: Ints, sequence_N: Ints) -> float:
    """What one standard deviation more of exposure to the hottest expert goes with.

    A sequence (a request) counts once, however long.
    """
    share_S, loss_S = _exposure(loss_N, ids_NK, counts_E, sequence_N)
    return float(share_S @ loss_S / len(share_S)) if len(share_S) else float("nan")


def slices(loss_N: ArrayLike, slice_N: ArrayLike, sequence_N: ArrayLike) -> pd.DataFrame:
    """Loss of each slice of the tokens, with an interval that knows of sequences.

    Args:
        loss_N: Losses; NaN: the token has none, and is left out.
        slice_N: Any label: a tag, whether a choice was dropped, a bin of the margin.
        sequence_N: Which sequence (request) a token belongs to.

    Returns:
        `slice`, `tokens`, `sequences` (that have a token in it), `loss` (mean over tokens), `low`
        and `high` (95 % of its bootstrap over sequences; NaN below two sequences), `sequence_loss`
        (mean over sequences of their mean: a request counts once, however long), `perplexity`
        (exp of `loss`, which has to be in nats).

    Raises:
        ValueError: The three have not one length.
    """
    loss_N, slice_N = np.asarray(loss_N, float), np.asarray(slice_N)
    sequence_N = np.asarray(sequence_N)
    if not loss_N.shape == slice_N.shape == sequence_N.shape or loss_N.ndim != 1:
        raise ValueError(
            "loss_N, slice_N and sequence_N have a value for each token; got shapes "
            f"{loss_N.shape}, {slice_N.shape} and {sequence_N.shape}"
        )
    known_N = np.isfinite(loss_N)
    names_D, slice_M = np.unique(slice_N[known_N], return_inverse=True)
    names_S, sequence_M = np.unique(sequence_N[known_N], return_inverse=True)
    shape = len(names_S), len(names_D)
    at_M = sequence_M * shape[1] + slice_M
    tokens_SD = np.bincount(at_M, minlength=shape[0] * shape[1]).reshape(shape)
    sums_SD = np.bincount(at_M, loss_N[known_N], shape[0] * shape[1]).reshape(shape).astype(float)
    loss_D = sums_SD.sum(0) / tokens_SD.sum(0)
    low_D, high_D = _resampled(sums_SD, tokens_SD)
    there_SD = tokens_SD > 0
    mean_SD = np.divide(sums_SD, tokens_SD, out=np.zeros(shape), where=there_SD)
    return pd.DataFrame(
        {
            "slice": names_D,
            "tokens": tokens_SD.sum(0),
            "sequences": there_SD.sum(0),
            "loss": loss_D,
            "low": low_D,
            "high": high_D,
            "sequence_loss": mean_SD.sum(0) / there_SD.sum(0),
            "perplexity": np.exp(loss_D),
        }
    )


def _resampled(sums_SD: Floats, tokens_SD: NDArray[Any]) -> tuple[Floats, Floats]:
    """2.5 and 97.5 % of the losses when as many sequences are drawn with replacement."""
    sequences, slices = tokens_SD.shape
    low_D, high_D = np.full((2, slices), np.nan)
    if sequences < 2:
        return low_D, high_D
    rng = np.random.default_rng(SEED)
    drawn_RS = rng.multinomial(sequences, np.full(sequences, 1 / sequences), RESAMPLES)
    with np.errstate(invalid="ignore"):  # a draw without a token of the slice: NaN, left out
        loss_RD = (drawn_RS @ sums_SD) / (drawn_RS @ tokens_SD)
    several_D = (tokens_SD > 0).sum(0) > 1
    if several_D.any():
        low_D[several_D], high_D[several_D] = np.nanquantile(
            loss_RD[:, several_D], [0.025, 0.975], axis=0
        )
    return low_D, high_D


def bins(values_N: ArrayLike, count: int = 10) -> Ints:
    """Bin of each value, `[N]`, 0 the lowest, with as many values in each as ties allow; NaN: -1.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count={count} must be 1 or more")
    values_N = np.asarray(values_N, float)
    known_N = ~np.isnan(values_N)
    out_N = np.full(len(values_N), -1, np.int64)
    if known_N.any():
        edges = np.quantile(values_N[known_N], np.arange(1, count) / count)
        out_N[known_N] = np.searchsorted(edges, values_N[known_N], side="left")
    return out_N


def decompose(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Why the mean loss changed: slices got better or worse, or the mix of slices changed.

    The change is the sum of all `quality` and `mix`, exactly: with shares w and losses l of slice
    D, quality is w̄ Δl and mix is l̄ Δw, the bars means of before and after (so that nothing is left
    over, and which run comes first only turns the signs). l̄ is taken from the overall loss, which
    changes no sum, since shares sum to 1, and makes the mix of a slice read as it should: more of
    an easy one lowers the loss. A slice that is in one of the two only counts as mix.

    Args:
        before: `slice`, `tokens`, `loss`, as `slices` gives; of a stored question, `tag` and
            `loss_tokens` renamed.
        after: The same of another run, phase or time.

    Returns:
        `slice`, `share_before`, `share_after`, `loss_before`, `loss_after`, `quality`, `mix`.

    Raises:
        ValueError: A column is missing, a slice stands twice, or there is no token.
    """
    one, two = (_weighed(table, name) for table, name in ((before, "before"), (after, "after")))
    rows = one.add_suffix("_before").join(two.add_suffix("_after"), how="outer").sort_index()
    share = rows[["share_before", "share_after"]].fillna(0.0)
    loss = rows[["loss_before", "loss_after"]]
    overall = sum((share[f"share_{x}"] * loss[f"loss_{x}"]).sum() for x in ("before", "after")) / 2
    quality = share.mean(axis=1) * (loss["loss_after"] - loss["loss_before"])
    mix = (loss.mean(axis=1) - overall) * (share["share_after"] - share["share_before"])
    parts = {"quality": quality.fillna(0.0), "mix": mix + 0.0}  # no -0.0
    return share.join(loss).assign(**parts).rename_axis("slice").reset_index()


def _weighed(table: pd.DataFrame, name: str) -> pd.DataFrame:
    missing = {"slice", "tokens", "loss"} - set(table.columns)
    if missing:
        raise ValueError(
            f"{name} has no column {', '.join(sorted(missing))}; it has "
            f"{', '.join(map(str, table.columns))}"
        )
    used = table[table["tokens"].fillna(0) > 0].dropna(subset=["loss"])
    if used.empty:
        raise ValueError(f"{name} has no slice with a token and a loss")
    if used["slice"].duplicated().any():
        twice = used["slice"][used["slice"].duplicated()].iloc[0]
        raise ValueError(f"{name} has slice {twice!r} twice: sum its tokens first")
    tokens: Any = used["tokens"].astype(float)
    return pd.DataFrame(
        {"share": (tokens / tokens.sum()).to_numpy(), "loss": used["loss"].to_numpy(float)},
        index=pd.Index(used["slice"], name="slice"),
    )
