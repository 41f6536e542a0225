"""The callback of the transformers Trainer: its steps, its numbers in the Trainer's loggers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap

import accelerate
import numpy as np
import pytest
import torch
import transformers
from support.models import build
from support.tables import frame
from support.truth import spy
from tensorboard.backend.event_processing import event_accumulator
from transformers import Trainer, TrainerCallback, TrainingArguments

from moe_lens.errors import CaptureBreach, NoMoELayers, TraceError
from moe_lens.trace.reader import open_run
from moe_lens_hooks.integrations.transformers import MoeLensCallback

assert accelerate  # without it there is no Trainer


@pytest.fixture
def data():
    torch.manual_seed(3)
    rows = torch.randint(1, 96, (24, 8))
    mask = torch.ones_like(rows)
    mask[::3, :2] = 0
    return [
        {"input_ids": r, "attention_mask": m, "labels": r} for r, m in zip(rows, mask, strict=True)
    ]


@pytest.fixture
def train(tmp_path, data):
    """Runs a Trainer over 24 sequences, 2 in a batch; returns it."""

    def run(*callbacks, model=None, resume=None, **given):
        options = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "logging_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        trainer = Trainer(
            model=model or build("mixtral").train(),
            args=TrainingArguments(**options | given),
            train_dataset=data,
            eval_dataset=data[:6],
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def shape_of(run):
    """Forwards of each step by number, a letter each for their phase."""
    steps = frame(run, "steps").sort_values(["step", "forward"])
    return {n: "".join(p[0] for p in x.phase) for n, x in steps.groupby("step")}


def test_a_step_is_an_optimizer_step_with_its_micro_batches(train, tmp_path):
    run = tmp_path / "run"
    model = build("mixtral").train()
    with spy(model) as truth:
        train(MoeLensCallback(run, tokens=1.0, weights="exact"), model=model)
    assert shape_of(run) == {1: "tt", 2: "tt", 3: "tt", 4: "tt"}
    assert open_run(run).meta.attempts[-1].end == "closed"
    assert frame(run, "steps").breaches.sum() == 0
    assert frame(run, "layers").padding_tokens.sum() > 0
    rows = frame(run, "routing").sort_values(["step", "forward", "layer", "token"])
    ids = np.concatenate([ids.numpy() for _, ids, _ in truth])
    weights = np.concatenate([w.float().numpy() for _, _, w in truth])
    assert (np.stack(rows.expert_ids) == ids).all()
    assert np.stack(rows.weights).tobytes() == weights.tobytes()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_evaluation_is_recorded_in_the_step_that_it_follows(train, tmp_path):
    run = tmp_path / "run"
    train(MoeLensCallback(run), eval_strategy="steps", eval_steps=2, eval_on_start=True)
    assert shape_of(run) == {0: "eee", 1: "tt", 2: "tteee", 3: "tt", 4: "tteee"}
    steps = frame(run, "steps")
    assert (steps.groupby("step").forward.nunique() == steps.groupby("step").size()).all()
    load = frame(run, "load")
    assert set(load[load.step == 2].phase) == {"train", "eval"}


class Loads(TrainerCallback):
    """Hottest expert over the mean in layer 0, counted from what the experts consumed."""

    def __init__(self, truth):
        self.truth, self.by_step, self.seen = truth, {}, []

    def on_step_end(self, args, state, control, **kwargs):
        ids = torch.cat([ids for path, ids, _ in self.truth if ".layers.0." in path])
        load = torch.bincount(ids.flatten(), minlength=8).float()
        self.by_step[state.global_step] = float(load.max() / load.mean())
        self.truth.clear()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_numbers_reach_the_log_history_and_every_other_callback(train, tmp_path, data):
    for x in data:
        x["attention_mask"][:] = 1  # the naive count knows no padding
    model = build("mixtral").train()
    with spy(model) as truth:
        loads = Loads(truth)
        # ours stands last in the list, and yet the one before it sees the numbers
        trainer = train(loads, MoeLensCallback(tmp_path / "run"), model=model)
    key = "moe/layer0/load_max_over_mean"
    history = [x for x in trainer.state.log_history if "loss" in x]
    assert [x["step"] for x in history] == [2, 4]
    assert [x[key] for x in history] == [loads.by_step[2], loads.by_step[4]]
    assert [x[key] for x in loads.seen if "loss" in x] == [x[key] for x in history]
    assert all(math.isfinite(v) for x in history for k, v in x.items() if k.startswith("moe/"))
    assert not any(k.startswith("moe/") for x in loads.seen if "loss" not in x for k in x)


def test_numbers_reach_tensorboard(train, tmp_path):
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "board")
    try:
        train(MoeLensCallback(tmp_path / "run", scalars=("entropy",)), report_to="tensorboard")
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    found = event_accumulator.EventAccumulator(str(tmp_path / "board"))
    found.Reload()
    tags = [t for t in found.Tags()["scalars"] if "moe/" in t]
    assert tags == [f"train/moe/layer{i}/entropy" for i in range(3)]
    assert [x.step for x in found.Scalars(tags[0])] == [2, 4]


def test_no_numbers_where_none_are_wanted(train, tmp_path):
    trainer = train(MoeLensCallback(tmp_path / "run", scalars=False))
    assert not any(k.startswith("moe/") for x in trainer.state.log_history for k in x)


def test_a_training_that_goes_on_from_a_checkpoint_goes_on_with_the_trace(train, tmp_path):
    run = tmp_path / "run"
    train(MoeLensCallback(run), max_steps=3, save_strategy="steps", save_steps=2)
    assert shape_of(run) == {1: "tt", 2: "tt", 3: "tt"}
    before = frame(run, "load")
    train(
        MoeLensCallback(run),
        max_steps=4,
        resume=str(tmp_path / "out" / "checkpoint-2"),
        eval_on_start=True,
    )
    meta = open_run(run).meta
    assert [(a.attempt, a.first_step) for a in meta.attempts] == [(0, 1), (1, 3)]
    again = frame(run, "steps").query("attempt == 1")
    # the evaluation at the start must not take the place of step 2 as it was trained
    assert [(s, p) for s, p in zip(again.step, again.phase, strict=True)] == [
        *[(3, "eval")] * 3,
        *[(3, "train")] * 2,
        *[(4, "train")] * 2,
    ]
    whole = moe_lens_query(run, "select step, sum(routed) n from load group by step order by step")
    routed = before.groupby("step").routed.sum()
    assert [r["n"] for r in whole[:2]] == routed.loc[[1, 2]].tolist()
    assert [r["step"] for r in whole] == [1, 2, 3, 4]


def moe_lens_query(run, sql):
    import moe_lens

    with moe_lens.open(run) as trace:
        return trace.sql(sql).rows()


def test_a_folder_that_is_taken_is_an_error_when_the_training_begins(train, tmp_path):
    train(MoeLensCallback(tmp_path / "run"), max_steps=1)
    with pytest.raises(TraceError, match="is not empty"):
        train(MoeLensCallback(tmp_path / "run"), max_steps=1)


def test_a_dense_model_is_an_error_when_the_training_begins(train, tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=96,
    )  # fmt: skip
    with pytest.raises(NoMoELayers):
        train(MoeLensCallback(tmp_path / "run"), model=transformers.LlamaForCausalLM(config))


class Fails(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            self.at = -1
            raise RuntimeError("out of luck")


def test_a_second_attempt_after_an_exception_supersedes_the_first(train, tmp_path):
    run = tmp_path / "run"
    callback = MoeLensCallback(run)
    fails = Fails(2)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(callback, fails)
    train(callback, fails, max_steps=3)
    meta = open_run(run).meta
    assert [(a.attempt, a.first_step) for a in meta.attempts] == [(0, 1), (1, 1)]
    rows = moe_lens_query(run, "select step, count(*) n from steps group by step order by step")
    assert [(r["step"], r["n"]) for r in rows] == [(1, 2), (2, 2), (3, 2)]


def test_close_ends_the_recording_of_a_training_that_failed(train, tmp_path):
    callback = MoeLensCallback(tmp_path / "run")
    model = build("mixtral").train()
    with pytest.raises(RuntimeError, match="out of luck"):
        train(callback, Fails(1), model=model)
    callback.close()
    assert not any(m._forward_hooks for m in model.modules())
    assert shape_of(tmp_path / "run") == {1: "tt", 2: "t"}


def test_gradient_checkpointing_records_each_decision_once(train, tmp_path):
    run = tmp_path / "run"
    train(MoeLensCallback(run), activation_checkpointing=True, max_steps=2)
    assert shape_of(run) == {1: "tt", 2: "tt"}
    steps = frame(run, "steps")
    assert (steps.fires_seen == 3).all()
    assert steps.breaches.sum() == 0


def test_a_compiled_training_is_recorded(train, tmp_path):
    run = tmp_path / "run"
    train(
        MoeLensCallback(run),
        torch_compile=True,
        torch_compile_backend="aot_eager",
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
    )
    assert shape_of(run) == {1: "tt", 2: "tteee"}
    steps = frame(run, "steps")
    assert (steps.fires_seen == 3).all()
    assert steps.breaches.sum() == 0


def test_a_breach_warns_unless_the_options_ask_for_more(train, tmp_path):
    def broken():
        model = build("mixtral").train()
        block = model.model.layers[1].mlp
        block.forward = lambda x: x  # enters the block, bypasses its experts
        return model

    with pytest.warns(UserWarning, match=r"layers\.1\.mlp ran, but its adapter"):
        train(MoeLensCallback(tmp_path / "warned"), model=broken(), max_steps=1)
    with pytest.raises(CaptureBreach, match=r"layers\.1\.mlp ran, but its adapter"):
        callback = MoeLensCallback(tmp_path / "raised", on_breach="raise")
        train(callback, model=broken(), max_steps=1)
    callback.close()


def test_every_process_of_a_launch_records_its_rank(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            from support.models import build
            from transformers import Trainer, TrainingArguments
            from moe_lens_hooks.integrations.transformers import MoeLensCallback

            torch.manual_seed(0)
            rows = torch.randint(1, 96, (16, 8))
            args = TrainingArguments(
                output_dir=sys.argv[1] + "/out", per_device_train_batch_size=2, max_steps=3,
                gradient_accumulation_steps=2, report_to="none", save_strategy="no", use_cpu=True,
                logging_steps=1, disable_tqdm=True,
            )
            trainer = Trainer(
                model=build("mixtral").train(), args=args,
                train_dataset=[{"input_ids": r, "labels": r} for r in rows],
                callbacks=[MoeLensCallback(sys.argv[1] + "/run", scalars=("entropy",))],
            )
            trainer.train()
            if trainer.is_world_process_zero():
                trainer.state.save_to_json(sys.argv[1] + "/state.json")
            """
        )
    )
    launch = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(script), str(tmp_path)),
    ]
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        launch,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    files = open_run(tmp_path / "run")
    assert sorted(files.metas) == [0, 1]
    assert all(m.world == 2 and m.attempts[-1].end == "closed" for m in files.metas.values())
    counts = "select rank, step, count(*) n from steps group by all order by all"
    counted = [tuple(r.values()) for r in moe_lens_query(tmp_path / "run", counts)]
    assert counted == [(rank, step, 2) for rank in (0, 1) for step in (1, 2, 3)]
    logged = json.loads((tmp_path / "state.json").read_text())["log_history"][0]
    assert {k for k in logged if "moe/" in k} == {f"moe/layer{i}/entropy" for i in range(3)}
