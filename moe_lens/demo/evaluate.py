"""How well is held-out text predicted, in bits per byte, by the model and by byte counts?

Both score the same bytes with the same bytes before them: windows of the held-out text, in which
the first byte is given and every other is predicted from those before it in its window. Both
learned from the same text, the whole training text of all domains, and are not told the domain.
(The model draws its windows equally from the domains, and in two minutes sees a part of the text;
the counts are of all of it.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from moe_lens.demo.baseline import NgramModel
from moe_lens.demo.batches import as_tokens, held_out_windows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_lens.demo.corpus import Domain
    from moe_lens.demo.model import MoELanguageModel
    from moe_lens.demo.recorder import Recorder

WINDOWS = 320
_FORWARD = 32


def evaluate(
    model: MoELanguageModel,
    corpus: Sequence[Domain],
    recorder: Recorder,
    *,
    length: int,
    windows: int = WINDOWS,
) -> dict[str, float]:
    """Bits per byte of the model by domain, without dropping, recorded as phase "eval"."""
    model.eval()
    bits = {}
    with torch.no_grad():
        for domain in corpus:
            rows = held_out_windows(domain, windows, length)
            total = 0.0
            for first in range(0, len(rows), _FORWARD):
                bytes_BS1 = as_tokens(rows[first : first + _FORWARD])
                tags = [domain.tag] * len(bytes_BS1)
                with recorder.step(tags=tags, phase="eval"):
                    loss_BS = model(bytes_BS1[:, :-1], bytes_BS1[:, 1:]).loss_BS
                    recorder.loss(loss_BS)
                total += loss_BS.double().sum().item()
            bits[domain.tag] = total / rows[:, 1:].size / math.log(2)
    return bits


def evaluate_baseline(
    corpus: Sequence[Domain], *, order: int, length: int, windows: int = WINDOWS
) -> dict[str, float]:
    """Bits per byte by domain of one byte-count model of all training text."""
    counts = NgramModel(order, [domain.train for domain in corpus])
    return {domain.tag: _bits(counts, domain, length, windows) for domain in corpus}


def evaluate_baseline_told(
    corpus: Sequence[Domain], *, order: int, length: int, windows: int = WINDOWS
) -> dict[str, float]:
    """The same of byte-count models that are told the domain: one fitted on each."""
    return {
        domain.tag: _bits(NgramModel(order, [domain.train]), domain, length, windows)
        for domain in corpus
    }


def _bits(counts: NgramModel, domain: Domain, length: int, windows: int) -> float:
    """Mean over the bytes that the language model scores: all but the first of each window."""
    return float(counts.bits(held_out_windows(domain, windows, length))[:, 1:].mean())
