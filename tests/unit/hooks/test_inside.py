"""Routing seen inside a block: equal to arithmetic done apart, and to what ablation says."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from support.inline_models import (
    ROUTING,
    D,
    E,
    EveryExpert,
    HashTable,
    K,
    Model,
    SoftmaxTopk,
    TutorialMoE,
    build,
)
from support.inside import Stateful, arithmetic, captured, inputs_of, record, sets_agree, softmax
from support.tables import frame
from torch import nn

import moe_lens
from moe_lens.trace.reader import open_run


@pytest.fixture
def ids():
    return torch.randint(0, 64, (3, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ROUTING)
def test_ids_and_weights_are_those_of_the_arithmetic(kind, ids, tmp_path):
    model = build(kind)
    run = tmp_path / "run"
    record(model, run, ids, steps=3)
    for layer, (block, x) in enumerate(zip(model.blocks, inputs_of(model, ids), strict=True)):
        for step in range(3):
            assert sets_agree(captured(run, layer, step), arithmetic(kind, block, x))
    infos = open_run(run).meta.layers
    assert [(i.experts, i.top_k) for i in infos] == [
        (E, 1 if "top1" in kind else infos[0].top_k)
    ] * 2


@pytest.mark.parametrize("kind", ROUTING)
def test_recording_changes_no_bit_and_leaves_nothing_behind(kind, ids, tmp_path):
    model = build(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = [set(m.__dict__) for m in model.modules()]
    with torch.no_grad():
        want = model(ids)
    got = record(model, tmp_path / "run", ids, steps=2)
    assert torch.equal(want, got)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", [k for k in ROUTING if k not in ("dbrx", "dense_scores")])
def test_putting_an_expert_out_of_action_changes_the_tokens_that_the_trace_names(
    kind, ids, tmp_path
):
    model = build(kind, blocks=1)
    run = tmp_path / "run"
    record(model, run, ids)
    got, _ = captured(run, 0)
    with torch.no_grad():
        whole = model(ids).reshape(-1, D)
    for e in range(E):
        saved = {k: v.clone() for k, v in model.state_dict().items()}
        with torch.no_grad():
            for name, p in model.blocks[0].named_parameters():
                if p.ndim == 3:
                    p[e] = 0
                elif any(part in (str(e), f"expert_{e}") for part in name.split(".")[:-1][:2]):
                    p.zero_()
            changed = (model(ids).reshape(-1, D) != whole).any(-1).numpy()
        model.load_state_dict(saved)
        assert (changed == (got == e).any(1)).all(), e


def test_the_same_in_inference_mode_autocast_bf16_and_one_token_at_a_time(ids, tmp_path):
    for name, mode in {
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }.items():
        model, calls = build("softmax_topk", blocks=1), []
        run = tmp_path / name
        experts = model.blocks[0].experts
        for e, expert in enumerate(experts):
            expert.register_forward_pre_hook(
                lambda m, a, e=e, calls=calls: calls.append((e, len(a[0])))
            )
        with mode, moe_lens.record(model, run, tokens=1.0) as rec:
            for x in (ids, ids[:, :1], ids[:1, :1]):
                calls.clear()
                with rec.step():
                    model(x)
        got = captured(run, 0, step=2)[0]
        assert sorted(got[0]) == sorted(e for e, _ in calls)  # the last step has one token
        assert len(captured(run, 0, step=1)[0]) == 3
    half = build("deepseek", blocks=1).bfloat16()
    record(half, tmp_path / "half", ids)
    ids_TK, weights_TK = captured(tmp_path / "half", 0)
    assert ids_TK.shape == (24, K)
    np.testing.assert_allclose(weights_TK.sum(1), 2.5, rtol=1e-2)


@pytest.mark.parametrize("kind", ["softmax_topk", "dense_scores"])
def test_gradients_survive_under_autocast(kind, ids, tmp_path):
    """Autocast keeps casts of weights: those of a trial must not stay, nor stale ones serve it."""

    def gradients(recorded):
        model = build(kind).train()
        with torch.autocast("cpu", torch.bfloat16):
            if recorded:
                with moe_lens.record(model, tmp_path / "run") as rec, rec.step():
                    out = model(ids)
            else:
                out = model(ids)
            out.float().square().mean().backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_state_and_chance_go_on_as_if_nothing_had_been_tried(ids, tmp_path):
    def trained(recorded):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        model = build(Stateful).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        losses, run = [], tmp_path / "run"
        rec = moe_lens.record(model, run, tokens=1.0) if recorded else None
        for _ in range(3):
            loss = model(ids).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append((loss.item(), model.blocks[0].output.sum().item()))
        if rec is not None:
            rec.close()
        block = model.blocks[0]
        state = [*model.state_dict().values(), *block.history, block.last, block.output]
        return losses, state, (len(block.history), block.calls), random.random(), torch.rand(2)

    plain, watched = trained(False), trained(True)
    assert plain[0] == watched[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], watched[1], strict=True))
    assert plain[2] == watched[2] == (3, {"n": 3})
    assert plain[3] == watched[3]
    assert torch.equal(plain[4], watched[4])
    steps = frame(tmp_path / "run", "steps")
    assert steps.breaches.sum() == 0
    assert (steps.phase == "train").all()


def test_hooks_of_the_user_fire_once_each(ids, tmp_path):
    model, calls = build("softmax_topk", blocks=1), []
    for name in ("gate", "experts.0", "experts.1"):
        module = model.blocks[0].get_submodule(name)
        module.register_forward_hook(lambda m, a, out, name=name: calls.append(name))
    with torch.no_grad():
        model(ids)
    want = list(calls)
    calls.clear()
    record(model, tmp_path / "run", ids)
    assert calls == want


def test_what_a_hook_puts_in_place_of_the_gates_output_is_what_is_recorded(ids, tmp_path):
    model, run = build("deepseek", blocks=1), tmp_path / "run"
    fixed = torch.tensor([[1, 4]]).expand(24, 2).contiguous(), torch.full((24, 2), 0.25)
    model.blocks[0].gate.register_forward_hook(lambda m, a, out: fixed)
    record(model, run, ids, steps=2)
    for step in range(2):
        got, weights = captured(run, 0, step)
        assert (got == [1, 4]).all()
        assert (weights == 0.25).all()


def test_training_and_evaluation_take_different_ways_through_one_block(ids, tmp_path):
    model, run = build("deepseek", blocks=1), tmp_path / "run"
    with moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        for mode in (True, False, True):
            model.train(mode)
            with rec.step():
                model(ids)
    want = arithmetic("deepseek", model.blocks[0], inputs_of(model, ids)[0])
    for step in range(3):
        assert sets_agree(captured(run, 0, step), want)
    assert frame(run, "steps").phase.tolist() == ["train", "eval", "train"]


def test_noise_in_training_is_part_of_what_is_recorded(ids, tmp_path):
    model, run = build("noisy_tutorial", blocks=1), tmp_path / "run"
    chosen = []
    model.blocks[0].router.register_forward_hook(lambda m, a, out: chosen.append(out))
    with moe_lens.record(model, run, tokens=1.0, weights="exact", logits=True) as rec:
        for training in (False, True, True):
            model.train(training)
            with rec.step():
                model(ids)
    assert len(chosen) == 3
    router = model.blocks[0].router
    clean = router.topk_linear(model.embed(ids)).flatten(0, 1).detach().numpy()
    assert len(frame(run, "logits")) == 3 * 24
    for _, rows in frame(run, "logits").groupby("step"):  # the gate's, not those of its noise
        got = np.stack(rows.sort_values("token").logits)
        np.testing.assert_allclose(got, clean, rtol=2**-7)  # the trace rounds them to bf16
    for step in range(3):
        gates, want = (x.detach().flatten(0, 1) for x in chosen[step])
        got, weights = captured(run, 0, step)
        assert (got == want.numpy()).all()
        assert (weights == gates.gather(1, want).numpy()).all()
    assert (captured(run, 0, 1)[0] != captured(run, 0, 2)[0]).any()


def test_experts_looked_up_by_token_need_no_gate(ids, tmp_path):
    torch.manual_seed(0)
    model, run = Model(HashTable()).eval(), tmp_path / "run"
    record(model, run, ids, steps=2)
    got, weights = captured(run, 0)
    assert (got[:, 0] == model.blocks[0].table[ids].flatten().numpy()).all()
    assert (weights == 1).all()
    assert open_run(run).meta.layers[0].score is None


@pytest.mark.parametrize("shape", [(6, 2), (2, 6), (12, 1), (1, 6), (2, 2), (6, 6)])
def test_batches_whose_sizes_are_those_of_experts_or_choices(shape, tmp_path):
    """Then tensors of other meanings have the shape of ids, weights or logits too."""
    torch.manual_seed(0)
    for kind in ("softmax_topk", "every_expert", "top1"):
        model, run = build(kind, blocks=1), tmp_path / kind
        ids = torch.randint(0, 64, shape)
        record(model, run, ids, steps=2)
        want = arithmetic(kind, model.blocks[0], inputs_of(model, ids)[0])
        for step in range(2):
            assert sets_agree(captured(run, 0, step), want)


def test_as_many_experts_as_hidden_units_or_as_choices(tmp_path, monkeypatch, ids):
    wide = SoftmaxTopk()
    wide.num_experts = D
    wide.gate = nn.Linear(D, D, bias=False)
    wide.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(D))
    every = SoftmaxTopk()
    every.top_k = E
    for name, block in {"wide": wide, "every": every}.items():
        torch.manual_seed(0)
        model = Model(block).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.5)
        run = tmp_path / name
        record(model, run, ids)
        z = inputs_of(model, ids)[0] @ block.gate.weight.detach().double().numpy().T
        order = np.argsort(-z)[:, : block.top_k]
        want = order, softmax(np.take_along_axis(z, order, 1))
        assert sets_agree(captured(run, 0), want)
        sums = frame(run, "routers").zloss_sum.iloc[0]
        assert sums == pytest.approx((np.log(np.exp(z).sum(1)) ** 2).sum(), rel=1e-4)


def test_logits_are_the_gates_and_their_meaning_is_learned(ids, tmp_path):
    for kind in ("softmax_topk", "noisy_tutorial", "raw_gate", "sorted"):
        model, run = build(kind, blocks=1), tmp_path / kind
        record(model, run, ids, logits=True)
        info = open_run(run).meta.layers[0]
        assert (info.score, info.selection) == ("softmax", "logits"), kind
        ids_TK, _ = captured(run, 0)
        logits = np.stack(frame(run, "logits").logits)
        assert (np.sort(np.argsort(-logits)[:, :K]) == np.sort(ids_TK)).all()


def test_a_product_that_has_no_part_in_the_choice_is_not_taken_for_logits(ids, tmp_path):
    class Mixed(HashTable):
        """As many experts as hidden units, and a mixing matrix that may be mistaken for a gate."""

        def __init__(self):
            super().__init__()
            self.table.random_(0, D)
            self.mix = nn.Linear(D, D)
            self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(D))

        def forward(self, x, tokens):
            ids, w, x = self.table[tokens], x.mean(-1).sigmoid(), self.mix(x)
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                out[ids == e] = w[ids == e, None] * expert(x[ids == e])
            return out

    torch.manual_seed(0)
    model, run = Model(Mixed()).eval(), tmp_path / "run"
    record(model, run, ids, logits=True)
    assert (captured(run, 0)[0][:, 0] == model.blocks[0].table[ids].flatten().numpy()).all()
    assert len(frame(run, "logits")) == 0
    assert frame(run, "routers").zloss_sum.isna().all()


def test_a_gate_of_dense_scores_must_stay_zero_outside_of_the_choice(ids, tmp_path):
    class Leaky(EveryExpert):
        leak = 0.0

        def forward(self, x):
            top, ids = self.wg(x).topk(K, dim=-1)
            w = torch.full((*x.shape[:-1], E), self.leak).scatter(-1, ids, top.softmax(-1))
            return sum(w[..., e, None] * expert(x) for e, expert in enumerate(self.ff))

    model = build(Leaky, blocks=1)
    with torch.no_grad(), moe_lens.record(model, tmp_path / "run") as rec:
        with rec.step():
            model(ids)
        model.blocks[0].leak = 0.01
        with pytest.raises(moe_lens.CaptureBreach, match="gates of experts that the ids do not"):
            with rec.step():
                model(ids)
            rec.flush()


def test_experts_of_one_block_may_be_shared_with_another(ids, tmp_path):
    model, run = build("every_expert"), tmp_path / "run"
    model.blocks[1].ff = model.blocks[0].ff
    record(model, run, ids, steps=2)
    for layer, (block, x) in enumerate(zip(model.blocks, inputs_of(model, ids), strict=True)):
        assert sets_agree(captured(run, layer, 1), arithmetic("every_expert", block, x))


def test_one_block_called_twice_is_two_layers(ids, tmp_path):
    torch.manual_seed(0)
    block = TutorialMoE()
    model, run = Model(block, block).eval(), tmp_path / "run"
    record(model, run, ids, steps=2)
    assert [x.path for x in open_run(run).meta.layers] == ["blocks.0", "blocks.0 #1"]
    assert frame(run, "load").routed.sum() == 2 * 2 * 24 * K


def test_compiled_models_record_what_eager_ones_do(ids, tmp_path):
    model = build("softmax_topk")
    with torch.no_grad():
        want = model(ids)
        with moe_lens.record(model, tmp_path / "run", tokens=1.0, weights="exact") as rec:
            compiled = torch.compile(model, backend="eager")
            for _ in range(2):
                with rec.step():
                    got = compiled(ids)
    torch._dynamo.reset()
    assert torch.equal(want, got)
    for layer, (block, x) in enumerate(zip(model.blocks, inputs_of(model, ids), strict=True)):
        for step in range(2):
            got_layer = captured(tmp_path / "run", layer, step)
            assert sets_agree(got_layer, arithmetic("softmax_topk", block, x))


def test_an_exception_in_an_expert_leaves_no_watcher_behind(ids, tmp_path):
    model, run = build("softmax_topk", blocks=1), tmp_path / "run"
    expert = model.blocks[0].experts[0]
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        for known in (False, True):
            whole, expert.w2 = expert.w2, None
            with pytest.raises(TypeError, match="not callable"), rec.step():
                model(ids)
            expert.w2 = whole
            assert torch.overrides._get_current_function_mode() is None
            with rec.step():
                model(ids)
            want = arithmetic("softmax_topk", model.blocks[0], inputs_of(model, ids)[0])
            assert sets_agree(captured(run_flushed(rec, run), 0, 3 if known else 1), want)


def run_flushed(rec, run):
    rec.flush()
    return run


class InsideMode(SoftmaxTopk):
    """Routes and computes under torch function modes of its own."""

    def route(self, logits):
        with torch.device("cpu"):
            return super().route(logits)

    def forward(self, x):
        with torch.device("cpu"):
            return super().forward(x)


def test_modes_of_the_models_own_do_not_get_in_the_way(ids, tmp_path):
    model, run = build(InsideMode, blocks=1), tmp_path / "run"
    record(model, run, ids, steps=3)
    for step in range(3):
        want = arithmetic("softmax_topk", model.blocks[0], inputs_of(model, ids)[0])
        assert sets_agree(captured(run, 0, step), want)
    assert torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoints_second_run_is_no_second_decision(reentrant, ids, tmp_path):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Model):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            for block in self.blocks:
                y, _ = checkpoint(lambda v, b=block: b(v.clone()), x, use_reentrant=reentrant)
                x = x + y
            return x

    def gradients(recorded):
        torch.manual_seed(0)
        model = Checkpointed(Stateful(), Stateful()).train()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.5)
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        # what torch's checkpoint does not put back would be other chance in its second run
        for block in model.blocks:
            block.route = lambda logits, block=block: SoftmaxTopk.route(block, logits)
        if recorded:
            with moe_lens.record(model, tmp_path / "run", tokens=1.0) as rec, rec.step():
                model(ids).square().mean().backward()
        else:
            model(ids).square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(a, b)
    steps = frame(tmp_path / "run", "steps")
    assert (steps.fires_expected.sum(), steps.fires_seen.sum()) == (2, 2)


def test_a_block_proves_itself_once_for_each_way_it_runs(ids, tmp_path):
    runs = []

    class Counted(SoftmaxTopk):
        def forward(self, x):
            runs.append(self.training)
            return super().forward(x)

    model = build(Counted, blocks=1)
    counts = []
    with moe_lens.record(model, tmp_path / "run") as rec:
        for training in (False, False, True, True, False):
            model.train(training)
            runs.clear()
            with rec.step():
                model(ids)
            counts.append(len(runs))
    assert counts[1] == counts[3] == counts[4] == 1
    assert 5 < counts[0] < 30
    assert 5 < counts[2] < 30


def test_another_default_device_is_left_to_the_user(ids, tmp_path):
    """What the trials make on the host stays there: meta tensors hold nothing."""
    model = build("softmax_topk", blocks=1)
    x = inputs_of(model, ids)[0]
    torch.set_default_device("meta")
    try:
        record(model, tmp_path / "run", ids, steps=2)
    finally:
        torch.set_default_device(None)
    assert sets_agree(
        captured(tmp_path / "run", 0, 1), arithmetic("softmax_topk", model.blocks[0], x)
    )
