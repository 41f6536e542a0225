"""One rank of a DeepSpeed-MoE layer, its all-to-alls clocked: `… WORLD FOLDER RANK`."""

from __future__ import annotations

import sys
from pathlib import Path

import support.deepspeed_on_cpu as deepspeed_on_cpu
import torch
from support.exchanged import record

world, folder, rank = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
deepspeed_on_cpu.join(str(folder / "store"), rank, world)
layer = deepspeed_on_cpu.layer(k=2, top2_2nd_expert_sampling=False, ep_size=world)
torch.manual_seed(10 + rank)
x = torch.randn(2, 24, deepspeed_on_cpu.D, requires_grad=True)
gate = layer.deepspeed_moe.gate
record(layer, gate, lambda out: out[-1], lambda x: layer(x)[0], x, 1, folder, rank)
torch.distributed.destroy_process_group()
