"""The recorder on small hand-written models: what it counts, what it refuses, what it leaves."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from support.models import TinyModel
from support.tables import read
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_lens
from moe_lens.trace.reader import open_run

IDS = torch.arange(12).reshape(3, 4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyModel().eval()


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def frame(run, name):
    return read(run, name).to_pandas()


# -- what is counted -------------------------------------------------------------------------------


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


# -- sampling, tags, losses ------------------------------------------------------------------------


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


# -- what is refused -------------------------------------------------------------------------------


def test_a_dense_model_has_nothing_to_record(run):
    with pytest.raises(moe_lens.NoMoELayers, match="Linear has no MoE layer"):
        moe_lens.record(nn.Linear(2, 2), run)
    assert not run.exists()


def test_a_soft_mixture_is_refused_by_name(run):
    class SoftMoE(TinyModel):
        pass

    with pytest.raises(moe_lens.UnsupportedRouter, match="soft mixture"):
        moe_lens.record(SoftMoE(), run)


def test_a_folder_with_something_in_it_is_not_touched(model, run):
    run.mkdir()
    (run / "mine.txt").write_text("precious")
    with pytest.raises(moe_lens.TraceError, match="is not empty"):
        moe_lens.record(model, run)
    assert [p.name for p in run.iterdir()] == ["mine.txt"]
    with pytest.raises(moe_lens.TraceError, match="is a file"):
        moe_lens.record(model, run / "mine.txt")


def test_two_recorders_on_one_model_are_refused(model, run, tmp_path):
    with moe_lens.record(model, run) as rec:
        with pytest.raises(moe_lens.CaptureBreach, match=r"another recorder is attached"):
            moe_lens.record(model, tmp_path / "other")
        with rec.step():
            model(IDS)
    with moe_lens.record(model, tmp_path / "later") as rec, rec.step():
        model(IDS)


def test_an_exception_inside_leaves_a_readable_trace_and_no_hook(model, run):
    with pytest.raises(RuntimeError, match="boom"), moe_lens.record(model, run) as rec:
        with rec.step():
            model(IDS)
        with rec.step():
            model(IDS)
            raise RuntimeError("boom")
    assert frame(run, "steps").step.tolist() == [0, 1]
    last = open_run(run).meta.attempts[-1]
    assert (last.end, last.error) == ("failed", "RuntimeError: boom")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_exception_in_the_model_does_not_leak_into_the_next_forward(model, run):
    with moe_lens.record(model, run) as rec:
        with pytest.raises(IndexError), rec.step():
            model(torch.tensor([[99]]))
        with rec.step():
            model(IDS)
    steps = frame(run, "steps")
    assert steps.fires_expected.tolist() == [2]


def test_ids_out_of_range_are_a_breach_at_the_latest_at_flush(model, run):
    model.blocks[1].experts.num_experts = 3  # the router still chooses among 4
    with pytest.raises(moe_lens.CaptureBreach, match="layer 1: expert ids out of range"):
        with moe_lens.record(model, run) as rec:
            with rec.step():
                model(IDS)
            rec.flush()
    assert frame(run, "steps").breaches.tolist() == [1]


def test_another_number_of_choices_than_configured_is_a_breach(model, run):
    model.blocks[0].gate.top_k = 3
    with moe_lens.record(model, run) as rec:
        model.blocks[0].gate.top_k = 2
        with pytest.raises(moe_lens.CaptureBreach, match="configured for 3"), rec.step():
            model(IDS)


def test_k_that_changes_between_steps_is_a_breach(model, run):
    with moe_lens.record(model, run):
        model(IDS)
        model.blocks[0].gate.top_k = 3
        with pytest.raises(moe_lens.CaptureBreach, match="3 choices per token"):
            model(IDS)


def test_a_router_that_means_other_experts_than_ran_is_a_breach(model, run):
    def swap(module, args):
        x, ids, weights = args
        return x, (ids + 1) % 4, weights

    model.blocks[0].experts.register_forward_pre_hook(swap)
    with pytest.raises(moe_lens.CaptureBreach, match=r"layer 0: expert . was chosen"):
        with moe_lens.record(model, run, tokens=1.0) as rec:
            with rec.step():
                model(IDS)
            rec.flush()


def test_experts_that_are_bypassed_are_a_breach_that_names_the_block(model, run):
    block = model.blocks[1]
    block.forward = lambda x: x  # as a fused kernel would: no child module is called
    with (
        moe_lens.record(model, run) as rec,
        pytest.raises(moe_lens.CaptureBreach, match=r"blocks\.1 ran, but its experts were not"),
        rec.step(),
    ):
        model(IDS)


def test_breaches_can_be_warnings_that_are_counted(model, run):
    model.blocks[1].forward = lambda x: x
    with pytest.warns(UserWarning, match="its experts were not called"):
        with moe_lens.record(model, run, on_breach="warn") as rec, rec.step():
            model(IDS)
    steps = frame(run, "steps")
    assert (steps.fires_expected.sum(), steps.fires_seen.sum()) == (2, 1)
    assert steps.breaches.sum() > 0


def test_a_block_that_never_runs_is_a_warning_at_close(run):
    class Half(TinyModel):
        def forward(self, input_ids):
            return self.blocks[0](self.embed(input_ids))

    model = Half().eval()
    with pytest.warns(UserWarning, match="1 MoE blocks never ran, blocks.1 first"):
        with moe_lens.record(model, run) as rec, rec.step():
            model(IDS)
    assert open_run(run).meta.never_entered == ["blocks.1"]


def test_a_recording_that_saw_nothing_is_a_breach(model, run, tmp_path):
    with pytest.raises(moe_lens.CaptureBreach, match="nothing was recorded"):
        with moe_lens.record(model, run):
            pass
    with moe_lens.record(model, tmp_path / "b") as rec:
        with pytest.raises(moe_lens.CaptureBreach, match="did not run"), rec.step():
            pass
        model(IDS)


def test_steps_do_not_nest_and_their_numbers_grow(model, run):
    with moe_lens.record(model, run) as rec:
        with rec.step(number=7):
            model(IDS)
            with pytest.raises(moe_lens.CaptureBreach, match=r"inside rec.step"), rec.step():
                pass
        with pytest.raises(ValueError, match="must be at least 8"), rec.step(number=3):
            pass
        model(IDS)
    assert frame(run, "steps").step.tolist() == [7, 8]


def test_wrong_options_are_refused_before_anything_is_made(model, run):
    for wrong in ({"tokens": 1.5}, {"weights": "fp8"}, {"keys": ["tag"]}, {"layout": "bsd"}):
        with pytest.raises(ValueError, match=r"tokens=|weights=|keys|layout="):
            moe_lens.record(model, run, **wrong)
    with pytest.raises(ValueError, match="on_breach"):
        moe_lens.record(model, run, on_breach="ignore")
    with moe_lens.record(model, run) as rec, rec.step():  # and the model is free again
        model(IDS)


# -- torch.compile ---------------------------------------------------------------------------------


def test_attached_before_compile_records_what_eager_does(model, run, tmp_path):
    with torch.no_grad():
        with moe_lens.record(model, tmp_path / "eager", tokens=1.0) as rec, rec.step():
            model(IDS)
        with moe_lens.record(model, run, tokens=1.0) as rec:
            compiled = torch.compile(model, backend="eager")
            for _ in range(2):
                with rec.step():
                    compiled(IDS)
    torch._dynamo.reset()
    eager, fast = frame(tmp_path / "eager", "routing"), frame(run, "routing")
    for step in (0, 1):
        mine = fast[fast.step == step].sort_values(["layer", "token"])
        assert [list(x) for x in mine.expert_ids] == [list(x) for x in eager.expert_ids]


@pytest.mark.parametrize("in_place", [False, True])
def test_attached_after_compile_is_a_breach_with_the_remedy(model, run, in_place):
    with torch.no_grad():
        if in_place:
            model.compile(backend="eager")
            compiled = model
        else:
            compiled = torch.compile(model, backend="eager")
        compiled(IDS)
        with pytest.raises(moe_lens.CaptureBreach, match=r"torch\._dynamo\.reset"):
            with moe_lens.record(compiled, run) as rec, rec.step():
                compiled(IDS)
    torch._dynamo.reset()


# -- resuming, dying, forking ----------------------------------------------------------------------


def test_resume_goes_on_and_a_step_recorded_again_supersedes(model, run):
    with moe_lens.record(model, run, tokens=1.0) as rec:
        for _ in range(4):
            with rec.step(tags="first"):
                model(IDS)
    with moe_lens.record(model, run, tokens=1.0, resume=True) as rec:
        for number in (2, 3, 4):
            with rec.step(tags="second", number=number):
                model(IDS)
    assert [a.first_step for a in open_run(run).meta.attempts] == [0, 2]
    steps = moe_lens.open(run).sql("select step from steps order by step").df()
    assert steps.step.tolist() == [0, 1, 2, 3, 4]
    tags = moe_lens.open(run).sql(
        "select step, any_value(tag) tag from slices group by 1 order by 1"
    )
    assert tags.df().tag.tolist() == ["first", "first", "second", "second", "second"]
    sequences = frame(run, "sequences")
    assert sequences.sequence.is_unique


def test_resume_without_number_goes_on_after_the_last_step(model, run):
    for resume in (False, True):
        with moe_lens.record(model, run, resume=resume) as rec, rec.step():
            model(IDS)
    assert frame(run, "steps").step.tolist() == [0, 1]
    assert frame(run, "steps").window.is_unique


def test_resume_with_other_weights_is_refused(model, run):
    with moe_lens.record(model, run) as rec, rec.step():
        model(IDS)
    with pytest.raises(moe_lens.TraceError, match="weights='bf16'"):
        moe_lens.record(model, run, resume=True, weights="exact")


def test_a_live_trace_is_not_recovered_by_someone_else(model, run):
    code = f"import moe_lens; moe_lens.recover({str(run)!r})"
    with moe_lens.record(model, run) as rec:
        with rec.step():
            model(IDS)
        rec.flush()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"is being written by process {os.getpid()}" in done.stderr
        with pytest.raises(moe_lens.TraceLocked):
            moe_lens.recover(run)
        assert len(frame(run, "steps")) == 1  # reading it is fine
    assert moe_lens.recover(run) == []


def test_a_script_that_ends_without_closing_loses_nothing(run):
    code = f"""
        import torch, moe_lens
        from support.models import TinyModel
        model = TinyModel().eval()
        rec = moe_lens.record(model, {str(run)!r})
        for _ in range(3):
            with rec.step():
                model(torch.arange(12).reshape(3, 4))
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=env)
    assert len(frame(run, "steps")) == 3
    assert open_run(run).meta.attempts[-1].end == "closed"


def test_a_forked_child_records_nothing_and_hangs_on_nothing(model, run):
    with moe_lens.record(model, run) as rec:
        with rec.step():
            model(IDS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: the point here
            child = os.fork()
        if child == 0:
            ok = not any(m._forward_hooks for m in model.modules())
            os._exit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0
        with rec.step():
            model(IDS)
    assert len(frame(run, "steps")) == 2


def test_inference_mode_and_bf16_record(model, run):
    model = model.to(torch.bfloat16)
    with torch.inference_mode(), moe_lens.record(model, run, tokens=1.0) as rec, rec.step():
        model(IDS)
    info = open_run(run).meta.layers[0]
    assert (info.score, info.selection) == ("softmax", "logits")
    assert len(frame(run, "routing")) == 24


# -- layers are reduced when the forward is over ---------------------------------------------------


def _double_weights(module, args, output):
    args[2].mul_(2)  # the gate weights, after the experts used them


def test_weights_changed_in_place_after_use_are_a_breach(model, run):
    block = model.blocks[0]
    block.experts.register_forward_hook(_double_weights)
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec:
        with pytest.raises(moe_lens.CaptureBreach, match="changed its routing in place"):
            with rec.step():
                model(IDS)


def test_in_inference_mode_a_change_in_place_is_not_seen(model, run, tmp_path):
    with torch.inference_mode():
        with moe_lens.record(model, tmp_path / "a", tokens=1.0, weights="exact") as rec, rec.step():
            model(IDS)
        model.blocks[0].experts.register_forward_hook(_double_weights)
        with moe_lens.record(model, run, tokens=1.0, weights="exact") as rec, rec.step():
            model(IDS)
    before, after = frame(tmp_path / "a", "routing"), frame(run, "routing")
    assert [list(w) for w in after.weights] == [list(w) for w in before.weights]


def test_large_forwards_are_reduced_layer_by_layer_with_the_same_result(
    model, run, tmp_path, monkeypatch
):
    tags = ["a", "b", "a"]
    with moe_lens.record(model, tmp_path / "a", tokens=1.0) as rec, rec.step(tags=tags):
        model(IDS)
    monkeypatch.setattr("moe_lens_hooks.intake.PENDING_BYTES", 1)
    with moe_lens.record(model, run, tokens=1.0) as rec, rec.step(tags=tags):
        model(IDS)
    for table in ("load", "routers", "routing", "layers"):
        assert frame(run, table).equals(frame(tmp_path / "a", table))


def test_autocast_of_the_model_does_not_reach_the_sums(run, tmp_path):
    model, sums = TinyModel(blocks=1).eval(), []
    for path, enabled in ((run, True), (tmp_path / "b", False)):
        with moe_lens.record(model, path) as rec, rec.step():
            with torch.autocast("cpu", enabled=False):
                x = model.embed(IDS)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                model.blocks[0](x)
        sums.append(frame(path, "load").prob_sum.sum())
    assert sums[0] == pytest.approx(12, rel=1e-3)
    assert sums[1] == pytest.approx(12, rel=1e-3)
