"""Where does chance come from? One generator for each use, of the seed and the use alone.

So a run's numbers do not depend on which others ran before it, or beside it, or before a pause.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_USES = ("teacher", "student", "train", "fit", "test", "routing", "regions", "random router")


def generator(seed: int, use: str, *numbers: int) -> torch.Generator:
    """A generator on the CPU for one use, of one layer where `numbers` say which."""
    return torch.Generator().manual_seed(_word(seed, use, *numbers))


def numpy_generator(seed: int, use: str, *numbers: int) -> np.random.Generator:
    """The same for numpy."""
    return np.random.default_rng(_word(seed, use, *numbers))


def inputs(tokens: int, hidden: int, drawn: torch.Generator, device: str) -> Tensor:
    """x_TD ~ N(0, I)."""
    return torch.randn(tokens, hidden, generator=drawn, device=drawn.device).to(device)


def _word(seed: int, use: str, *numbers: int) -> int:
    entropy = [seed, _USES.index(use), *numbers]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
