"""One rank of a megatron-core layer, its all-to-alls clocked: `… WORLD FOLDER RANK`."""

from __future__ import annotations

import sys
from pathlib import Path

import support.megatron_on_cpu as megatron
import torch
from support.exchanged import record

world, folder, rank = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
megatron.join(rank, world, str(folder / "store"))
block = megatron.layer(world)
torch.manual_seed(10 + rank)
x = torch.randn(24, 2, megatron.D, requires_grad=True)
how = {"layout": "sb"}
# two all-to-alls of dispatch: the rows, and their weights
record(
    block, block.router, lambda out: out[1].sum(0), lambda x: block(x)[0], x, 2, folder, rank, **how
)
torch.distributed.destroy_process_group()
