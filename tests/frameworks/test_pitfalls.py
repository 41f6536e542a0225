"""What goes wrong in silence when routing is captured from transformers, each with what we do.

Padding that is routed, noise of training, tensors of inference mode, the ways in which experts can
be run, code that no hook sees, hooks of others, replicas in threads.
"""

from __future__ import annotations

import threading
import types

import numpy as np
import pytest
import torch
from support.models import EXPERTS, VOCAB, build, switch
from support.tables import frame
from support.truth import spy
from support.zoo import ZOO, batch
from support.zoo import build as build_any
from support.zoo.proof import record

import moe_lens
from moe_lens.errors import CaptureBreach


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def routed(run, layer=0):
    """Ids `[rows, K]` of one layer, in the order in which they came."""
    rows = frame(run, "routing").query("layer == @layer").sort_values(["step", "forward", "token"])
    return np.stack(rows.expert_ids)


# ---- padding ------------------------------------------------------------------------------------


def test_padding_is_routed_kept_and_marked(inputs, tmp_path):
    model = build("qwen3_moe")
    with torch.no_grad(), spy(model) as truth:
        with moe_lens.record(model, tmp_path / "run", tokens=1.0) as rec, rec.step():
            model(**inputs)
    pads = inputs["attention_mask"].flatten() == 0
    tokens = frame(tmp_path / "run", "tokens").sort_values("token")
    assert (tokens.padding.to_numpy() == pads.numpy()).all()
    ids = truth[0][1]
    assert (routed(tmp_path / "run") == ids.numpy()).all()  # rows of padding too
    load = frame(tmp_path / "run", "load").query("layer == 0")
    load = load.groupby("expert")[["routed", "padding"]].sum()
    for expert in range(EXPERTS):
        chosen = (ids == expert).any(-1)
        got = load.loc[expert] if expert in load.index else {"routed": 0, "padding": 0}
        assert got["routed"] == (chosen & ~pads).sum()
        assert got["padding"] == (chosen & pads).sum()


def test_padding_that_comes_first_takes_capacity_from_real_tokens(tmp_path):
    """Switch fills its experts in order: what pads take is lost to tokens, and is in the trace."""
    model = switch(capacity=2)
    ids = torch.randint(3, VOCAB, (1, 12), generator=torch.Generator().manual_seed(3))
    ids[0, :6] = 0
    dropped = {}
    for name, mask in (("padded", (ids != 0).long()), ("all real", torch.ones_like(ids))):
        run = tmp_path / name
        with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec, rec.step():
            model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :2])
        rows = frame(run, "routing").query("layer == 0").sort_values("token")
        # The naive count: a token is dropped when two before it wanted the same expert.
        wanted = [x[0] for x in rows.expert_ids]
        full = [wanted[:t].count(e) >= 2 for t, e in enumerate(wanted)]
        assert [d is not None for d in rows.dropped] == full
        load = frame(run, "load").query("layer == 0")
        real = mask[0].bool().tolist()
        assert load.dropped.sum() == sum(f for f, r in zip(full, real, strict=True) if r)
        assert load.routed.sum() == sum(real)
        dropped[name] = load.dropped.sum()
    assert dropped["padded"] > 0


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "minimax", "phimoe", "switch_transformers"])
def test_with_jitter_in_training_the_ids_are_those_that_ran(name, tmp_path):
    entry = ZOO[name]
    model = build_any(entry).train()
    for module in model.modules():
        for attribute in list(vars(module)):
            if attribute.endswith("jitter_noise"):
                setattr(module, attribute, 0.5)
    run = tmp_path / "run"
    with spy(model) as truth, moe_lens.record(model, run, tokens=1.0) as rec:
        for _ in range(2):
            with rec.step():
                model(**batch(entry))
        model.eval()
        for _ in range(2):
            with rec.step(), torch.no_grad():
                model(**batch(entry))
    assert frame(run, "steps").phase.tolist() == ["train"] * 2 + ["eval"] * 2
    rows = frame(run, "routing").query("layer == 0").sort_values(["step", "forward", "token"])
    path = truth[0][0]
    ran = [ids for p, ids, _ in truth if p == path]
    if name == "switch_transformers":  # a one-hot mask, empty where dropped
        kept = torch.cat([x.flatten(0, 1).any(-1) for x in ran]).numpy()
        ran = [x.flatten(0, 1).argmax(-1, keepdim=True) for x in ran]
        assert [d is None for d in rows.dropped] == kept.tolist()
    else:
        kept = slice(None)
    got, wanted = np.stack(rows.expert_ids), torch.cat(ran).numpy()
    assert (got[kept] == wanted[kept]).all()
    a, b, c, d = np.split(got, 4)
    assert (a != b).any()  # the same batch twice
    assert (c == d).all()


# ---- inference mode, implementations of experts -------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("mixtral", "deepseek_v3", "deepseek_v4", "doge", "ernie4_5_vl_moe", "gemma4", "jetmoe"),
        *("llama4_top2", "longcat_flash", "nllb_moe", "switch_transformers", "zaya"),
    ],
)
def test_inference_mode_records_what_no_grad_records(name, tmp_path):
    entry = ZOO[name]
    model = build_any(entry)
    plain = record(model, batch(entry), tmp_path / "plain")
    with torch.inference_mode():
        inference = record(model, batch(entry), tmp_path / "inference")
    for a, b in zip(plain, inference, strict=True):
        assert a.info == b.info
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.weights, b.weights)
        assert torch.equal(a.kept, b.kept)


@pytest.mark.parametrize(
    "name", ["gemma4", "ernie4_5_vl_moe", "nemotron_h", "muse_spark", "zaya", "dots3_note_vision"]
)
def test_every_way_to_run_the_experts_is_recorded_alike(name, tmp_path):
    entry = ZOO[name]
    model = build_any(entry)
    runs = {}
    for way in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(way)
        runs[way] = record(model, batch(entry), tmp_path / way)
    for way in ("batched_mm", "grouped_mm"):
        for a, b in zip(runs["eager"], runs[way], strict=True):
            assert a.info == b.info
            assert torch.equal(a.ids, b.ids)
            torch.testing.assert_close(a.weights, b.weights, rtol=1e-4, atol=1e-5)


# ---- code that no hook sees ---------------------------------------------------------------------


def breach(model, inputs, run):
    with pytest.raises(CaptureBreach) as raised:
        with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec, rec.step():
            model(**inputs)
    return str(raised.value)


def test_a_block_that_calls_its_experts_without_the_module_is_named(inputs, tmp_path):
    """As gpt-oss in mxfp4: `experts.forward_routed(...)`, and a linear for the router."""
    model = build("gpt_oss")
    block = model.model.layers[1].mlp

    def forward(self, hidden_states):
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits, weights, ids = self.router.forward(x_TD)
        return self.experts.forward(x_TD, ids, weights).view_as(hidden_states), logits

    block.forward = types.MethodType(forward, block)
    said = breach(model, inputs, tmp_path / "run")
    assert "model.layers.1.mlp" in said
    assert "model.layers.0.mlp" not in said
    assert "docs/hooks.md" in said


def test_a_kernel_in_the_place_of_a_block_is_named(inputs, tmp_path):
    """As MegaBlocks through `use_kernel_forward_from_hub`: the whole forward is another."""
    model = build("mixtral")
    for block in model.modules():
        if type(block).__name__ == "MixtralSparseMoeBlock":
            block.forward = types.MethodType(lambda self, x: x * 0.5, block)
    said = breach(model, inputs, tmp_path / "run")
    assert "model.layers.0.mlp" in said


def test_a_kernel_in_the_place_of_a_router_is_seen_through(inputs, tmp_path):
    """As SoftmaxTopKRouter: the module is still called, and so are the experts."""
    model = build("qwen3_moe")

    def forward(self, x):
        logits = x.reshape(-1, x.shape[-1]) @ self.weight.T
        weights, ids = logits.softmax(-1).topk(2)
        return logits, weights.flip(-1), ids.flip(-1)

    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeTopKRouter":
            module.forward = types.MethodType(forward, module)
    with torch.no_grad(), spy(model) as truth:
        with moe_lens.record(model, tmp_path / "run", tokens=1.0) as rec, rec.step():
            model(**inputs)
    for layer, (_, ids, _) in enumerate(truth):
        assert (routed(tmp_path / "run", layer) == ids.numpy()).all()


def test_experts_whose_forward_is_wrapped_on_the_instance_are_seen(inputs, tmp_path):
    """As expert parallelism does it: the ids before dispatch are those of the whole model."""
    model = build("mixtral")
    seen = []

    def dispatching(inner):
        def forward(*args, **kwargs):
            seen.append(args[1].clone())
            return inner(*args, **kwargs)

        return forward

    for module in model.modules():
        if type(module).__name__ == "MixtralExperts":
            module.forward = dispatching(module.forward)
    with torch.no_grad(), moe_lens.record(model, tmp_path / "run", tokens=1.0) as rec, rec.step():
        model(**inputs)
    for layer, ids in enumerate(seen):
        assert (routed(tmp_path / "run", layer) == ids.numpy()).all()


# ---- hooks of others ----------------------------------------------------------------------------


def test_a_hook_of_others_that_replaces_an_output_replaces_it(inputs, tmp_path):
    model = build("mixtral")
    block = model.model.layers[0].mlp
    handle = block.register_forward_hook(lambda module, args, output: output * 0.25)
    with torch.no_grad():
        without = model(**inputs).logits
        with moe_lens.record(model, tmp_path / "run", tokens=1.0) as rec, rec.step():
            recorded = model(**inputs).logits
    handle.remove()
    assert torch.equal(without, recorded)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_of_others_that_changes_what_the_experts_get(when, inputs, tmp_path):
    """It may be attached before the recorder or after: the trace has what the experts got."""
    model = build("mixtral")
    experts = model.model.layers[1].mlp.experts

    def swap(module, args):
        x, ids, weights = args
        return x, (ids + 1) % EXPERTS, weights

    def run(rec):
        with rec.step(), torch.no_grad():
            model(**inputs)

    with spy(model) as truth:
        if when == "before":
            handle = experts.register_forward_pre_hook(swap)
        with pytest.raises(CaptureBreach, match="layer 1: expert"):
            with moe_lens.record(model, tmp_path / "run", tokens=1.0) as rec:
                if when == "after":
                    handle = experts.register_forward_pre_hook(swap)
                run(rec)
    handle.remove()
    for layer in (0, 1, 2):
        assert (routed(tmp_path / "run", layer) == truth[layer][1].numpy()).all()


# ---- replicas -----------------------------------------------------------------------------------


def test_replicas_that_run_in_threads_are_refused(inputs, tmp_path):
    """As DataParallel: shallow copies that share the hooks, each in a thread of its own."""
    model = build("mixtral")
    together = threading.Barrier(2, timeout=20)

    def wait(module, args):
        together.wait()

    copies = [_replica(model) for _ in range(2)]
    for copy in copies:
        copy.model.layers[1].self_attn.register_forward_pre_hook(wait)

    def run(copy):
        with torch.no_grad():
            copy(**inputs)

    with pytest.raises(CaptureBreach, match="DataParallel runs copies of the model in threads"):
        with moe_lens.record(model, tmp_path / "run", tokens=1.0) as rec, rec.step():
            threads = [threading.Thread(target=run, args=(copy,)) for copy in copies]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()


def _replica(module):
    """What torch.nn.parallel.replicate makes, without a device to copy to."""
    copy = module._replicate_for_data_parallel()
    copy._modules = {k: None if v is None else _replica(v) for k, v in module._modules.items()}
    for name, parameter in module._parameters.items():
        setattr(copy, name, parameter)
    return copy
