"""How well does a model of byte counts predict the same text?

An interpolated n-gram model of bytes (Jelinek and Mercer 1980), the yardstick of the demo:

    p_n(b | c) = w_n(c) * count(c b) / count(c) + (1 - w_n(c)) * p_{n-1}(b | c without its oldest)

down to ``p_{-1} = 1/256``. The weight ``w_n(c)`` depends on how often the context ``c`` was seen:
one weight per power of two of ``count(c)``. The weights are fitted by expectation maximisation on
a tenth of the training text, taken in blocks from all over it, with counts from the other nine
tenths; then the counts are taken again from all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_BLOCK_BYTES = 16_384
_EVERY_NTH_BLOCK = 10
_BUCKETS = 40
_EM_ROUNDS = 30


class NgramModel:
    """Interpolated byte model of one order.

    Args:
        order: Number of preceding bytes that it sees, 0 to 2.
        texts: uint8 [bytes] each; the training text. No context reaches from one into the next.
    """

    def __init__(self, order: int, texts: Sequence[NDArray[np.uint8]]) -> None:
        if order not in (0, 1, 2):
            raise ValueError(f"order must be 0, 1 or 2, got {order}")
        self.order = order
        rows = np.concatenate([_ngrams(text, order) for text in texts])
        held_out = np.arange(len(rows)) // _BLOCK_BYTES % _EVERY_NTH_BLOCK == _EVERY_NTH_BLOCK - 1
        self._count(rows[~held_out])
        # A text shorter than ten blocks has no held-out one; its own rows would fit weights that
        # trust the counts blindly, so the weights stay as they start.
        self.weights = [np.full(_BUCKETS, 0.5) for _ in range(order + 1)]
        if held_out.any():
            self._fit_weights(rows[held_out])
        self._count(rows)

    def bits(self, windows_NL: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Bits that each byte costs, given the bytes before it in its window.

        Args:
            windows_NL: uint8 [windows, length].

        Returns:
            float64 [windows, length]; the first ``order`` columns see a shorter context.
        """
        probability_NL = np.empty(windows_NL.shape)
        for column in range(min(self.order, windows_NL.shape[1])):
            probability_NL[:, column] = self._probability(windows_NL[:, : column + 1])
        if windows_NL.shape[1] > self.order:
            rows = np.lib.stride_tricks.sliding_window_view(windows_NL, self.order + 1, axis=1)
            full = self._probability(rows.reshape(-1, self.order + 1))
            probability_NL[:, self.order :] = full.reshape(rows.shape[:2])
        return -np.log2(probability_NL)

    def _count(self, rows: NDArray[np.uint8]) -> None:
        """Count the last n + 1 bytes of each row, and their contexts, for each order n."""
        self.counts, self.contexts = [], []
        for n in range(self.order + 1):
            counts = np.bincount(_code(rows[:, self.order - n :]), minlength=256 ** (n + 1))
            self.counts.append(counts.astype(np.int32))
            self.contexts.append(counts.reshape(-1, 256).sum(axis=1))

    def _fit_weights(self, rows: NDArray[np.uint8]) -> None:
        """Fit one order after the other, each upon the fitted orders below it."""
        for n in range(self.order + 1):
            ratio, bucket = self._ratio(n, rows)
            below = self._probability(rows, n - 1)
            weight = self.weights[n]
            hits = np.bincount(bucket, minlength=_BUCKETS)
            for _ in range(_EM_ROUNDS):
                own = weight[bucket] * ratio
                share = own / (own + (1 - weight[bucket]) * below)
                sums = np.bincount(bucket, weights=share, minlength=_BUCKETS)
                # One pseudo-observation of a half keeps every weight inside (0, 1).
                weight = (sums + 0.5) / (hits + 1)
            # A count that no held-out context reached is trusted as much as the next lower one.
            filled = np.maximum.accumulate(np.where(hits > 0, np.arange(_BUCKETS), 0))
            self.weights[n] = weight[filled]

    def _probability(
        self, rows: NDArray[np.uint8], order: int | None = None
    ) -> NDArray[np.float64]:
        """Probability of each row's last byte given the up to ``order`` bytes before it."""
        order = self.order if order is None else order
        probability = np.full(len(rows), 1 / 256)
        for n in range(min(order, rows.shape[1] - 1) + 1):
            ratio, bucket = self._ratio(n, rows)
            weight = np.where(bucket > 0, self.weights[n][bucket], 0.0)
            probability = weight * ratio + (1 - weight) * probability
        return probability

    def _ratio(
        self, n: int, rows: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Relative frequency of the last byte after its n, and the bucket of their count."""
        code = _code(rows[:, rows.shape[1] - 1 - n :])
        seen = self.contexts[n][code >> 8]
        ratio = self.counts[n][code] / np.maximum(seen, 1)
        # frexp's exponent is 0 for a context never seen, then 1 + floor(log2(count)).
        return ratio, np.frexp(seen)[1].astype(np.int64)


def _ngrams(text: NDArray[np.uint8], order: int) -> NDArray[np.uint8]:
    """[bytes - order, order + 1]: every byte of a text after the ``order`` bytes before it."""
    return np.lib.stride_tricks.sliding_window_view(text, order + 1)


def _code(rows: NDArray[np.uint8]) -> NDArray[np.int64]:
    """One number per row of bytes, the oldest byte in the highest place."""
    code = np.zeros(len(rows), dtype=np.int64)
    for column in rows.T:
        code = (code << 8) | column
    return code
