"""One rank of a megatron-core layer under tensor parallelism: `… WORLD FOLDER RANK`.

Every rank routes the same tokens, records them into FOLDER/EXPERTS, and all but the first say that
theirs are a copy. EXPERTS: `split` (each expert over all ranks), or `spread` (whole experts, by
expert parallelism over the same ranks).
"""

from __future__ import annotations

import sys
from pathlib import Path

import support.megatron_on_cpu as megatron
import torch
from megatron.core import parallel_state

import moe_lens

world, folder, rank = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
store = f"file://{folder / 'store'}"
torch.distributed.init_process_group("gloo", store, rank=rank, world_size=world)
for experts in ("split", "spread"):
    spread = world if experts == "spread" else 1
    parallel_state.initialize_model_parallel(
        world, expert_model_parallel_size=spread, expert_tensor_parallel_size=world // spread
    )
    how = {"tensor_model_parallel_size": world, "expert_tensor_parallel_size": world // spread}
    block = megatron.layer(spread, **how).eval()  # in training Megatron wants sequence parallelism
    torch.manual_seed(10)
    x = torch.randn(24, 2, megatron.D)
    options = {"layout": "sb", "coordinates": {"tp": rank}, "copy": rank > 0, "tokens": 1.0}
    with torch.no_grad(), moe_lens.record(block, folder / experts, **options) as rec:
        for _ in range(2):
            with rec.step("all"):
                block(x)
    parallel_state.destroy_model_parallel()
torch.distributed.destroy_process_group()
