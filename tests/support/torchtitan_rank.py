"""One rank of a torchtitan MoE layer whose experts are spread over ranks: `… WORLD FOLDER RANK`.

Records its tokens as its own rank into FOLDER/run, and writes into FOLDER/rankRANK.npz the weights
[T, E] that the layer says it combined, from experts that answer with their number.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from support.probe import sorted_rows
from support.torchtitan_moe import D, E, make
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

import moe_lens

B, L = 2, 24


class OneHots(nn.Module):
    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, rows, counts):
        return sorted_rows(rows, counts, self.first)


world, folder, rank = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
store = f"file://{folder / 'store'}"
torch.distributed.init_process_group("gloo", store, rank=rank, world_size=world)
set_spmd_backend("full_dtensor")  # without its trainer there is no mesh of spmd_types
block = make("softmax normalised", dispatcher=AllToAllTokenDispatcher, local_experts=E // world)
block.routed_experts.token_dispatcher.wire_meshes(ep_mesh=init_device_mesh("cpu", (world,)))
torch.manual_seed(10 + rank)
x = torch.randn(B, L, D)
with torch.no_grad():
    with moe_lens.record(block, folder / "run", tokens=1.0, weights="exact") as rec, rec.step():
        block(x)
    block.routed_experts.inner_experts = OneHots(rank * E // world)
    weights = block(x).reshape(B * L, D)[:, :E]
np.savez(folder / f"rank{rank}.npz", weights=weights.numpy())
torch.distributed.destroy_process_group()
