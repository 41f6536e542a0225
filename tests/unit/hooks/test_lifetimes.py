"""Resuming, dying, forking; and what may happen between a decision and its record."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from support.models import TinyModel
from support.tables import frame

import moe_lens
from moe_lens.trace.reader import open_run

IDS = torch.arange(12).reshape(3, 4)


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
    monkeypatch.setattr("moe_lens_hooks.capture.HELD_BYTES", 1)
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
