"""In which pieces does the model see the text? Windows of S + 1 bytes, whose last S are targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moe_lens.demo.corpus import Domain


def training_batch(
    corpus: Sequence[Domain], sequences: int, length: int, rng: np.random.Generator
) -> tuple[torch.Tensor, list[str]]:
    """Draw windows from the training text, from all domains in turn.

    Args:
        corpus: The domains; each has more than ``length`` bytes.
        sequences: B; each domain gets its equal share of them.
        length: S.
        rng: What the windows' places are drawn from.

    Returns:
        int64 bytes [B, S + 1], and the domain of each row. The rows are in random order: an expert
        that is full drops the last tokens of a batch, which must not be those of one domain.
    """
    windows, tags = [], []
    for row in rng.permutation(sequences):
        domain = corpus[row % len(corpus)]
        start = rng.integers(len(domain.train) - length)
        windows.append(domain.train[start : start + length + 1])
        tags.append(domain.tag)
    return as_tokens(np.stack(windows)), tags


def held_out_windows(domain: Domain, count: int, length: int) -> NDArray[np.uint8]:
    """At most ``count`` windows [N, length + 1], spread evenly over the held-out text.

    They are the same in every run. Fewer come back where ``count`` would overlap.
    """
    text = domain.held_out
    count = min(count, len(text) // (length + 1))
    starts = np.linspace(0, len(text) - length - 1, count).astype(np.int64)
    windows: NDArray[np.uint8] = text[starts[:, None] + np.arange(length + 1)]
    return windows


def held_out_batch(corpus: Sequence[Domain], windows: int, length: int) -> dict[str, Any]:
    """Windows of the held-out text of all domains, at most so many of each, as the model's call.

    Returns:
        input_ids and targets_BS, int64 [B, S]; tags: the domain of each row.
    """
    rows = [(domain.tag, held_out_windows(domain, windows, length)) for domain in corpus]
    bytes_BS1 = torch.cat([as_tokens(of) for _, of in rows])
    return {
        "input_ids": bytes_BS1[:, :-1].contiguous(),
        "targets_BS": bytes_BS1[:, 1:].contiguous(),
        "tags": [tag for tag, of in rows for _ in of],
    }


def as_tokens(windows: NDArray[np.uint8]) -> torch.Tensor:
    """Bytes as the int64 tokens that an embedding takes."""
    return torch.from_numpy(windows.astype(np.int64))
