"""Models that change while they are recorded, and hooks of others on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.inline_models import (
    GLU,
    D,
    E,
    build,
)
from support.models import TinyModel
from support.small import IDS, ids_of
from support.tables import frame

import moe_lens

# ---- models that change while they are recorded --------------------------------------------------


def test_an_expert_that_is_replaced_while_recording_is_a_breach(tmp_path):
    model, run = build("softmax_topk", blocks=1), tmp_path / "run"
    with pytest.raises(moe_lens.CaptureBreach, match="another number of tokens") as caught:
        with torch.no_grad(), moe_lens.record(model, run) as rec:
            with rec.step():
                model(IDS)
            model.blocks[0].experts[1] = GLU()
            with rec.step():
                model(IDS)
            rec.flush()
    assert "layer 0" in str(caught.value)


def test_a_gate_that_is_replaced_while_recording_is_told_at_close(tmp_path):
    model = TinyModel().eval()
    with pytest.raises(moe_lens.CaptureBreach, match=r"TinyRouter in .* blocks\.1 was replaced"):
        with torch.no_grad(), moe_lens.record(model, tmp_path / "run") as rec:
            with rec.step():
                model(IDS % 32)
            model.blocks[1].gate = type(model.blocks[1].gate)(4, 2, 8)
            with rec.step():
                model(IDS % 32)


def test_a_layer_put_in_or_taken_out_while_recording_is_told_at_close(tmp_path):
    for change, match in {
        "in": r"the MoE block blocks\.2 was put in",
        "out": r"the MoE block blocks\.1 was taken out",
    }.items():
        model = TinyModel().eval()
        with pytest.raises(moe_lens.CaptureBreach, match=match):
            with torch.no_grad(), moe_lens.record(model, tmp_path / change) as rec:
                with rec.step():
                    model(IDS % 32)
                if change == "in":
                    model.blocks.append(type(model.blocks[0])())
                else:
                    del model.blocks[1]
                with rec.step():
                    model(IDS % 32)
        layers = frame(tmp_path / change, "layers")
        assert set(layers.layer) == {0, 1}  # what ran and was seen is there


# ---- hooks of others -----------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_a_hook_that_changes_the_gates_output_changes_what_is_recorded(late, tmp_path):
    model, run, seen = build("deepseek", blocks=1), tmp_path / "run", []
    block = model.blocks[0]

    def flip(module, args, output):
        return E - 1 - output[0], output[1]

    for e, expert in enumerate(block.experts):
        expert.register_forward_pre_hook(lambda m, a, e=e: seen.append((e, len(a[0]))))
    if not late:
        block.gate.register_forward_hook(flip)
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec:
        if late:
            block.gate.register_forward_hook(flip)
        for _ in range(2):
            seen.clear()
            with rec.step():
                model(IDS)
    for step in range(2):
        got = np.bincount(ids_of(run, step=step).flatten(), minlength=E)
        assert {e: n for e, n in enumerate(got) if n} == dict(seen[-np.count_nonzero(got) :])
    plain, _ = block.gate.forward(model.embed(IDS))
    assert (np.sort(ids_of(run)) == np.sort(E - 1 - plain.numpy())).all()


@pytest.mark.parametrize("late", [False, True])
def test_a_hook_on_the_block_that_changes_its_output_does_not_disturb(late, tmp_path):
    model, run = build("top1", blocks=1), tmp_path / "run"

    def double(module, args, output):
        return output * 2

    if not late:
        model.blocks[0].register_forward_hook(double)
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec:
        if late:
            model.blocks[0].register_forward_hook(double)
        with rec.step():
            model(IDS)
        want = model.blocks[0].switch(model.embed(IDS).view(-1, D)).argmax(-1)
    assert (ids_of(run)[:, 0] == want.numpy()).all()


def test_a_hook_that_replaces_an_experts_output_is_seen_as_part_of_it(tmp_path):
    model, run = build("top1", blocks=1), tmp_path / "run"
    for expert in model.blocks[0].experts.values():
        expert.register_forward_hook(lambda m, a, out: out * 3 + 1)
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec, rec.step():
        model(IDS)
    want = model.blocks[0].switch(model.embed(IDS).view(-1, D)).argmax(-1)
    assert (ids_of(run)[:, 0] == want.numpy()).all()
