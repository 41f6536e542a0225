"""On a GPU: the same trace as on a CPU, no forward that waits, nothing read before it landed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.models import TinyModel, build
from support.tables import frame
from support.telling import Telling, assert_recorded, kept

import moe_lens

IDS = torch.arange(24).reshape(3, 8)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8, [1] * 8])


@pytest.fixture
def telling():
    torch.manual_seed(0)
    return Telling().eval().cuda()


def test_rows_are_what_the_experts_were_given(telling, run):
    said = []
    with torch.no_grad(), moe_lens.record(telling, run, tokens=1.0, weights="exact") as rec:
        for shift in range(3):
            with rec.step():
                said.append(kept(telling(IDS.cuda() + shift)[1]))
    assert_recorded(run, said)


def test_the_trace_is_that_of_a_cpu(tmp_path):
    folders = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = TinyModel(experts=8, width=16).eval().double().to(device)
        folders[device] = tmp_path / device
        options = {"tokens": 1.0, "weights": "exact", "logits": True, "token_ids": True}
        with torch.no_grad(), moe_lens.record(model, folders[device], **options) as rec:
            for _ in range(3):
                with rec.step(tags=["a", "b", "a"]):
                    out = model(IDS.to(device), attention_mask=MASK.to(device))
                    rec.loss(out.mean(-1))
    exact = {
        "load": ["step", "layer", "tag", "expert", "routed", "processed", "padding"],
        "layers": ["step", "layer", "tokens", "padding_tokens", "max_load", "touched"],
        "tokens": ["step", "token", "sequence", "position", "padding", "tag", "token_id"],
        "steps": ["step", "tokens", "sampled", "fires_expected", "fires_seen", "breaches"],
        "sequences": ["sequence", "tag"],
    }
    for table, columns in exact.items():
        cpu, gpu = (frame(folders[d], table)[columns] for d in ("cpu", "cuda"))
        assert cpu.equals(gpu), table
    cpu, gpu = (frame(folders[d], "routing") for d in ("cpu", "cuda"))
    assert np.stack(cpu.expert_ids).tolist() == np.stack(gpu.expert_ids).tolist()
    for column in ("weights", "next_ids"):
        np.testing.assert_allclose(np.stack(cpu[column]), np.stack(gpu[column]), rtol=1e-5)
    for column in ("entropy", "margin"):
        np.testing.assert_allclose(cpu[column], gpu[column], rtol=2e-2, atol=1e-5)
    cpu, gpu = (frame(folders[d], "routers") for d in ("cpu", "cuda"))
    for column in ("entropy_sum", "margin_sum", "top1_prob_sum", "zloss_sum"):
        np.testing.assert_allclose(cpu[column], gpu[column], rtol=1e-4)


@pytest.mark.parametrize("tokens", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "said",
    [
        {},
        {"tags": ["a", "b", "a"]},
        {"tags": [["a"] * 8, ["b"] * 8, ["a", "b"] * 4]},
        {"sequences": ["x", "y", "z"]},
        {"sequences": [0, 5, 11, 24], "tags": ["a", "b", "a"]},
        {"padding": [8, 4, 6]},
    ],
)
def test_no_forward_waits_for_the_device(run, no_waiting, tokens, said):
    torch.manual_seed(0)
    model = TinyModel().eval().cuda()
    ids, mask = IDS.cuda(), None if "padding" in said else MASK.cuda()
    with torch.no_grad(), moe_lens.record(model, run, tokens=tokens, logits=True) as rec:
        with rec.step(**said):
            model(ids, mask)  # the first forward learns what the logits mean: it looks at numbers
        for _ in range(3):
            no_waiting(True)
            with rec.step(**said):
                rec.loss(model(ids, mask).mean(-1))
            no_waiting(False)
    assert frame(run, "steps").fires_seen.tolist() == [2] * 4


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_models_of_transformers_do_not_wait(run, no_waiting, family):
    model = build(family).cuda()
    model.set_experts_implementation("batched_mm")
    ids = torch.randint(0, 96, (3, 8), device="cuda")
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec:
        for step in range(3):
            no_waiting(step > 0)
            with rec.step():
                model(ids, use_cache=False)
            no_waiting(False)
    steps = frame(run, "steps")
    assert (steps.fires_seen == steps.fires_expected).all()


def test_late_copies_are_waited_for_and_sources_are_ours(telling, run):
    big = torch.randn(8192, 8192, device="cuda")
    ids, said = IDS.cuda(), []
    with torch.no_grad(), moe_lens.record(telling, run, tokens=1.0, weights="exact") as rec:
        for shift in range(20):
            for _ in range(20):
                big = torch.nn.functional.normalize(big @ big)  # the device falls far behind
            ids.copy_(IDS + shift % 8, non_blocking=True)
            with rec.step():
                told = telling(ids)[1]
            said.append(kept(told))
            for ids_TK, weights_TK in told:  # what the model made is written over
                ids_TK.fill_(-1)
                weights_TK.fill_(float("nan"))
            del told
            torch.empty(1 << 20, device="cuda").fill_(7)  # freed memory is used again
    assert_recorded(run, said)


def test_ids_out_of_range_are_a_breach(run):
    model = TinyModel().cuda()
    model.blocks[1].experts.num_experts = 3  # the router still chooses among 4
    with pytest.raises(moe_lens.CaptureBreach, match="layer 1: expert ids out of range"):
        with torch.no_grad(), moe_lens.record(model, run) as rec:
            with rec.step():
                model(IDS.cuda())
            rec.flush()


def test_training_is_not_changed(run):
    def gradients(folder):
        torch.manual_seed(0)
        model = Telling().cuda()
        if folder is None:
            model(IDS.cuda())[0].square().sum().backward()
        else:
            with moe_lens.record(model, folder, tokens=1.0) as rec, rec.step():
                model(IDS.cuda())[0].square().sum().backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(gradients(None), gradients(run), strict=True):
        torch.testing.assert_close(a, b)  # scatter adds in any order


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_layers_on_two_devices(run):
    class Split(Telling):
        def forward(self, input_ids):
            x, said = self.embed(input_ids), []
            for i, block in enumerate(self.blocks):
                y, ids_TK, weights_TK = block(x.to(f"cuda:{i}"))
                x = y
                said.append((ids_TK, weights_TK))
            return x, said

    model = Split().eval().cuda()
    model.blocks[1].to("cuda:1")
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        with rec.step():
            said = kept(model(IDS.cuda())[1])
    assert_recorded(run, [said])
