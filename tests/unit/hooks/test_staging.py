"""Numbers on their way to the host are not read before they are there, nor freed or changed."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from support.delayed import POISON, LateLanding, LateLane
from support.models import TinyModel
from support.tables import read
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_lens
from moe_lens.trace.schema import TABLES
from moe_lens_hooks import staging
from moe_lens_hooks.staging import HostCopy, lane_of, refuse_devices, to_device

IDS = torch.arange(12).reshape(3, 4)
TIMES = {"t_start_ns", "host_ns", "device_ns"}


@pytest.fixture
def late(monkeypatch):
    """The CPU plays a device whose copies land when they are waited for."""
    lane = LateLane()
    monkeypatch.setitem(staging.lanes, torch.device("cpu"), lane)
    return lane


class Placed(TinyModel):
    """Is given positions, and writes into all that it was given or handed on, when it is done."""

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        held = []
        hooks = [
            b.gate.register_forward_hook(lambda m, a, out: held.extend(out)) for b in self.blocks
        ]
        out = super().forward(input_ids, attention_mask)
        self.garbage = [*held, input_ids, attention_mask, position_ids]
        for hook in hooks:
            hook.remove()
        return out

    def spoil(self):
        for tensor in self.garbage:
            tensor.zero_()


def record(run, *, spoil):
    torch.manual_seed(0)
    model, mask = Placed().eval(), torch.ones_like(IDS)
    mask[0, :2] = 0
    options = {"tokens": 1.0, "weights": "exact", "logits": True, "token_ids": True}
    with torch.no_grad(), moe_lens.record(model, run, **options) as rec:
        for _ in range(3):
            with rec.step(tags=["a", "b", "a"]):
                positions = torch.arange(4).expand(3, 4).clone() + 7
                out = model(IDS.clone(), mask.clone(), positions)
                rec.loss(out.mean(-1))
                if spoil:
                    out.zero_()
                    model.spoil()
        return rec.scalars()


def test_a_trace_of_late_copies_is_the_same_trace(tmp_path, late):
    on_time, delayed = tmp_path / "a", tmp_path / "b"
    scalars = record(delayed, spoil=True)
    assert late.sent > 0
    del staging.lanes[torch.device("cpu")]
    assert record(on_time, spoil=False) == scalars
    for table in TABLES:
        a, b = read(on_time, table), read(delayed, table)
        names = [n for n in a.column_names if n not in TIMES]
        assert a.select(names).equals(b.select(names)), table


def test_reading_early_would_be_seen(tmp_path, late, monkeypatch):
    monkeypatch.setattr(LateLanding, "synchronize", lambda self: None)
    with pytest.raises(moe_lens.MoeLensError):
        record(tmp_path / "early", spoil=False)


def test_arrays_wait_for_the_landing(late):
    numbers, flags = torch.arange(5), torch.tensor([True, False])
    copy = HostCopy([numbers, flags])
    assert (copy._host[0].view(torch.uint8) == POISON).all()  # nothing landed yet
    got = copy.arrays()
    assert [x.tolist() for x in got] == [[0, 1, 2, 3, 4], [True, False]]


def test_tensors_are_held_until_their_copies_have_landed(late):
    kept, dropped = torch.ones(3), torch.ones(4)
    alive = weakref.ref(dropped)
    copy = HostCopy([kept, dropped])
    copy.keep([kept])
    del dropped
    gc.collect()
    assert alive() is not None  # a copy may still read it
    assert [x.tolist() for x in copy.arrays()] == [[1.0, 1.0, 1.0]]
    gc.collect()
    assert alive() is None


def test_rows_that_are_given_up_on_their_way_leave_the_counts_whole(tmp_path, late):
    torch.manual_seed(0)
    model = TinyModel().eval()
    with torch.no_grad(), moe_lens.record(model, tmp_path / "run", tokens=1.0) as rec:
        rec._writer._queue_bytes = 0
        with rec.step():
            model(IDS)
    assert read(tmp_path / "run", "routing").num_rows == 0
    assert read(tmp_path / "run", "steps")["lost_rows"].to_pylist() == [2 * 12]
    assert sum(read(tmp_path / "run", "load")["routed"].to_pylist()) == 2 * 12 * 2


def test_each_device_has_one_lane_and_the_order_is_kept(monkeypatch):
    class Lane(LateLane):
        def __init__(self, device):
            super().__init__()
            made.append(self)
            self.number = float(device.index)

        def send(self, tensors):
            super().send([])
            self.sent += len(tensors)
            return [torch.full(t.shape, self.number) for t in tensors], LateLanding([])

    made = []
    monkeypatch.setattr(staging, "lanes", {})
    monkeypatch.setattr(staging, "CudaLane", Lane)
    with FakeTensorMode():
        tensors = [torch.empty(2, device=f"cuda:{i}") for i in (1, 0, 1)]
    tensors.insert(1, torch.full((2,), 9.0))
    for _ in range(2):
        got = HostCopy(tensors).arrays()
        assert [x.tolist() for x in got] == [[1.0] * 2, [9.0] * 2, [0.0] * 2, [1.0] * 2]
    assert [(lane.number, lane.sent) for lane in made] == [(1.0, 4), (0.0, 2)]


def test_nothing_is_copied_on_a_cpu():
    numbers = np.arange(3)
    assert lane_of(torch.device("cpu")) is None

    assert np.shares_memory(to_device(numbers, torch.device("cpu")).numpy(), numbers)
    tensor = torch.arange(3)
    assert np.shares_memory(HostCopy([tensor]).arrays()[0], tensor.numpy())


def test_other_devices_are_refused_by_name(tmp_path):
    class Elsewhere(nn.Module):
        def named_parameters(self, *args, **kwargs):
            yield "weight", torch.empty(0, device="meta") if self.meta else FakeParameter()

        meta = False

    class FakeParameter:
        device = torch.device("mps")

    with pytest.raises(
        moe_lens.UnsupportedRouter, match=r"weight is on a device of type 'mps'.*cpu"
    ):
        moe_lens.record(Elsewhere(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    model = Elsewhere()
    model.meta = True  # not yet materialised: nobody knows where it will be
    refuse_devices([model])
