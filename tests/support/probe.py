"""What a block really ran, told by experts that answer with their own number.

Put in the place of a block's experts, `one_hot` rows make the block's output, `[T, D]` with D >= E,
the matrix of the weights that its experts were combined with: column e is the weight of expert e,
zero where e did not compute the token. It comes out of the library's own dispatch, exchange and
combine, and knows nothing of hooks.

Legend: T tokens, E experts, D hidden, K choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from support.tables import read


def one_hot(expert: int, rows: torch.Tensor) -> torch.Tensor:
    """What expert `expert` answers to its rows `[..., D]`."""
    out = torch.zeros_like(rows)
    out[..., expert] = 1
    return out


def sorted_rows(rows_RD: torch.Tensor, counts_E: torch.Tensor, first: int = 0) -> torch.Tensor:
    """The same for rows of all experts, sorted by expert, `counts_E` of each from `first` on."""
    experts = torch.arange(len(counts_E)).repeat_interleave(counts_E.long().cpu()) + first
    out = torch.zeros_like(rows_RD)
    out[torch.arange(len(experts)), experts] = 1
    return out


@dataclass
class Captured:
    """Per-token rows of one layer, token by token."""

    ids: list[list[int]]
    weights: list[list[float]]
    dropped: list[list[int]]
    """Slots that nothing computed."""

    def executed(self, experts: int) -> NDArray[np.float32]:
        """Weights by (token, expert), of the slots that were computed; NaN where none was."""
        out = np.full((len(self.ids), experts), np.nan, np.float32)
        for t, (ids, weights, dropped) in enumerate(
            zip(self.ids, self.weights, self.dropped, strict=True)
        ):
            for slot, (e, w) in enumerate(zip(ids, weights, strict=True)):
                if slot in dropped:
                    assert w == 0, f"token {t} was dropped by expert {e}, but weighs {w}"
                else:
                    assert np.isnan(out[t, e]), f"token {t} has expert {e} twice"
                    out[t, e] = w
        return out


def captured(run: Path, layer: int = 0) -> Captured:
    rows = read(run, "routing").to_pandas()
    rows = rows[rows.layer == layer].sort_values(["step", "forward", "token"])
    dropped = [[] if d is None else list(d) for d in rows.dropped]
    return Captured(
        [list(map(int, x)) for x in rows.expert_ids], [list(x) for x in rows.weights], dropped
    )


def assert_equal(got: Captured, out: torch.Tensor, experts: int) -> NDArray[np.bool_]:
    """The captured ids and weights are those that the probe says were executed.

    Returns:
        Which experts computed which tokens, `[T, E]`.
    """
    want = out.detach().float().reshape(-1, out.shape[-1])[:, :experts].numpy()
    mine = got.executed(experts)
    ran = ~np.isnan(mine)
    assert (ran == (want != 0)).all()
    np.testing.assert_allclose(mine[ran], want[ran], rtol=1e-6)
    return ran


def first_come(got: Captured, capacity: int, group: int, slot_by_slot: bool) -> list[list[int]]:
    """Slots that a naive count finds no room for: who comes first is served.

    Args:
        capacity: Of an expert in a group.
        group: Tokens in a row that share it.
        slot_by_slot: All first choices come before all second ones.
    """
    out: list[list[int]] = [[] for _ in got.ids]
    for start in range(0, len(got.ids), group):
        tokens = range(start, start + group)
        slots = range(max(len(got.ids[t]) for t in tokens))
        order = [(t, s) for s in slots for t in tokens if s < len(got.ids[t])]
        if not slot_by_slot:
            order.sort()
        taken: dict[int, int] = {}
        for t, s in order:
            e = got.ids[t][s]
            if taken.get(e, 0) >= capacity:
                out[t].append(s)
            else:
                taken[e] = taken.get(e, 0) + 1
    return out
