"""A cache that counts on its device, as static caches do on a GPU: nothing may read that number."""

from __future__ import annotations

import pytest
import torch
from support.models import TinyModel
from support.tables import frame

import moe_lens
from moe_lens_hooks.following import Following
from moe_lens_hooks.lineage import Line, Routed, Rows


class DeviceCache:
    """Says its length as a tensor that cannot be read: one on the meta device."""

    def get_seq_length(self):
        return torch.zeros((), dtype=torch.int64, device="meta")

    def reset(self):
        pass

    def reorder_cache(self, beam_idx):
        pass


class Fresh(DeviceCache):
    """Not initialised: transformers says 0 then, not a tensor."""

    def __init__(self):
        self.filled = False

    def get_seq_length(self):
        return super().get_seq_length() if self.filled else 0


class Decoder(TinyModel):
    def forward(self, input_ids, past_key_values=None, attention_mask=None):
        past_key_values.filled = True
        return super().forward(input_ids)


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return Decoder().eval()


def test_positions_are_counted_on_the_host(decoder, run):
    cache, ids = Fresh(), torch.arange(6).reshape(2, 3)
    with torch.no_grad(), moe_lens.record(decoder, run, tokens=1.0) as rec, rec.step():
        decoder(ids, past_key_values=cache)
        decoder(ids[:, :1], past_key_values=cache)
        decoder(ids[:, :2], past_key_values=cache)
        cache.reset()
        cache.filled = False
        decoder(ids, past_key_values=cache)
    tokens = frame(run, "tokens").sort_values(["forward", "token"])
    assert tokens.position.tolist() == [0, 1, 2] * 2 + [3, 3] + [4, 5] * 2 + [0, 1, 2] * 2
    assert tokens.sequence.tolist() == [0] * 3 + [1] * 3 + [0, 1] + [0, 0, 1, 1] + [2] * 3 + [3] * 3
    assert frame(run, "steps").phase.tolist() == ["prefill", "decode", "decode", "prefill"]
    assert "reset" in vars(DeviceCache)
    assert not hasattr(vars(DeviceCache)["reset"], "__wrapped__")


def test_a_reset_is_heard_where_the_length_tells_nothing():
    following = Following([], lambda line: line, lambda event: None)
    cache = DeviceCache()
    inputs = {"past_key_values": cache}
    first = following.begin(inputs)
    assert first.rows is None
    assert first.cached  # something is in it, and only the device knows how much
    assert first.start is not None
    rows = Rows([Line(0, 0)], 5)
    following.goes_on(first, rows)
    going = following.begin(inputs)
    assert (going.rows, going.past, going.start) == (rows, 5, None)
    cache.reorder_cache(torch.tensor([0, 0]))
    assert len(following.begin(inputs).rows) == 2
    cache.reset()
    assert following.begin(inputs).rows is None
    following.close()
    cache.reset()


def test_caches_that_nobody_holds_are_forgotten():
    following = Following([], lambda line: line, lambda event: None)
    cache = DeviceCache()
    following.goes_on(following.begin({"past_key_values": cache}), Rows([Line(0, 0)]))
    assert len(following._rows) == 1
    del cache
    assert len(following._rows) == 0
    following.close()


def test_tuples_go_on_with_the_last_forward_that_fits():
    def layers(positions):
        keys = torch.zeros(1, 2, positions, 4)
        return ((keys, keys),)

    following = Following([], lambda line: line, lambda event: None)
    rows = Rows([Line(0, 0)])
    following.goes_on(following.begin({}), rows)
    rows.add(Routed(0, 0, (1, 3), 0, "bs", None, None, None, None))
    going = following.begin({"past_key_values": layers(3)})
    assert (going.rows, going.past, going.sure) == (rows, 3, False)
    assert following.begin({"past_key_values": layers(7)}).rows is None
    following.close()
