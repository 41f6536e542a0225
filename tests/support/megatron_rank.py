"""One rank of a MoE layer whose experts are spread over ranks: `… WORLD FOLDER RANK`.

For each POLICY (none, probs, position), records its tokens as its own rank into FOLDER/POLICY, and
writes into FOLDER/POLICYRANK.npz what the layer says of itself: `weights` [T, E], from experts that
answer with their number, and `changed` [T, E], from zeroing one expert after the other on the rank
that holds it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import support.megatron_on_cpu as megatron
import torch
from support.probe import sorted_rows
from torch import nn

import moe_lens

S, B = 24, 2
D, E = megatron.D, megatron.E


class OneHots(nn.Module):
    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, rows, counts, probs):
        return sorted_rows(rows, counts, self.first) * probs.unsqueeze(-1), None


def record(world: int, policy: str, folder: Path, rank: int) -> None:
    drops = {"moe_expert_capacity_factor": 0.8, "moe_token_drop_policy": policy}
    block = megatron.layer(world, **({} if policy == "none" else drops))
    torch.manual_seed(10 + rank)
    x = torch.randn(S, B, D)
    how = {"weights": "exact", "layout": "sb", "coordinates": {"ep": rank}}
    with torch.no_grad(), moe_lens.record(block, folder / policy, tokens=1.0, **how) as rec:
        with rec.step("all"):
            whole = block(x)[0]
    first, local = rank * E // world, E // world
    changed = np.zeros((S * B, E), bool)
    with torch.no_grad():
        for e in range(E):
            mine = first <= e < first + local
            if mine:
                w = block.experts.local_experts[e - first].linear_fc2.weight
                kept = w.clone()
                w.zero_()
            changed[:, e] = (block(x)[0] != whole).any(-1).reshape(-1)
            if mine:
                w.copy_(kept)
        block.experts = OneHots(first)
        weights = block(x)[0].reshape(S * B, D)[:, :E]
    np.savez(folder / f"{policy}{rank}.npz", weights=weights.numpy(), changed=changed)


if __name__ == "__main__":
    world, folder, rank = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    megatron.join(rank, world, str(folder / "store"))
    for policy in ("none", "probs", "position"):
        record(world, policy, folder, rank)
    torch.distributed.destroy_process_group()
