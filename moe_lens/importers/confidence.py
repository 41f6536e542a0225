"""What a router's logits or distribution say of its confidence, where a format has them.

T tokens, K choices, V outputs of the router, G tags.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.importers.checks import Ids
from moe_lens.importers.source import Choices
from moe_lens.metrics.confidence import probabilities

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Confidence:
    """Numbers of single tokens; None: the format does not tell. NaN: not finite.

    Attributes:
        prob_TV: The router's full distribution.
        entropy_T: Of it, nats.
        top1_T: Its largest.
        zloss_T: Squared logsumexp of the logits.
        margin_T: k-th minus next logit, where every token's choices are its largest logits.
        next_ids_T1: The runner-up, where there is a margin.
    """

    prob_TV: Doubles | None = None
    entropy_T: Doubles | None = None
    top1_T: Doubles | None = None
    zloss_T: Doubles | None = None
    margin_T: Doubles | None = None
    next_ids_T1: Ids | None = None


def confidence(choices: Choices, ids_TK: Ids, score: str | None) -> Confidence:
    """What one layer's pass says.

    Args:
        choices: With logits, a distribution, both or none.
        ids_TK: Their ids.
        score: How logits become probabilities; None: not known, then only what needs no more.
    """
    logits_TV, prob = choices.logits_TE, choices.prob_TE
    zloss_T = margin_T = next_T1 = None
    prob_TV = None if prob is None else prob.astype(np.float64)
    if logits_TV is not None:
        z_TV = logits_TV.astype(np.float64)
        bad_T = np.asarray(~np.isfinite(z_TV).all(1))
        z_TV[bad_T] = 0
        if prob_TV is None and score is not None:
            prob_TV = probabilities(z_TV, score)
            prob_TV[bad_T] = np.nan
        top_T = z_TV.max(1)
        zloss_T = (top_T + np.log(np.exp(z_TV - top_T[:, None]).sum(1))) ** 2
        margin_T, next_T1 = _margin(z_TV, ids_TK, bad_T)
        zloss_T[bad_T] = np.nan
    if prob_TV is None:
        return Confidence(zloss_T=zloss_T, margin_T=margin_T, next_ids_T1=next_T1)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy_T = -np.where(prob_TV > 0, prob_TV * np.log(prob_TV), prob_TV * 0).sum(1)
    return Confidence(prob_TV, entropy_T, prob_TV.max(1), zloss_T, margin_T, next_T1)


def _margin(
    z_TV: Doubles, ids_TK: Ids, bad_T: NDArray[np.bool_]
) -> tuple[Doubles | None, Ids | None]:
    """Only where the logits rank the choices: a bias or groups have another boundary."""
    T, K = ids_TK.shape
    if z_TV.shape[1] <= K or ids_TK.min(initial=0) < 0:
        return None, None
    others_TV = z_TV.copy()
    np.put_along_axis(others_TV, ids_TK.astype(np.int64), -np.inf, axis=1)
    next_T = others_TV.argmax(1)
    last_T = np.take_along_axis(z_TV, ids_TK.astype(np.int64), axis=1).min(1, initial=np.inf)
    margin_T = last_T - others_TV[np.arange(T), next_T]
    if (margin_T[~bad_T] < 0).any():
        return None, None
    margin_T[bad_T] = np.nan
    return margin_T, next_T.astype(np.int32)[:, None]


def sums(x_T: NDArray[Any] | None, tag_T: NDArray[Any], tags: int) -> Doubles | None:
    """Sums over the tokens of each tag, `[G]`, those that are not finite left out; None of None."""
    if x_T is None:
        return None
    return np.bincount(tag_T, np.where(np.isfinite(x_T), x_T, 0), tags).astype(np.float64)
