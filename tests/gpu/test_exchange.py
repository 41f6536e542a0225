"""On a GPU: all-to-alls of a block are timed between two events, and no forward waits for it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.models import TinyBlock
from support.tables import read
from torch import nn

import moe_lens


@pytest.fixture(autouse=True)
def group(tmp_path):
    """A process group of this process alone, whose communicator is there already."""
    if not dist.is_nccl_available():
        pytest.skip("torch was built without NCCL")
    dist.init_process_group("nccl", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    exchanged(torch.ones(4, device="cuda"))
    yield
    dist.destroy_process_group()


def exchanged(x, **more):
    out = torch.empty_like(x)
    work = dist.all_to_all_single(out, x, **more)
    if work is not None:
        work.wait()
    return out


class Block(TinyBlock):
    """Sends its rows to this rank and back; the way back is waited for apart from its call."""

    def forward(self, x):
        return exchanged(super().forward(exchanged(x)), async_op=True)


def test_dispatch_and_combine_are_timed_and_nothing_waits(run, no_waiting):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 8), Block()).eval().cuda()
    ids = torch.arange(24, device="cuda").reshape(3, 8)
    with torch.no_grad():
        want = model(ids)
        with moe_lens.record(model, run) as rec:
            for step in range(3):
                with rec.step():
                    no_waiting(step > 0)  # the first learns what the router computes
                    out = model(ids)
                    no_waiting(False)
                assert torch.equal(out, want)
    layers = read(run, "layers")
    for name in ("dispatch_ns", "combine_ns"):
        assert len(layers[name]) == 3
        assert all(0 < ns < 60e9 for ns in layers[name].to_pylist())
