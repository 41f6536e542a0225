"""The byte-count model against one made of dictionaries."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from moe_lens.demo.baseline import NgramModel

TEXT = b"the cat sat on the mat; the dog sat on the log. " * 40


def as_bytes(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8)


def naive_probability(model: NgramModel, texts: list[bytes], history: bytes, byte: int) -> float:
    """The recursion of the module's docstring over Counters, with the fitted weights."""
    order = model.order
    probability = 1 / 256
    for n in range(min(order, len(history)) + 1):
        grams = [t[i - n : i + 1] for t in texts for i in range(order, len(t))]
        counts, contexts = Counter(grams), Counter(gram[:-1] for gram in grams)
        context = history[len(history) - n :]
        seen = contexts[context]
        if seen:
            weight = model.weights[n][1 + int(math.log2(seen))]
            ratio = counts[context + bytes([byte])] / seen
            probability = weight * ratio + (1 - weight) * probability
    return probability


@pytest.mark.parametrize("order", [0, 1, 2])
def test_equals_counting_with_dictionaries(order: int) -> None:
    texts = [TEXT, b"0123456789" * 30]
    model = NgramModel(order, [as_bytes(text) for text in texts])
    scored = b"the cog x7"
    bits = model.bits(as_bytes(scored)[None])
    for i in range(len(scored)):
        history = scored[max(0, i - order) : i]
        expected = -math.log2(naive_probability(model, texts, history, scored[i]))
        assert bits[0, i] == pytest.approx(expected)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("history", [b"th", b"t\xff", b"\xff\xfe"])
def test_probabilities_sum_to_one(order: int, history: bytes) -> None:
    model = NgramModel(order, [as_bytes(TEXT)])
    windows = np.array([[*history, byte] for byte in range(256)], dtype=np.uint8)
    assert (2 ** -model.bits(windows)[:, -1]).sum() == pytest.approx(1.0)


def test_fitted_weights_beat_the_weights_they_start_from() -> None:
    rng = np.random.default_rng(0)
    words = [b"router", b"expert", b"token", b"load", b"gate"]
    text = as_bytes(b" ".join(words[i] for i in rng.integers(5, size=60_000)))
    model = NgramModel(2, [text[:250_000]])
    windows = text[None, 260_000:]
    fitted = model.bits(windows).mean()
    model.weights = [np.full_like(weights, 0.5) for weights in model.weights]
    assert fitted < model.bits(windows).mean()


def test_a_higher_order_predicts_real_text_better() -> None:
    text = as_bytes(np.__doc__.encode() * 3)
    half = len(text) // 2
    bits = [NgramModel(n, [text[:half]]).bits(text[None, half:]).mean() for n in (0, 1, 2)]
    assert bits[0] > bits[1] > bits[2]


def test_an_order_it_has_no_memory_for_is_refused() -> None:
    with pytest.raises(ValueError, match="order must be 0, 1 or 2, got 3"):
        NgramModel(3, [as_bytes(TEXT)])
