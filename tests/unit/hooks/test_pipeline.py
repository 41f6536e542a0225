"""A model cut into pipeline stages and chunks."""

from __future__ import annotations

import pytest
import torch
from support.models import TinyModel
from support.tables import frame, read
from torch import nn

import moe_lens
from moe_lens.trace.reader import open_run

IDS = torch.arange(12).reshape(3, 4)


class Later(nn.Module):
    """A stage that is handed activations."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = TinyModel().blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_stages_number_their_layers_on_and_count_each_token_once(run):
    torch.manual_seed(0)
    first, second = TinyModel().eval(), Later().eval()
    options = {"world": 2, "tokens": 1.0}
    with (
        moe_lens.record(first, run, rank=0, coordinates={"pp": 0}, **options) as a,
        moe_lens.record(second, run, rank=1, coordinates={"pp": 1}, first_layer=2, **options) as b,
    ):
        for _ in range(2):
            with a.step(tags="x"), b.step(tags="x"):
                second(first(IDS))
    files = open_run(run)
    assert {r: [x.layer for x in m.layers] for r, m in files.metas.items()} == {
        0: [0, 1],
        1: [2, 3],
    }
    trace = moe_lens.open(run)
    assert trace.sql("select sum(tokens) n from slices").rows()[0]["n"] == 24
    by_layer = trace.sql("select layer, sum(tokens) n from layers group by 1 order by 1").rows()
    assert [(r["layer"], r["n"]) for r in by_layer] == [(i, 24) for i in range(4)]


def test_interleaved_micro_batches_of_chunks_are_one_forward_each(run):
    torch.manual_seed(0)
    chunks = [TinyModel().eval(), Later().eval()]
    micro = [IDS, IDS + 12]
    with moe_lens.record(chunks, run, tokens=1.0, token_ids=True) as rec, rec.step(tags="x"):
        between = [chunks[0](ids) for ids in micro]
        for x in between:
            chunks[1](x)
    steps = frame(run, "steps")
    assert steps[["step", "forward"]].to_numpy().tolist() == [[0, 0], [0, 1]]
    assert steps[["fires_expected", "fires_seen", "tokens"]].to_numpy().tolist() == [[4, 4, 12]] * 2
    assert [x.path for x in open_run(run).meta.layers][::2] == ["0.blocks.0", "1.blocks.0"]
    tokens = frame(run, "tokens").sort_values(["forward", "token"])
    assert tokens.token_id.tolist() == torch.cat(micro).flatten().tolist()
    # each chunk's rows are those of its own micro-batch
    for forward, x in enumerate(between):
        seen = []
        block = chunks[1].blocks[0]
        handle = block.experts.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[1]))
        chunks[1](x)
        handle.remove()
        rows = read(run, "routing").to_pandas().query(f"layer == 2 and forward == {forward}")
        assert rows.sort_values("token").expert_ids.map(list).tolist() == seen[0].tolist()


def test_a_micro_batch_that_stops_half_way_is_a_breach(run):
    chunks = [TinyModel().eval(), Later().eval()]
    with pytest.raises(moe_lens.CaptureBreach, match="all pipeline chunks"):
        with moe_lens.record(chunks, run) as rec:
            with rec.step():
                chunks[0](IDS)


@pytest.mark.parametrize("model", ["gpt2", [], [TinyModel(), "x"], TinyModel, 3])
def test_what_is_not_a_model_is_refused(model, run):
    with pytest.raises(TypeError, match="Load the model first"):
        moe_lens.record(model, run)
    assert not run.exists()
