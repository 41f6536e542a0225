"""What the recorder counts, samples and tags, on small hand-written models."""

from __future__ import annotations

import math

import pytest
import torch
from support.models import TinyModel
from support.tables import frame
from torch.utils.checkpoint import checkpoint

import moe_lens
from moe_lens.trace.reader import open_run

IDS = torch.arange(12).reshape(3, 4)


def test_without_step_every_forward_is_a_step(model, run):
    with moe_lens.record(model, run) as rec:
        model(IDS)
        model(IDS)
        assert len(rec.scalars()) > 0
    assert frame(run, "steps")[["step", "forward"]].to_numpy().tolist() == [[0, 0], [1, 0]]


def test_forwards_of_one_step_are_numbered(model, run):
    with moe_lens.record(model, run) as rec, rec.step():
        model(IDS)
        model(IDS[:1])
    steps = frame(run, "steps")
    assert steps.forward.tolist() == [0, 1]
    assert steps.tokens.tolist() == [12, 4]
    assert (steps.fires_expected == 2).all()
    assert (steps.fires_seen == 2).all()


def test_layers_are_numbered_by_call_order_not_by_definition(run):
    class Backwards(TinyModel):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            for block in reversed(self.blocks):
                x = x + block(x)
            return x

    model = Backwards().eval()
    with moe_lens.record(model, run) as rec, rec.step():
        model(IDS)
    assert [x.path for x in open_run(run).meta.layers] == ["blocks.1", "blocks.0"]


def test_a_block_called_twice_is_two_layers(run):
    class Shared(TinyModel):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            return self.blocks[0](self.blocks[0](x))

    model = Shared(blocks=1).eval()
    with moe_lens.record(model, run) as rec, rec.step():
        model(IDS)
    assert [x.path for x in open_run(run).meta.layers] == ["blocks.0", "blocks.0 #1"]


def test_blocks_that_run_without_their_root_are_recorded_too(model, run):
    with moe_lens.record(model, run, tokens=1.0) as rec:
        with rec.step():
            x = model.embed(IDS)
            model.blocks[1](model.blocks[0](x))
        model.blocks[0](x)
        model.blocks[0](x)
    steps = frame(run, "steps")
    assert steps.step.tolist() == [0, 1, 2]
    assert steps.fires_seen.tolist() == [2, 1, 1]
    assert frame(run, "tokens").position.tolist()[:8] == [0, 1, 2, 3] * 2


def test_padding_is_marked_and_not_counted_as_load(model, run):
    mask = torch.ones_like(IDS)
    mask[0, 2:] = 0
    with moe_lens.record(model, run, tokens=1.0) as rec, rec.step():
        model(IDS, attention_mask=mask)
    load = frame(run, "load").query("layer == 0")
    assert (load.routed.sum(), load.padding.sum()) == (20, 4)
    tokens = frame(run, "tokens")
    assert tokens.padding.tolist() == [False, False, True, True] + [False] * 8
    assert len(frame(run, "routing")) == 24  # the padding's rows are kept, and can be told
    step = frame(run, "steps").iloc[0]
    assert (step.tokens, step.padding_tokens) == (10, 2)


def test_a_batch_that_is_all_padding(model, run):
    with moe_lens.record(model, run, tokens=1.0) as rec, rec.step(padding=True):
        model(IDS)
    load = frame(run, "load")
    assert load.routed.sum() == 0
    assert load.padding.sum() == 2 * 24
    assert frame(run, "routers").tokens.sum() == 0
    assert moe_lens.open(run).info() is not None


def test_zero_tokens(model, run):
    with moe_lens.record(model, run, tokens=1.0) as rec:
        with rec.step():
            model(IDS[:, :0])
        with rec.step():
            model(IDS)
    assert frame(run, "steps").tokens.tolist() == [0, 12]
    assert open_run(run).meta.layers[0].score == "softmax"  # learned from the first real token


def test_nan_logits_are_counted_and_poison_no_sum(model, run):
    router = model.blocks[0].gate
    handle = router.register_forward_pre_hook(lambda m, args: (args[0] * _nan_first(args[0]),))
    with moe_lens.record(model, run, tokens=1.0, on_breach="warn") as rec:
        with pytest.warns(UserWarning, match="gate weights of . experts are NaN"), rec.step():
            model(IDS)
            rec.flush()
    handle.remove()
    routers = frame(run, "routers").query("layer == 0")
    assert routers.nonfinite_tokens.tolist() == [1]
    assert math.isfinite(routers.entropy_sum.iloc[0])
    assert math.isfinite(frame(run, "load").prob_sum.sum())


def _nan_first(x):
    factor = torch.ones_like(x)
    factor[0] = math.nan
    return factor


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_a_checkpoint_is_not_a_second_decision(reentrant, run):
    """Pitfall 2."""

    class Checkpointed(TinyModel):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=reentrant)
            return x

    model = Checkpointed().train()
    with moe_lens.record(model, run) as rec, rec.step():
        model(IDS).sum().backward()
    steps = frame(run, "steps")
    assert steps.fires_seen.tolist() == [2]
    assert frame(run, "load").routed.sum() == 2 * 24


def test_phases_are_told_apart_and_can_be_said(model, run):
    with moe_lens.record(model, run) as rec:
        model(IDS)
        model.train()
        model(IDS)
        with rec.step(phase="warm-up"):
            model(IDS)
    assert frame(run, "steps").phase.tolist() == ["eval", "train", "warm-up"]


def test_generate_is_prefill_and_decode_of_the_same_sequences(run):
    from support.models import build

    model = build("qwen3_moe")
    ids = torch.randint(1, 90, (2, 6))
    with moe_lens.record(model, run, tokens=1.0) as rec, rec.step(tags=["x", "y"]):
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    steps = frame(run, "steps")
    assert steps.phase.tolist() == ["prefill"] + ["decode"] * (len(steps) - 1)
    tokens = frame(run, "tokens").sort_values(["sequence", "position"])
    assert tokens.sequence.unique().tolist() == [0, 1]
    for _, one in tokens.groupby("sequence"):
        assert one.position.tolist() == list(range(len(one)))


def test_rows_are_kept_of_whole_sequences_in_about_that_share(model, run):
    with moe_lens.record(model, run, tokens=0.3) as rec:
        for _ in range(100):
            with rec.step():
                model(IDS)
    tokens = frame(run, "tokens")
    assert (tokens.groupby("sequence").size() == 4).all()
    assert 60 <= tokens.sequence.nunique() <= 120  # 90 expected of 300
    assert set(tokens.sequence) == set(frame(run, "sequences").sequence)
    assert frame(run, "load").routed.sum() == 100 * 2 * 24  # counts are always on


def test_every_nth_step(model, run):
    with moe_lens.record(model, run, tokens=moe_lens.every(3)) as rec:
        for _ in range(7):
            with rec.step():
                model(IDS)
    assert frame(run, "routing").step.unique().tolist() == [0, 3, 6]
    assert frame(run, "steps").sampled.tolist() == [True, False, False] * 2 + [True]


def test_a_thousand_tags_become_32_and_other(model, run):
    with moe_lens.record(model, run) as rec, pytest.warns(UserWarning, match="more than 32 tags"):
        for i in range(334):
            with rec.step(tags=[f"tag{3 * i + j}" for j in range(3)]):
                model(IDS)
    slices = frame(run, "slices")
    assert slices.tag.nunique() == 33
    assert slices.groupby("tag").tokens.sum()["other"] == (334 * 3 - 32) * 4
    assert frame(run, "load").routed.sum() == 334 * 2 * 24


def test_wrong_tags_are_a_value_error_in_the_forward_and_nothing_is_lost(model, run):
    with pytest.raises(ValueError, match="tags has 2 values, but this forward has 3 sequences"):
        with moe_lens.record(model, run) as rec:
            with rec.step():
                model(IDS)
            with rec.step(tags=["a", "b"]):
                model(IDS)
    assert frame(run, "steps").step.tolist() == [0]
    assert open_run(run).meta.attempts[-1].end == "failed"
    assert "forwards that an exception ended" in open_run(run).meta.warnings


def test_losses_by_token_land_in_slices_and_outcomes(model, run):
    loss = torch.arange(9.0).reshape(3, 3)
    loss[0, 0] = math.nan  # a masked label
    with moe_lens.record(model, run, tokens=1.0) as rec, rec.step(tags=["a", "b", "a"]):
        model(IDS)
        rec.loss(loss)
    slices = frame(run, "slices").set_index("tag")
    assert slices.loss_sum.to_dict() == {"a": 1 + 2 + 6 + 7 + 8, "b": 3 + 4 + 5}
    assert slices.loss_tokens.to_dict() == {"a": 5, "b": 3}
    outcomes = frame(run, "outcomes").set_index(["sequence", "position"])
    assert outcomes.loss[1, 2] == 5
    assert (0, 0) not in outcomes.index
    assert (0, 3) not in outcomes.index  # [B, S - 1]: the last position predicts nothing


def test_losses_by_sequence_count_for_all_its_valid_tokens(model, run):
    mask = torch.ones_like(IDS)
    mask[0, 1:] = 0
    with moe_lens.record(model, run, tokens=1.0) as rec, rec.step():
        model(IDS, attention_mask=mask)
        rec.loss(torch.tensor([1.0, 2.0, 3.0]))
    row = frame(run, "slices").iloc[0]
    assert (row.loss_sum, row.loss_tokens) == (1 * 1 + 4 * 2 + 4 * 3, 9)
    assert frame(run, "outcomes").position.isna().all()


def test_losses_of_another_shape_or_before_a_forward_are_refused(model, run):
    with moe_lens.record(model, run) as rec:
        with pytest.raises(moe_lens.CaptureBreach, match="before any recorded forward"):
            rec.loss(torch.zeros(3))
        model(IDS)
        with pytest.raises(ValueError, match=r"got shape \[2, 2\], but the last forward was a"):
            rec.loss(torch.zeros(2, 2))


def test_keys_become_columns_of_sequences(model, run):
    with moe_lens.record(model, run, tokens=1.0, keys=["language"]) as rec:
        with rec.step(sequences=["r1", "r2", "r3"], keys={"language": ["en", "de", "en"]}):
            model(IDS)
        with pytest.raises(ValueError, match="were not declared"), rec.step(keys={"x": [1]}):
            model(IDS)
    rows = frame(run, "sequences")
    assert rows.request.tolist() == ["r1", "r2", "r3"]
    assert rows.language.tolist() == ["en", "de", "en"]


def test_scalars_are_at_most_ten_per_layer_and_right(model, run):
    with moe_lens.record(model, run) as rec:
        with rec.step():
            model(IDS)
            model(IDS)
        scalars = rec.scalars()
    assert len(scalars) <= 10 * 2
    load = frame(run, "load").query("layer == 1").groupby("expert").processed.sum()
    load = load.reindex(range(4), fill_value=0)
    assert scalars["moe/layer1/load_max_over_mean"] == pytest.approx(load.max() / load.mean())
    routers = frame(run, "routers").query("layer == 1")
    entropy = routers.entropy_sum.sum() / routers.tokens.sum()
    assert scalars["moe/layer1/entropy"] == pytest.approx(entropy)
    assert scalars["moe/layer1/dropped_share"] == 0


def test_log_records_a_custom_router_by_hand(run):
    ids = torch.tensor([[[0, 2], [1, 2]]])
    logits = torch.randn(1, 2, 3)
    with moe_lens.record(None, run, tokens=1.0) as rec:
        with pytest.raises(ValueError, match="needs experts=E"):
            rec.log("router", ids, torch.ones(1, 2, 2))
        for _ in range(2):
            with rec.step(tags="x"):
                rec.log("router", ids, torch.full((1, 2, 2), 0.5), logits)
                rec.log("second", ids, torch.full((1, 2, 2), 0.5), experts=4)
    assert [x.path for x in open_run(run).meta.layers] == ["router", "second"]
    assert len(frame(run, "steps")) == 2
    assert frame(run, "load").query("layer == 1").groupby("expert").routed.sum().to_dict() == {
        0: 2,
        1: 2,
        2: 4,
    }
