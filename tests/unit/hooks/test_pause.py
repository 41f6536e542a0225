"""Recording that is stopped and started: whole forwards or none, against a spy on the experts."""

from __future__ import annotations

import random
import threading
import warnings

import numpy as np
import pytest
import torch
from support.models import TinyModel
from support.tables import frame
from support.truth import spy
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_lens
from moe_lens.trace.reader import open_run
from moe_lens_hooks.pausing import NOT_RECORDED

IDS = torch.arange(12).reshape(3, 4)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def traced(run):
    """{(step, forward): [ids [T, K] of each layer]} of a trace with every row."""
    rows = frame(run, "routing").sort_values(["step", "forward", "layer", "token"])
    out = {}
    for (step, forward, _), part in rows.groupby(["step", "forward", "layer"]):
        out.setdefault((step, forward), []).append(np.stack(part.expert_ids).tolist())
    return out


def not_recorded(run):
    return open_run(run).metas[0].warnings.get(NOT_RECORDED, 0)


def ran(calls):
    """What the spy saw since it was last asked."""
    seen = [ids.tolist() for _, ids, _ in calls]
    calls.clear()
    return seen


@pytest.mark.parametrize("seed", range(4))
def test_what_runs_while_recording_is_recorded_and_nothing_else(model, run, seed):
    rng = random.Random(seed)
    truth, on = {}, rng.random() < 0.5
    with spy(model) as calls, moe_lens.record(model, run, tokens=1.0, paused=not on) as rec:
        for step in range(20):
            if rng.random() < 0.4:
                on = not on
                (rec.start if on else rec.stop)()
            model((IDS + step) % 32)
            seen = ran(calls)
            if on:
                truth[step, 0] = seen
        if not truth:
            rec.start()
            model(IDS)
            truth[20, 0] = ran(calls)
    assert traced(run) == truth
    assert not_recorded(run) == 20 + ((20, 0) in truth) - len(truth)
    steps = frame(run, "steps")
    assert sorted(steps.step) == sorted(step for step, _ in truth)  # gaps: what is missing
    assert frame(run, "load").groupby("window").routed.sum().tolist() == [2 * 12 * 2] * len(truth)


def test_a_step_is_recorded_whole_or_not_at_all(model, run):
    with moe_lens.record(model, run, tokens=1.0) as rec:
        with rec.step():
            model(IDS)
            rec.stop()
            model(IDS)
        with rec.step():
            model(IDS)
            rec.start()
            model(IDS)
        with rec.step():
            model(IDS)
    steps = frame(run, "steps").sort_values(["step", "forward"])
    assert list(zip(steps.step, steps.forward, strict=True)) == [(0, 0), (0, 1), (2, 0)]
    assert not_recorded(run) == 2
    assert steps.fires_seen.tolist() == steps.fires_expected.tolist() == [2] * 3


@pytest.mark.parametrize("other_thread", [False, True])
def test_a_forward_ends_as_it_began(model, run, other_thread):
    def inside(call):
        """Calls it between the two blocks of the model."""

        def hook(*_):
            if other_thread:
                thread = threading.Thread(target=call)
                thread.start()
                thread.join()
            else:
                call()
            handle.remove()

        handle = model.blocks[0].register_forward_hook(hook)

    with moe_lens.record(model, run, tokens=1.0, paused=True) as rec:
        inside(rec.start)
        model(IDS)  # 0: began while paused
        inside(rec.stop)
        model(IDS)  # 1: began while recording
        model(IDS)  # 2
        rec.start()
        model(IDS)  # 3
    assert {key: len(layers) for key, layers in traced(run).items()} == {(1, 0): 2, (3, 0): 2}
    assert not_recorded(run) == 2


def test_the_users_numbers_and_an_evaluation_that_follows(model, run):
    with moe_lens.record(model, run, tokens=1.0) as rec:
        with rec.step(number=100):
            model(IDS)
        rec.stop()
        with rec.step(number=101):
            model(IDS)
        rec.start()
        model(IDS)  # outside: a further forward of step 101
        with rec.step(number=102):
            model(IDS)
    assert sorted(traced(run)) == [(100, 0), (101, 1), (102, 0)]


def test_never_started_is_told_in_words_and_is_no_breach(model, run):
    with pytest.warns(UserWarning, match=r"paused whenever the model ran \(2 forwards\)"):
        with moe_lens.record(model, run, paused=True) as rec:
            with rec.step(tags="x"):
                model(IDS)
            model(IDS)
            with rec.step():
                pass
    meta = open_run(run).metas[0]
    assert meta.warnings == {NOT_RECORDED: 2}
    assert meta.never_entered == []
    assert meta.attempts[-1].end == "closed"


def test_a_recorder_that_was_started_and_sees_nothing_is_still_a_breach(model, run):
    with pytest.raises(moe_lens.CaptureBreach, match="nothing was recorded"):
        with moe_lens.record(model, run, paused=True) as rec:
            rec.start()
    with pytest.raises(moe_lens.CaptureBreach, match="model did not run"):
        with moe_lens.record(model, run.with_name("steps"), paused=True) as rec:
            rec.start()
            with rec.step():
                pass


def test_loss_log_and_scalars_do_nothing_while_paused(model, run):
    gate = torch.rand(12, 2)
    choice = torch.arange(24).reshape(12, 2) % 4
    with moe_lens.record(model, run, tokens=1.0) as rec:
        with rec.step():
            model(IDS)
            rec.loss(torch.full((3, 4), 2.0))
        assert rec.scalars()
        rec.stop()
        with rec.step():
            model(IDS)
            rec.loss(torch.full((3, 4), 5.0))
            rec.log("mine", choice, gate, experts=4)
        assert rec.scalars() == {}
        model(IDS)
        rec.loss(torch.full((3, 4), 7.0))  # not of the forward that was recorded last
        with pytest.raises(ValueError, match="must both be"):
            rec.log("mine", choice, gate[:3], experts=4)
    slices = frame(run, "slices")
    assert slices.loss_sum.sum() == 24.0
    assert slices.loss_tokens.sum() == 12
    assert frame(run, "routing").layer.nunique() == 2


def test_routing_by_hand(run):
    gate, choice = torch.rand(6, 2), torch.arange(12).reshape(6, 2) % 4
    with moe_lens.record(None, run, tokens=1.0) as rec:
        for on in (True, False, False, True):
            (rec.start if on else rec.stop)()
            for layer in ("a", "b"):  # the first, again, begins the next forward
                rec.log(layer, choice, gate, experts=4)
    assert {k: len(v) for k, v in traced(run).items()} == {(0, 0): 2, (3, 0): 2}
    assert not_recorded(run) == 2


def test_blocks_without_their_root(model, run):
    x = torch.randn(3, 4, 8)
    with moe_lens.record(model, run, tokens=1.0, paused=True) as rec:
        for block in model.blocks:
            block(x)
        rec.start()  # the forward goes on until a block runs again
        for _ in range(2):
            for block in model.blocks:
                block(x)
    assert {k: len(v) for k, v in traced(run).items()} == {(1, 0): 2, (2, 0): 2}
    assert not_recorded(run) == 1


def test_the_model_computes_the_same_and_hooks_stay_out_of_it(model, run):
    bare = model(IDS)
    with pytest.warns(UserWarning, match="paused"):
        with moe_lens.record(model, run, paused=True):
            assert torch.equal(model(IDS), bare)


def test_a_forward_that_raises_while_paused(model, run):
    with moe_lens.record(model, run, tokens=1.0, paused=True) as rec:
        with pytest.raises(IndexError):
            model(IDS + 100)
        model(IDS)
        rec.start()
        model(IDS)
    assert len(traced(run)) == 1
    warned = open_run(run).metas[0].warnings
    assert warned == {NOT_RECORDED: 2}  # and no forward that an exception ended


def test_a_forward_that_raises_where_recording_begins_again(model, run):
    """Compiled or not, what a thread left behind must not keep recording off."""
    with moe_lens.record(model, run, tokens=1.0, paused=True) as rec:
        rec._capture.enter_root(0, {})  # as compiled code that raised
        rec.start()
        model(IDS)
    assert len(traced(run)) == 1


def test_a_thread_that_ended_inside_a_forward_does_not_keep_recording_off(model, run):
    with moe_lens.record(model, run, tokens=1.0, paused=True) as rec:
        for _ in range(2):  # as compiled code that raised, in threads that are gone
            thread = threading.Thread(target=rec._capture.enter_root, args=(0, {}))
            thread.start()
            thread.join()
        rec.start()
        model(IDS)
    assert len(traced(run)) == 1
    assert not frame(run, "steps").breaches.any()


def test_a_resumed_trace_adds_what_was_not_recorded(model, run):
    for attempt in range(2):
        with moe_lens.record(model, run, tokens=1.0, resume=attempt > 0) as rec:
            model(IDS)
            rec.stop()
            model(IDS)
            model(IDS)
    assert not_recorded(run) == 4
    assert frame(run, "steps").step.tolist() == [0, 1]


def test_a_recomputation_after_stop_is_not_recorded(run):
    class Checkpointed(TinyModel):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=False)
            return x

    torch.manual_seed(0)
    model = Checkpointed()
    with torch.enable_grad(), moe_lens.record(model, run, tokens=1.0) as rec:
        for stop in (False, True):
            loss = model(IDS).square().mean()
            (rec.stop if stop else rec.start)()
            loss.backward()
        loss = model(IDS).square().mean()
        rec.start()
        loss.backward()
    assert {k: len(v) for k, v in traced(run).items()} == {(0, 0): 2, (1, 0): 2}


# -- several roots, several threads ---------------------------------------------------------------


class Chunk(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def test_a_micro_batch_keeps_its_state_through_all_chunks(model, run):
    chunks = [Chunk([model.blocks[0]]), Chunk([model.blocks[1]])]
    x = [torch.randn(3, 4, 8) for _ in range(4)]
    with moe_lens.record(chunks, run, tokens=1.0) as rec:
        with rec.step():
            y = [chunks[0](v) for v in x[:2]]
            rec.stop()
            for v in y:
                chunks[1](v)
        for v in x:  # each a step: chunk by chunk
            v = chunks[0](v)
            chunks[1](v)
        v = chunks[0](x[0])
        rec.start()
        chunks[1](v)
        chunks[1](chunks[0](x[0]))
    assert {k: len(v) for k, v in traced(run).items()} == {(0, 0): 2, (0, 1): 2, (6, 0): 2}
    assert not frame(run, "steps").breaches.any()
    assert not_recorded(run) == 5


def test_threads_that_overlap_while_paused_are_never_recorded_from_the_middle(model, run):
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is other:
            inside.set()
            assert go_on.wait(20)

    handle = model.blocks[0].register_forward_hook(wait)
    other = threading.Thread(target=lambda: torch.no_grad()(model)(IDS))
    with moe_lens.record(model, run, tokens=1.0, paused=True) as rec:
        mid = model.blocks[0].register_forward_pre_hook(
            lambda *_: None if other.ident else (other.start(), inside.wait(20), None)[-1]
        )
        model(IDS)  # the other thread begins inside, and is still running after
        rec.start()
        model(IDS)  # not recorded either: the other is in the middle
        go_on.set()
        other.join()
        model(IDS)
        mid.remove()
        handle.remove()
    assert {len(v) for v in traced(run).values()} == {2}
    assert len(traced(run)) == 1
    assert not frame(run, "steps").breaches.any()
    assert not_recorded(run) == 3


def test_closing_while_a_skipped_forward_is_open(model, run):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rec = moe_lens.record(model, run, paused=True)
        rec._capture.enter_root(0, {})
        rec.close()
    assert not model._forward_hooks
    assert open_run(run).metas[0].warnings == {NOT_RECORDED: 1}
