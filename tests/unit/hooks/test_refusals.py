"""What the recorder refuses or reports, naming the layer and the remedy."""

from __future__ import annotations

import pytest
import torch
from support.models import TinyModel
from support.tables import frame
from torch import nn

import moe_lens
from moe_lens.trace.reader import open_run

IDS = torch.arange(12).reshape(3, 4)


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
        pytest.raises(moe_lens.CaptureBreach, match=r"blocks\.1 ran, but its adapter"),
        rec.step(),
    ):
        model(IDS)


def test_breaches_can_be_warnings_that_are_counted(model, run):
    model.blocks[1].forward = lambda x: x
    with pytest.warns(UserWarning, match="its adapter .* saw no ids"):
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
    # what runs outside of any step belongs to the last that was numbered
    assert frame(run, "steps")[["step", "forward"]].to_numpy().tolist() == [[7, 0], [7, 1]]


def test_wrong_options_are_refused_before_anything_is_made(model, run):
    for wrong in ({"tokens": 1.5}, {"weights": "fp8"}, {"keys": ["tag"]}, {"layout": "bsd"}):
        with pytest.raises(ValueError, match=r"tokens=|weights=|keys|layout="):
            moe_lens.record(model, run, **wrong)
    with pytest.raises(ValueError, match="on_breach"):
        moe_lens.record(model, run, on_breach="ignore")
    with moe_lens.record(model, run) as rec, rec.step():  # and the model is free again
        model(IDS)


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
