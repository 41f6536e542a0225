"""DeepSpeed on a CPU, alone: its process group over gloo, without compiling anything.

Only for tests. Without this, DeepSpeed compiles an extension for shared memory when its group
starts; when that is killed, the lock that it leaves makes every later start wait for ever.
"""

from __future__ import annotations

import importlib
import os

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from torch import nn

D, E = 16, 8


def join(store: str, rank: int = 0, world: int = 1) -> None:
    """Start torch.distributed and DeepSpeed's own groups; this process alone, or one of several."""
    # not `import deepspeed.comm.torch as …`, which is the module torch
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


def layer(groups: bool = True, **kw) -> nn.Module:
    """A MoE layer; without its process groups, which `deepspeed.initialize` makes."""
    torch.manual_seed(0)
    expert = nn.Sequential(nn.Linear(D, 32), nn.ReLU(), nn.Linear(32, D))
    model = MoE(D, expert, num_experts=E, **kw)
    if groups:
        model.set_deepspeed_parallelism()
    return model
