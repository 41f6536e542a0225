"""Pairs of experts that one token chose, and what the experts' loads alone make of their number.

The null keeps what a layer's load says: each expert is chosen as often, each token chooses as many.
All tables of choices with these margins are alike; a token's set S then has a probability in
proportion to the product of w_i over S, with weights that give each expert its count (conditional
Poisson sampling: Chen, Dempster and Liu, "Weighted finite population sampling to maximize entropy",
Biometrika 81, 1994). Its second moments are closed forms, at no cost that grows with the tokens;
shuffling the tokens' choices a few hundred times gives the same numbers for a thousandfold of it.

Legend: N tokens, K choices of a token, E experts, A those that some tokens chose and others did
not, P unordered pairs i < j of E (in the order of `numpy.triu_indices`), R draws, D degrees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from moe_lens.metrics.chance import FORWARD_DRAWS, SEED, Floats, Ints

_ROUNDS, _CLOSE, _NOTHING = 200, 1e-10, 1e-8
_FITS, _CLOSE_VARIANCE = 8, 1e-3


def pair_counts(ids_NK: Ints, experts: int) -> Ints:
    """`[E, E]`: tokens that chose both; of an expert with itself, tokens that chose it.

    Args:
        ids_NK: Choices; -1: a token chose fewer.
        experts: E.
    """
    ids = np.where(ids_NK < 0, experts, ids_NK)  # a column and a row that are cut off
    cells = ids[:, :, None] * (experts + 1) + ids[:, None, :]
    counts = np.bincount(cells.ravel(), minlength=(experts + 1) ** 2)
    return np.asarray(counts.reshape(experts + 1, experts + 1)[:experts, :experts], np.int64)


@dataclass(frozen=True)
class Pairs:
    """The pairs of a layer, and their null.

    Attributes:
        ids_NK: Choices; -1: a token chose fewer.
        experts: E.
    """

    ids_NK: Ints
    experts: int

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.ids_NK)

    @cached_property
    def counts_EE(self) -> Ints:
        """Tokens that chose both."""
        return pair_counts(self.ids_NK, self.experts)

    @property
    def chosen_E(self) -> Ints:
        """n_i: tokens that chose the expert."""
        return np.diag(self.counts_EE)

    @property
    def places_P(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Each pair's i and j."""
        return np.triu_indices(self.experts, 1)

    @property
    def together_P(self) -> Ints:
        """N_ij."""
        return np.asarray(self.counts_EE[self.places_P])

    @cached_property
    def _active(self) -> NDArray[np.bool_]:
        """Experts of which the margins leave anything open."""
        some = int((self.ids_NK >= 0).any(1).sum())
        return np.asarray((self.chosen_E > 0) & (self.chosen_E < some))

    @cached_property
    def expected_EE(self) -> Floats:
        """Mean of N_ij under the null; on the diagonal n_i."""
        n_E, on_E = self.chosen_E.astype(float), self._active
        sizes_N = np.append(on_E, False)[self.ids_NK].sum(1)  # -1 is the last: none
        tokens = int((self.ids_NK >= 0).any(1).sum())
        out_EE = np.outer(n_E, n_E) / max(tokens, 1)
        if on_E.any():
            share_D = np.bincount(sizes_N[(self.ids_NK >= 0).any(1)]) / tokens
            out_EE[np.ix_(on_E, on_E)] = tokens * both(n_E[on_E] / tokens, share_D)
        np.fill_diagonal(out_EE, n_E)
        return out_EE

    @cached_property
    def variance_EE(self) -> Floats:
        """Variance of N_ij: what is left of it once n_i and n_j are known; 0 on the diagonal.

        Exact for equal loads and many tokens; the other experts' counts add little to it.
        """
        tokens = max(int((self.ids_NK >= 0).any(1).sum()), 1)
        p_EE, p_E = self.expected_EE / tokens, self.chosen_E / tokens
        v_E = p_E * (1 - p_E)
        c_EE = p_EE - np.outer(p_E, p_E)
        # Of the product with each of the two, and of the two with each other.
        a_EE = p_EE * (1 - p_E)[:, None]
        b_EE = a_EE.T
        vv_EE = np.outer(v_E, v_E)
        known = a_EE**2 * v_E[None, :] + b_EE**2 * v_E[:, None] - 2 * a_EE * b_EE * c_EE
        free = vv_EE - c_EE**2
        known = np.divide(known, free, out=np.zeros_like(free), where=free > 1e-12)
        out_EE = tokens * (p_EE * (1 - p_EE) - known)
        out_EE[out_EE < _NOTHING * tokens] = 0.0  # the margins decide, up to arithmetic
        out_EE[~np.outer(self._active, self._active)] = 0.0
        np.fill_diagonal(out_EE, 0.0)
        return out_EE

    @cached_property
    def z_EE(self) -> Floats:
        """Standard deviations from what the loads make; NaN where they leave nothing open."""
        sd_EE = np.sqrt(self.variance_EE)
        far = self.counts_EE - self.expected_EE
        return np.divide(far, sd_EE, out=np.full_like(far, np.nan), where=sd_EE > 0)

    @cached_property
    def draws_RP(self) -> NDArray[np.float32]:
        """Draws of N_ij, normal with the skew of counts; each keeps every sum of N_ij over j."""
        i_P, j_P = self.places_P
        if not len(i_P):
            return np.empty((FORWARD_DRAWS, 0), np.float32)
        free_EE, inverse_EE = _free(self.variance_EE)
        mean_P, goal_P, free_P = (
            x_EE[i_P, j_P] for x_EE in (self.expected_EE, self.variance_EE, free_EE)
        )
        # (1 - 2 q) / sd, of a binomial count: its variance is (1 - q) of its mean.
        skew_P = (2 * goal_P - mean_P) / np.maximum(mean_P * np.sqrt(goal_P), 1.0)
        normal_RP, bent_RP = _normals(len(i_P))
        sd_P = np.sqrt(free_P)
        far_RP = normal_RP * sd_P.astype(np.float32)
        far_RP += bent_RP * (sd_P * skew_P / 6).astype(np.float32)
        number_EE = np.zeros(free_EE.shape, np.int64)
        number_EE[i_P, j_P] = number_EE[j_P, i_P] = np.arange(len(i_P))
        own_E = far_RP[:, 0]  # on the diagonal stands pair 0, which is taken off again
        sums_RE = np.stack([far_P.take(number_EE).sum(1) for far_P in far_RP]) - own_E[:, None]
        back_RE = (sums_RE @ inverse_EE).astype(np.float32)
        back_RP = back_RE.take(i_P, axis=1)
        back_RP += back_RE.take(j_P, axis=1)
        back_RP *= free_P.astype(np.float32)
        far_RP -= back_RP
        far_RP += mean_P.astype(np.float32)
        return far_RP


@lru_cache(maxsize=2)
def _normals(pairs: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Normal numbers, `[R, P]`, and x^2 - 1 of them; the layers of a model have them in common."""
    rng = np.random.default_rng(SEED)
    normal_RP = rng.standard_normal((FORWARD_DRAWS, pairs), np.float32)
    bent_RP = normal_RP**2 - 1
    normal_RP.flags.writeable = bent_RP.flags.writeable = False
    return normal_RP, bent_RP


def _free(goal_EE: Floats) -> tuple[Floats, Floats]:
    """Variances of independent numbers that have these once the sums of their rows are fixed.

    Returns:
        These, `[E, E]`; and the inverse of the covariance of the sums.
    """
    free_EE = goal_EE.copy()
    inverse_EE = _inverse(free_EE)
    for _ in range(_FITS):
        own_E = np.diag(inverse_EE)
        left_EE = free_EE - free_EE**2 * (own_E[:, None] + own_E + 2 * inverse_EE)
        short_EE = np.divide(goal_EE, left_EE, out=np.ones_like(goal_EE), where=left_EE > 1e-9)
        if np.abs(short_EE - 1).max(initial=0.0) < _CLOSE_VARIANCE:
            break
        free_EE *= short_EE
        inverse_EE = _inverse(free_EE)
    return free_EE, inverse_EE


def _inverse(free_EE: Floats) -> Floats:
    sums_E = free_EE.sum(1)
    # A hair on the diagonal, for experts that nobody or everybody chose.
    hair = 1e-6 * sums_E.mean() or 1.0
    return np.asarray(np.linalg.inv(np.diag(sums_E + hair) + free_EE))


def both(share_A: Floats, share_D: Floats) -> Floats:
    """P(a token chooses i and j), `[A, A]`, if it knows nothing but the experts' shares.

    Args:
        share_A: P(i), between 0 and 1, neither of them.
        share_D: Share of tokens that make 0, 1, 2, … choices among these experts.

    Returns:
        On the diagonal 0.
    """
    w_A = share_A / (1 - share_A)
    for _ in range(_ROUNDS):
        w_A /= np.exp(np.log(w_A).mean())
        before_AD, after_AD, e_D = _polynomials(w_A, len(share_D) - 1)
        alone = after_AD[1:] @ _weights(share_D, e_D, 1)
        found_A = w_A * (before_AD[:-1] * alone).sum(1)
        if np.abs(found_A - share_A).max() < _CLOSE:
            break
        found_A = np.clip(found_A, 1e-12, 1 - 1e-12)
        w_A *= share_A * (1 - found_A) / (found_A * (1 - share_A))
    # Of each i < j the polynomial without both, from what is before i, between, and after j.
    rest_AD = after_AD[1:] @ _weights(share_D, e_D, 2)
    without_AD = before_AD[:-1].copy()
    out_AA = np.zeros((len(w_A), len(w_A)))
    for j, w in enumerate(w_A):
        out_AA[:j, j] = w_A[:j] * w * (without_AD[:j] @ rest_AD[j])
        without_AD[:j, 1:] += w * without_AD[:j, :-1]
    return out_AA + out_AA.T


def _polynomials(w_A: Floats, degree: int) -> tuple[Floats, Floats, Floats]:
    """Coefficients of prod (1 + w x) before each expert, from it on, and of all."""
    size = len(w_A)
    before, after = np.zeros((2, size + 1, degree + 1))
    before[0, 0] = after[size, 0] = 1.0
    for a in range(size):
        before[a + 1] = before[a]
        before[a + 1, 1:] += w_A[a] * before[a, :-1]
        b = size - 1 - a
        after[b] = after[b + 1]
        after[b, 1:] += w_A[b] * after[b + 1, :-1]
    return before, after, before[size]


def _weights(share_D: Floats, e_D: Floats, fixed: int) -> Floats:
    """`[D, D]`: share of the size a + b + fixed over its elementary symmetric polynomial."""
    each_D = np.divide(share_D, e_D, out=np.zeros_like(e_D), where=e_D > 0)
    padded = np.append(each_D, np.zeros(len(each_D) + fixed))
    a_D = np.arange(len(each_D))
    return np.asarray(padded[a_D[:, None] + a_D[None, :] + fixed])
