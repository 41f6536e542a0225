"""What ranks have to do under a placement, forward by forward, and how far that is from even.

All ranks wait for the slowest in every layer, so it is the maximum in each layer of each forward
that counts, never that of totals. Everything here follows from counts: how many rows each expert
computed. Replicas of an expert take its rows in turn (`plan.slots_of`).

F forwards, L layers, E experts, P slots, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ReplayError
from moe_lens.replay.placement.counts import Counts
from moe_lens.replay.placement.plan import Placement, replica_of


def rank_rows(counts: Counts, placement: Placement) -> NDArray[np.int64]:
    """Rows that each rank computes [F, L, R], to the row.

    Raises:
        ReplayError: The placement is of other layers, or of another number of experts.
    """
    forwards, layers, _ = counts.rows_FLE.shape
    rows_FLR = np.empty((forwards, layers, placement.ranks), np.int64)
    for i, layer in enumerate(counts.layers):
        slots_P = placement.of_layer(layer, counts.experts)
        replica_P, count_E = replica_of(slots_P, counts.experts)
        rows_FP = counts.rows_FLE[:, i, slots_P].astype(np.int64)
        if len(slots_P) > counts.experts:
            count_P = count_E[slots_P]
            rows_FP = (rows_FP + (count_P - 1 - replica_P)) // count_P
        rows_FLR[:, i] = rows_FP.reshape(forwards, placement.ranks, -1).sum(2)
    return rows_FLR


@dataclass(frozen=True)
class Balance:
    """How even a placement is, over layers and forwards in which anything was computed.

    mean and max are those over the ranks, in one layer of one forward.

    Attributes:
        forwards: In which anything was computed.
        mean_over_max: Mean of mean / max: utilisation, as SGLang shows it. 1: even.
        max_over_mean: Mean of max / mean. 1: even; R: one rank does everything.
        excess: Mean of (max - mean) / mean, TensorRT-LLM's imbalance ratio. 0: even.
        summed: Mean over forwards of the sum over layers of mean, divided by that of max: vLLM's
            balancedness. 1: even; layers weigh by their rows.
        critical: Sum of max over sum of mean, over everything: the work of the slowest ranks beside
            an even share.
        slowest_p50, slowest_p95, slowest_p99: Share of a forward's rows that its slowest ranks have
            (in each layer the slowest), percentiles over forwards. 1 / R: even.
        by_layer: max / mean of each layer, mean over forwards; NaN where nothing was computed.
        by_chance: max_over_mean of a fair router, from sampling alone; NaN where top-k is unknown.
        hottest: Share of the forwards in which the slowest rank of a layer was the one that it
            most often is, mean over layers: 1 if it is always the same rank; by chance a little
            above 1 / R over many forwards, and 1 over a single one.
    """

    forwards: int
    mean_over_max: float
    max_over_mean: float
    excess: float
    summed: float
    critical: float
    slowest_p50: float
    slowest_p95: float
    slowest_p99: float
    by_layer: list[float]
    by_chance: float
    hottest: float


def balance_of(rows_FLR: NDArray[np.int64], experts: int = 0, top_k: int | None = None) -> Balance:
    """Judge loads of ranks [F, L, R].

    Args:
        rows_FLR: Rows of each rank.
        experts: E, for what chance gives.
        top_k: Choices of a token, for the same; None: not known.

    Raises:
        ReplayError: All of them are 0.
    """
    most_FL, mean_FL = rows_FLR.max(2).astype(np.float64), rows_FLR.mean(2)
    ran_FL = most_FL > 0
    ran_F = ran_FL.any(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio_FL = np.where(ran_FL, most_FL / mean_FL, np.nan)
    ratios = ratio_FL[ran_FL]
    share_F = most_FL[ran_F].sum(1) / rows_FLR[ran_F].sum((1, 2))
    if not len(share_F):
        raise ReplayError("no expert computed anything: there is nothing to balance.")
    p50, p95, p99 = (float(p) for p in np.percentile(share_F, [50, 95, 99]))
    return Balance(
        forwards=int(ran_F.sum()),
        mean_over_max=float((1 / ratios).mean()),
        max_over_mean=float(ratios.mean()),
        excess=float((ratios - 1).mean()),
        summed=float((mean_FL[ran_F].sum(1) / most_FL[ran_F].sum(1)).mean()),
        critical=float(most_FL.sum() / mean_FL.sum()),
        slowest_p50=p50,
        slowest_p95=p95,
        slowest_p99=p99,
        by_layer=[
            float(of[ran].mean()) if ran.any() else float("nan")
            for of, ran in zip(ratio_FL.T, ran_FL.T, strict=True)
        ],
        by_chance=_by_chance(rows_FLR.sum(2)[ran_FL], rows_FLR.shape[2], experts, top_k),
        hottest=_persistence(rows_FLR, ran_FL),
    )


def _by_chance(rows_N: NDArray[np.int64], ranks: int, experts: int, top_k: int | None) -> float:
    """Expected max / mean of ranks of equally many experts, all of which are chosen alike.

    A token's k distinct choices fall on a rank hypergeometrically; many tokens make that normal.
    """
    if top_k is None or experts < 2:
        return float("nan")
    normals = np.random.default_rng(0).standard_normal((4096, ranks))
    highest = float(normals.max(1).mean())  # expected maximum of R standard normals
    spread_N = np.sqrt((experts - top_k) / (experts - 1) * ranks / rows_N)
    return float(1 + highest * spread_N.mean())


def _persistence(rows_FLR: NDArray[np.int64], ran_FL: NDArray[np.bool_]) -> float:
    ranks = rows_FLR.shape[2]
    shares = []
    for rows_FR, ran_F in zip(rows_FLR.transpose(1, 0, 2), ran_FL.T, strict=True):
        if ran_F.any():
            slowest = np.bincount(rows_FR[ran_F].argmax(1), minlength=ranks)
            shares.append(slowest.max() / ran_F.sum())
    return float(np.mean(shares))
