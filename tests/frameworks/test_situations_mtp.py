"""Heads that predict further tokens: MoE layers that see fewer tokens than the model."""

from __future__ import annotations

import pytest
import torch
from support.generated import watched
from support.models import VOCAB, TinyBlock, TinyModel, build
from support.tables import frame
from torch import nn

import moe_lens
from moe_lens.trace.reader import open_run


class WithHeads(TinyModel):
    """As DeepSeek-V3 trains: head d joins the hidden state with the embedding d + 1 further on."""

    def __init__(self, heads=2):
        super().__init__()
        self.mtp = nn.ModuleList(Head() for _ in range(heads))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        for depth, head in enumerate(self.mtp, 1):
            x = head(x[:, :-1], self.embed(input_ids)[:, depth:])
        return x


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.join, self.mlp = nn.Linear(16, 8), TinyBlock()

    def forward(self, hidden, embedded):
        return self.mlp(self.join(torch.cat([hidden, embedded], -1)))


def test_heads_have_streams_of_their_own(tmp_path):
    """Pitfall 11."""
    torch.manual_seed(0)
    model = WithHeads().eval()
    ids = torch.randint(0, 32, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    run = tmp_path / "run"
    tags = [["a"] * 6, ["b"] * 6]
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec, watched(model) as ran:
        with rec.step(tags=tags):
            model(ids, attention_mask=mask)
    layers = open_run(run).meta.layers
    assert [(x.role, x.stream) for x in layers] == [
        ("mlp", "main"), ("mlp", "main"), ("mtp", "mtp0"), ("mtp", "mtp1"),
    ]  # fmt: skip
    routing, tokens = frame(run, "routing"), frame(run, "tokens")
    for x in layers:
        rows = routing[routing.layer == x.layer].sort_values("token")
        expected = ran[0].experts[f"{x.path}.experts"]
        assert [list(r) for r in rows.expert_ids] == expected.tolist()
    by_stream = tokens.groupby("stream")
    assert by_stream.size().to_dict() == {"main": 12, "mtp0": 10, "mtp1": 8}
    # the same two sequences, with padding where the embedded token is padding
    assert tokens.groupby("stream").sequence.unique().map(sorted).tolist() == [[0, 1]] * 3
    assert by_stream.padding.sum().to_dict() == {"main": 2, "mtp0": 2, "mtp1": 2}
    assert set(zip(tokens.sequence, tokens.tag, strict=True)) == {(0, "a"), (1, "b")}
    assert frame(run, "sequences").sequence.tolist() == [0, 1]
    by_layer = frame(run, "layers").sort_values("layer")
    assert by_layer[["tokens", "padding_tokens"]].to_numpy().tolist() == [
        [10, 2], [10, 2], [8, 2], [6, 2],
    ]  # fmt: skip


def test_the_heads_of_transformers(tmp_path):
    """Their `MtpModel` drafts for `generate(use_mtp=True)`; it is a model beside the main one."""
    from transformers.modeling_layers import MtpModel

    main = build("deepseek_v3")
    main.config.num_mtp_layers = 2
    torch.manual_seed(0)
    heads = MtpModel(main, 2).eval()
    for parameter in heads.parameters():  # some are made empty, to be loaded
        nn.init.normal_(parameter, std=0.2)
    for buffer in heads.buffers():
        assert torch.isfinite(buffer).all()
    assert type(heads.layers[0].mtp_block.mlp).__name__ == "DeepseekV3MoE"
    ids = torch.randint(3, VOCAB, (1, 5))
    hidden = torch.randn(1, 5, main.config.hidden_size)
    run = tmp_path / "run"
    with torch.no_grad(), moe_lens.record(heads, run, tokens=1.0) as rec, watched(heads) as ran:
        with rec.step():
            heads(ids, hidden, None, torch.arange(1, 6)[None], None)
    layers = open_run(run).meta.layers
    assert [(x.role, x.stream) for x in layers] == [("mtp", "mtp0"), ("mtp", "mtp1")]
    routing = frame(run, "routing")
    for x in layers:
        rows = routing[routing.layer == x.layer].sort_values("token")
        assert [list(r) for r in rows.expert_ids] == ran[0].experts[f"{x.path}.experts"].tolist()
    assert len(routing) == sum(len(e) for e in ran[0].experts.values())


@pytest.mark.parametrize("name", ["mtp", "mtp_layers", "model.mtp_block", "multi_token_prediction"])
def test_heads_are_told_by_their_path(name):
    from moe_lens_hooks.finding import _mtp_depth

    assert _mtp_depth(f"{name}.3.mlp") == 3
    assert _mtp_depth(f"layers.1.{name}.mlp") == 1
    assert _mtp_depth(f"{name}.mlp") == 0
    assert _mtp_depth("model.layers.2.smtp.mlp") is None
