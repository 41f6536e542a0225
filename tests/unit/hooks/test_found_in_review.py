"""Mistakes that were found once: each of these recorded wrong numbers in silence, or stopped."""

from __future__ import annotations

import pytest
import torch
from support.models import TinyModel, build
from support.tables import frame
from torch import nn

import moe_lens
from moe_lens.trace.reader import open_run
from moe_lens_hooks.adapter import Observed
from moe_lens_hooks.semantics import learn

IDS = torch.arange(12).reshape(3, 4)


def test_a_bias_that_is_still_zero_is_expected_to_move():
    torch.manual_seed(0)
    z, router = torch.randn(50, 8), nn.Module()
    router.register_buffer("e_score_correction_bias", torch.zeros(8))
    weights, ids = z.sigmoid().topk(2)
    meaning = learn(Observed(ids, weights, z), router, 8)
    assert meaning is not None
    assert meaning.selection == "sigmoid+bias"  # plain logits explain these tokens too


def test_experts_called_in_chunks_are_a_breach(run):
    class Chunked(TinyModel):
        def forward(self, input_ids):
            block, x = self.blocks[0], self.embed(input_ids)
            return block(x)

    model = Chunked(blocks=1).eval()
    block = model.blocks[0]

    def in_chunks(x_BSD):
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        _, weights_TK, ids_TK = block.gate(x_TD)
        parts = zip(x_TD.split(4), ids_TK.split(4), weights_TK.split(4), strict=True)
        return torch.cat([block.experts(*part) for part in parts]).view_as(x_BSD)

    block.forward = in_chunks
    with moe_lens.record(model, run) as rec:
        with pytest.raises(moe_lens.CaptureBreach, match="called its experts 3 times"), rec.step():
            model(IDS)


def test_a_loss_after_rec_log_belongs_to_that_step(run):
    ids = torch.zeros(1, 4, 1, dtype=torch.int64)
    with moe_lens.record(None, run) as rec:
        for step in range(2):
            with rec.step():
                rec.log("r", ids, torch.ones(1, 4, 1), experts=2)
                rec.loss(torch.full((1, 4), float(step)))
    assert frame(run, "slices").loss_sum.tolist() == [0.0, 4.0]


def test_what_the_caller_refills_afterwards_is_not_recorded(model, run):
    ids, loss = IDS.clone(), torch.ones(3, 4)
    with moe_lens.record(model, run, tokens=1.0, token_ids=True) as rec, rec.step():
        model(ids)
        rec.loss(loss)
        ids.zero_()
        loss.fill_(7)
    assert frame(run, "tokens").token_id.tolist() == list(range(12))
    assert frame(run, "outcomes").loss.tolist() == [1.0] * 12


def test_prefill_starts_at_position_zero_without_position_ids(run):
    from transformers import DynamicCache

    model = build("qwen3_moe")
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec, rec.step():
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.ones(1, 4, dtype=torch.int64), past_key_values=cache)
        model(input_ids=torch.ones(1, 1, dtype=torch.int64), past_key_values=cache)
    tokens = frame(run, "tokens").sort_values(["forward", "token"])
    assert tokens.position.tolist() == [0, 1, 2, 3, 4]
    assert tokens.sequence.nunique() == 1


def test_after_an_exception_in_a_forward_logged_routing_is_kept(model, run):
    ids = torch.zeros(4, 1, dtype=torch.int64)
    with moe_lens.record(model, run) as rec:
        model(IDS)
        with pytest.raises(IndexError), rec.step():
            model(torch.tensor([[99]]))
        with rec.step():
            rec.log("r", ids, torch.ones(4, 1), experts=2)
    assert frame(run, "steps").fires_seen.tolist() == [2, 1]


def test_resume_keeps_the_numbers_of_layers_and_refuses_other_layers(run, tmp_path):
    ids = torch.zeros(4, 1, dtype=torch.int64)
    with moe_lens.record(None, run) as rec, rec.step():
        rec.log("a", ids, torch.ones(4, 1), experts=2)
    with moe_lens.record(None, run, resume=True) as rec, rec.step():
        rec.log("b", ids, torch.ones(4, 1), experts=2)
        rec.log("a", ids, torch.ones(4, 1), experts=2)
    assert [(x.layer, x.path) for x in open_run(run).meta.layers] == [(0, "a"), (1, "b")]
    with moe_lens.record(None, run, resume=True) as rec:
        with pytest.raises(moe_lens.CaptureBreach, match="Record into a new folder"), rec.step():
            rec.log("a", ids, torch.ones(4, 1), experts=3)


def test_the_root_may_be_an_moe_block_itself(run):
    block = TinyModel(blocks=1).blocks[0].eval()
    with moe_lens.record(block, run) as rec, rec.step():
        block(torch.randn(2, 3, 8))
    assert frame(run, "steps").fires_seen.tolist() == [1]


def test_a_breach_at_close_leaves_no_hook_and_no_lock(run):
    model = TinyModel().eval()
    model.blocks[0].gate.top_k = 3
    rec = moe_lens.record(model, run)
    model.blocks[0].gate.top_k = 2
    x = model.embed(IDS)
    model.blocks[0](x)  # without a root: it ends when the recorder closes
    with pytest.raises(moe_lens.CaptureBreach, match="configured for 3"):
        rec.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert moe_lens.recover(run) == []  # nobody holds the lock


def test_an_adapter_that_fails_is_a_breach_not_an_exception_in_the_model(model, run):
    from moe_lens_hooks.adapters.fused_experts import FusedExperts

    class Broken(FusedExperts):
        def layer(self, path, module):
            found = super().layer(path, module)
            if found is not None:
                tap = found.taps[0]
                found.taps[0] = type(tap)(tap.module, tap.when, lambda *_: {}["nothing"])
            return found

    with moe_lens.record(model, run, adapters=[Broken()], on_breach="warn") as rec:
        with pytest.warns(UserWarning, match="the adapter could not read TinyExperts"):
            with rec.step():
                model(IDS)
