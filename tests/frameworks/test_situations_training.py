"""Training as it is done: recomputation, accumulation, precisions, evaluation in between."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from support.generated import Traced, load_of, routed_to, watched
from support.models import VOCAB, TinyModel, build
from support.tables import frame
from torch import nn

import moe_lens
from moe_lens.trace.reader import open_run


@pytest.fixture
def ids():
    torch.manual_seed(2)
    return torch.randint(1, VOCAB, (3, 10))


def all_of(ran):
    return [torch.ones_like(r.token_ids_BS, dtype=torch.bool) for r in ran]


@pytest.mark.parametrize(
    ("reentrant", "around"),
    [(True, nullcontext), (False, nullcontext), (False, torch.autograd.graph.save_on_cpu)],
    ids=["reentrant", "not reentrant", "offloaded activations"],
)
def test_recomputation_is_no_second_decision(ids, tmp_path, reentrant, around):
    """Pitfall 2."""
    model = build("qwen3_moe").train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    run = tmp_path / "run"
    calls = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda *_: calls.append(1))
    with moe_lens.record(model, run, tokens=1.0) as rec, watched(model) as ran:
        for _ in range(2):
            with rec.step(), around():
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert len(calls) == 4  # each ran twice
    assert frame(run, "steps").fires_seen.tolist() == [3, 3]
    assert load_of(Traced(run)) == routed_to(ran, all_of(ran))


def test_accumulated_micro_batches_are_forwards_of_one_step(ids, tmp_path):
    model = build("mixtral").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = tmp_path / "run"
    with moe_lens.record(model, run, tokens=1.0) as rec, watched(model) as ran:
        for _ in range(2):
            with rec.step():
                for row in ids:
                    model(input_ids=row[None], labels=row[None]).loss.backward()
                optimizer.step()
            scalars = rec.scalars()
    steps = Traced(run).steps
    pairs = [[s, f] for s in (0, 1) for f in (0, 1, 2)]
    assert steps[["step", "forward"]].to_numpy().tolist() == pairs
    assert set(steps.phase) == {"train"}
    assert load_of(Traced(run)) == routed_to(ran, all_of(ran))
    assert Traced(run).tokens.sequence.nunique() == 6
    # the scalars of a step are those of all its micro-batches
    counts = routed_to(ran[3:], all_of(ran[3:]))
    for layer in range(3):
        path = f"model.layers.{layer}.mlp.experts"
        load = np.array([counts.get((path, e), 0) for e in range(8)])
        assert scalars[f"moe/layer{layer}/load_max_over_mean"] == pytest.approx(
            load.max() / load.mean()
        )
        assert scalars[f"moe/layer{layer}/idle_experts"] == (load == 0).mean()


@pytest.mark.parametrize("mode", ["inference", "autocast", "bf16", "bf16 inference"])
def test_precisions_and_modes(ids, tmp_path, mode):
    model = build("deepseek_v3")
    if "bf16" in mode:
        model = model.to(torch.bfloat16)
    run = tmp_path / "run"
    inference = torch.inference_mode("inference" in mode)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast")
    with moe_lens.record(model, run, tokens=1.0, weights="exact", logits=True) as rec:
        with watched(model) as ran, inference, torch.no_grad(), autocast, rec.step():
            model(input_ids=ids)
    traced = Traced(run)
    assert load_of(traced) == routed_to(ran, all_of(ran))
    paths = {x.layer: f"{x.path}.experts" for x in open_run(run).meta.layers}
    for row in traced.routing.itertuples():
        assert list(row.expert_ids) == ran[0].experts[paths[row.layer]][row.token].tolist()
    routers = frame(run, "routers")
    assert (routers.entropy_sum / routers.tokens).between(0, np.log(8)).all()


def test_an_evaluation_in_the_middle_of_training(ids, tmp_path):
    """Outside of any step, while the user numbers the steps."""
    model = build("mixtral").train()
    run = tmp_path / "run"
    with moe_lens.record(model, run, tokens=1.0) as rec, watched(model) as ran:
        for number in (10, 20, 30):
            with rec.step(number=number):
                model(input_ids=ids, labels=ids).loss.backward()
            if number == 20:
                model.eval()
                with torch.no_grad():
                    for row in ids:
                        model(input_ids=row[None])
                model.train()
    steps = frame(run, "steps").sort_values(["step", "forward"])
    assert steps[["step", "forward", "phase"]].to_numpy().tolist() == [
        [10, 0, "train"],
        [20, 0, "train"],
        [20, 1, "eval"],
        [20, 2, "eval"],
        [20, 3, "eval"],
        [30, 0, "train"],
    ]
    load = frame(run, "load").groupby("phase").routed.sum()
    tokens = ids.numel() * 2 * 3
    assert load.to_dict() == {"train": 3 * tokens, "eval": tokens}
    assert load_of(Traced(run)) == routed_to(ran, all_of(ran))


def test_a_look_at_the_model_before_the_first_numbered_step(ids, tmp_path):
    model = TinyModel().eval()
    run = tmp_path / "run"
    with moe_lens.record(model, run) as rec:
        for _ in range(2):
            model(ids % 32)
        for number in range(3):
            with rec.step(number=number):
                model.train()(ids % 32)
        with pytest.raises(ValueError, match="step number 1 must be at least 3"):
            with rec.step(number=1):
                pass
        with rec.step(number=2):
            model(ids % 32)
    steps = frame(run, "steps")[["step", "forward", "phase"]]
    assert sorted(steps.to_numpy().tolist()) == [
        [0, 0, "eval"], [0, 1, "train"], [1, 0, "eval"], [1, 1, "train"], [2, 0, "train"],
        [2, 1, "train"],
    ]  # fmt: skip


class Twice(TinyModel):
    """Two passes through the same blocks, as in models that share their layers."""

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in (*self.blocks, *self.blocks):
            x = x + block(x)
        return x


def test_layers_shared_between_blocks(ids, tmp_path):
    model = Twice().eval()
    run = tmp_path / "run"
    seen = []
    for block in model.blocks:
        block.experts.register_forward_pre_hook(lambda m, args: seen.append(args[1].clone()))
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec:
        for _ in range(2):
            with rec.step():
                model(ids % 32)
    paths = [x.path for x in open_run(run).meta.layers]
    assert paths == ["blocks.0", "blocks.1", "blocks.0 #1", "blocks.1 #1"]
    routing = frame(run, "routing").sort_values(["step", "layer", "token"])
    got = [np.stack(rows.expert_ids) for _, rows in routing.groupby(["step", "layer"], sort=True)]
    for ours, theirs in zip(got, seen, strict=True):
        assert (ours == theirs.numpy()).all()
    assert frame(run, "tokens").groupby("step").size().tolist() == [30, 30]


def test_sequences_first_seen_in_a_step_left_out_are_told_of_later(tmp_path):
    model = build("mixtral")
    run = tmp_path / "run"
    torch.manual_seed(0)
    prompt = torch.randint(3, VOCAB, (2, 5))
    model.generation_config.eos_token_id = None
    with torch.no_grad(), moe_lens.record(model, run, tokens=moe_lens.every(3)) as rec:
        with rec.step():
            model(prompt)
        # steps 1, 2, …: the prompt is read in a step whose rows are not kept
        model.generate(prompt, max_new_tokens=6, do_sample=False)
    tokens, sequences = frame(run, "tokens"), frame(run, "sequences")
    assert set(tokens.step) == {0, 3, 6}
    assert set(tokens.sequence) == set(sequences.sequence)
    assert sequences.sequence.is_unique


def test_a_long_generation_in_one_step_holds_sums_only(tmp_path):
    model = TinyModel().eval()
    ids = torch.arange(6)[None]
    with torch.no_grad(), moe_lens.record(model, tmp_path / "run", tokens=0.0) as rec:
        with rec.step():
            for _ in range(60):
                model(ids)
                rec._writer.flush()
            held = len(rec._of_step._waiting)
        scalars = rec.scalars()
        with rec.step():
            model(ids)
        assert rec.scalars() == pytest.approx(scalars)  # the same forward, sixty times
    assert held <= 1
    assert len(scalars) > 10


def test_data_parallel_is_refused_by_name(ids, tmp_path):
    model = TinyModel()
    with pytest.raises(moe_lens.UnsupportedRouter, match=r"DataParallel.*DistributedDataParallel"):
        moe_lens.record(nn.DataParallel(model), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_replicas_of_data_parallel_are_a_breach_by_name(ids, tmp_path):
    """What DataParallel does with a recorded model: a copy that shares its hooks, in a thread."""
    model = TinyModel().eval()

    def replicate():
        names = {m: m._replicate_for_data_parallel() for m in model.modules()}
        for old, new in names.items():
            for key, child in old._modules.items():
                setattr(new, key, names[child])
            for key, parameter in old._parameters.items():
                setattr(new, key, parameter)
        return names[model]

    with pytest.raises(moe_lens.CaptureBreach, match=r"torch.nn.DataParallel runs copies"):
        with moe_lens.record(model, tmp_path / "run") as rec, rec.step(), torch.no_grad():
            threads = [threading.Thread(target=replicate(), args=(ids % 32,)) for _ in range(2)]
            for thread in threads:
                thread.start()
                thread.join()
    model(ids % 32)  # the model itself is as it was


def test_a_copy_of_a_recorded_model_generates_by_itself(tmp_path):
    """An average of the weights, say: what it generates is not the recorded model's."""
    model = build("mixtral")
    model.generation_config.eos_token_id = None
    prompt = torch.arange(3, 8)[None]
    with torch.no_grad():
        expected = model.generate(prompt, max_new_tokens=3, do_sample=False)
        with moe_lens.record(model, tmp_path / "run", tokens=1.0) as rec, rec.step():
            model.generate(prompt, max_new_tokens=3, do_sample=False)
        got = copy.deepcopy(model).generate(prompt, max_new_tokens=3, do_sample=False)
    assert torch.equal(got, expected)
