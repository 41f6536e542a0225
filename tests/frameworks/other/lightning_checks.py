"""The callback of Lightning: its steps, its numbers in the module's loggers."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import textwrap

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support.models import build
from support.tables import frame
from support.truth import spy
from torch.utils.data import DataLoader

import moe_lens
from moe_lens.errors import NoMoELayers, TraceError
from moe_lens.trace.reader import open_run
from moe_lens_hooks.integrations.lightning import MoeLensCallback


class LitModel(pl.LightningModule):
    """Calls the model inside it; its own forward is never called."""

    def __init__(self):
        super().__init__()
        self.model = build("mixtral").train()

    def training_step(self, batch, batch_idx):
        ids, mask = batch
        loss = self.model(input_ids=ids, attention_mask=mask, labels=ids).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        ids, mask = batch
        self.log("val_loss", self.model(input_ids=ids, attention_mask=mask, labels=ids).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.fixture
def data():
    torch.manual_seed(3)
    rows = torch.randint(1, 96, (24, 8))
    mask = torch.ones_like(rows)
    mask[::3, :2] = 0
    return list(zip(rows, mask, strict=True))


@pytest.fixture
def fit(tmp_path, data):
    """Fits over 24 sequences, 2 in a batch; returns the trainer."""

    def run(*callbacks, module=None, resume=None, validate=False, **given):
        options = {
            "max_steps": 4,
            "accumulate_grad_batches": 2,
            "accelerator": "cpu",
            "devices": 1,
            "logger": CSVLogger(tmp_path / "csv", name="", version=""),
            "log_every_n_steps": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        trainer = pl.Trainer(callbacks=list(callbacks), **options | given)
        loaders = {"train_dataloaders": DataLoader(data, batch_size=2)}
        if validate:
            loaders["val_dataloaders"] = DataLoader(data[:6], batch_size=2)
        trainer.fit(module or LitModel(), ckpt_path=resume, **loaders)
        return trainer

    return run


def shape_of(run):
    """Forwards of each step by number, a letter each for their phase."""
    steps = frame(run, "steps").sort_values(["step", "forward"])
    return {n: "".join(p[0] for p in x.phase) for n, x in steps.groupby("step")}


def logged(tmp_path):
    with (tmp_path / "csv" / "metrics.csv").open() as f:
        return list(csv.DictReader(f))


def test_a_step_is_an_optimizer_step_with_its_batches(fit, tmp_path):
    run = tmp_path / "run"
    module = LitModel()
    with spy(module) as truth:
        fit(MoeLensCallback(run, tokens=1.0, weights="exact"), module=module)
    assert shape_of(run) == {1: "tt", 2: "tt", 3: "tt", 4: "tt"}
    assert open_run(run).meta.attempts[-1].end == "closed"
    steps = frame(run, "steps")
    assert steps.breaches.sum() == 0
    assert frame(run, "layers").padding_tokens.sum() > 0  # though the module itself is not called
    rows = frame(run, "routing").sort_values(["step", "forward", "layer", "token"])
    ids = np.concatenate([ids.numpy() for _, ids, _ in truth])
    assert (np.stack(rows.expert_ids) == ids).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_validation_is_recorded_in_the_step_that_it_follows(fit, tmp_path):
    run = tmp_path / "run"
    # every third batch, so that the second one comes in the middle of an accumulation
    fit(MoeLensCallback(run), validate=True, val_check_interval=3, num_sanity_val_steps=1)
    assert shape_of(run) == {0: "e", 1: "tt", 2: "teeet", 3: "tteee", 4: "tt"}


class Loads(Callback):
    """Hottest expert over the mean in layer 0, counted from what the experts consumed."""

    def __init__(self, truth):
        self.truth, self.by_step = truth, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.by_step or batch_idx % 2 == 0:
            return
        ids = torch.cat([ids for path, ids, _ in self.truth if ".layers.0." in path])
        load = torch.bincount(ids.flatten(), minlength=8).float()
        self.by_step[trainer.global_step] = float(load.max() / load.mean())
        self.truth.clear()


def test_numbers_reach_the_logger_beside_the_loss(fit, tmp_path, data):
    for _, mask in data:
        mask[:] = 1  # the naive count knows no padding
    module = LitModel()
    with spy(module) as truth:
        loads = Loads(truth)
        fit(MoeLensCallback(tmp_path / "run"), loads, module=module)
    rows = logged(tmp_path)
    key = "moe/layer0/load_max_over_mean"
    assert [float(r[key]) for r in rows] == pytest.approx([loads.by_step[2], loads.by_step[4]])
    assert all(r["loss"] for r in rows)
    assert {f"moe/layer{i}/entropy" for i in range(3)} <= set(rows[0])


def test_a_validation_is_in_no_number_of_the_training(fit, tmp_path, data):
    for _, mask in data:
        mask[:] = 1
    module = LitModel()
    with spy(module) as truth:
        fit(
            MoeLensCallback(tmp_path / "run"),
            module=module,
            validate=True,
            val_check_interval=3,  # in the middle of step 2
            max_steps=2,
            log_every_n_steps=1,
        )
    calls = [ids for path, ids, _ in truth if ".layers.0." in path]
    assert len(calls) == 7  # two batches, one, three of validation, one
    load = torch.bincount(calls[6].flatten(), minlength=8).float()
    rows = [r for r in logged(tmp_path) if r["loss"]]
    number = float(rows[-1]["moe/layer0/load_max_over_mean"])
    assert number == pytest.approx(float(load.max() / load.mean()))


def test_numbers_can_be_monitored_and_chosen(fit, tmp_path):
    keeps = ModelCheckpoint(
        dirpath=tmp_path / "ckpt", monitor="moe/layer1/entropy", every_n_train_steps=2, save_top_k=1
    )
    trainer = fit(MoeLensCallback(tmp_path / "run", scalars=("entropy",)), keeps)
    assert keeps.best_model_score is not None
    names = [k for k in trainer.callback_metrics if k.startswith("moe/")]
    assert names == [f"moe/layer{i}/entropy" for i in range(3)]


def test_a_fit_that_goes_on_from_a_checkpoint_goes_on_with_the_trace(fit, tmp_path):
    run = tmp_path / "run"
    saves = ModelCheckpoint(dirpath=tmp_path / "ckpt", every_n_train_steps=2, filename="at-{step}")
    fit(MoeLensCallback(run), saves, max_steps=3, logger=False)
    assert shape_of(run) == {1: "tt", 2: "tt", 3: "tt"}
    fit(
        MoeLensCallback(run),
        max_steps=4,
        resume=str(tmp_path / "ckpt" / "at-step=2.ckpt"),
        logger=False,
        validate=True,
        num_sanity_val_steps=1,
        limit_val_batches=1,
    )
    meta = open_run(run).meta
    assert [(a.attempt, a.first_step) for a in meta.attempts] == [(0, 1), (1, 3)]
    with moe_lens.open(run) as trace:
        rows = trace.sql("select step, count(*) n from steps group by step order by step").rows()
    assert [(r["step"], r["n"]) for r in rows] == [(n, 2) for n in (1, 2, 3, 4)]


def test_an_exception_closes_the_trace_and_stands_in_it(fit, tmp_path):
    class Fails(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("out of luck")

    module = LitModel()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(MoeLensCallback(tmp_path / "run"), Fails(), module=module)
    attempt = open_run(tmp_path / "run").meta.attempts[-1]
    assert (attempt.end, attempt.error) == ("failed", "RuntimeError: out of luck")
    assert shape_of(tmp_path / "run") == {1: "tt", 2: "t"}
    assert not any(m._forward_hooks for m in module.modules())


def test_what_cannot_be_recorded_is_an_error_when_the_fit_begins(fit, tmp_path):
    class Dense(LitModel):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(8, 8)

    with pytest.raises(NoMoELayers):
        fit(MoeLensCallback(tmp_path / "run"), module=Dense())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    with pytest.raises(TraceError, match="is not empty"):
        fit(MoeLensCallback(tmp_path / "taken"))


def test_a_compiled_module_is_recorded(fit, tmp_path):
    class Compiled(LitModel):
        def __init__(self):
            super().__init__()
            self.model.compile(backend="aot_eager")

    run = tmp_path / "run"
    fit(MoeLensCallback(run), module=Compiled(), max_steps=2, accumulate_grad_batches=1)
    assert shape_of(run) == {1: "t", 2: "t"}
    assert (frame(run, "steps").fires_seen == 3).all()


def test_every_process_of_a_launch_records_its_rank(tmp_path):
    script = tmp_path / "fit.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            import lightning.pytorch as pl
            from support.models import build
            from torch.utils.data import DataLoader
            from moe_lens_hooks.integrations.lightning import MoeLensCallback

            class LitModel(pl.LightningModule):
                def __init__(self):
                    super().__init__()
                    self.model = build("mixtral").train()

                def training_step(self, ids, batch_idx):
                    return self.model(input_ids=ids, labels=ids).loss

                def configure_optimizers(self):
                    return torch.optim.AdamW(self.parameters(), lr=1e-3)

            trainer = pl.Trainer(
                max_steps=3, accelerator="cpu", devices=2, strategy="ddp", logger=False,
                accumulate_grad_batches=2, enable_checkpointing=False, enable_progress_bar=False,
                callbacks=[MoeLensCallback(sys.argv[1] + "/run")],
            )
            trainer.fit(LitModel(), DataLoader(torch.randint(1, 96, (24, 8)), batch_size=2))
            """
        )
    )
    launch = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(script), str(tmp_path)),
    ]
    path = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    metas = open_run(tmp_path / "run").metas
    assert sorted(metas) == [0, 1]
    assert all(m.world == 2 and m.attempts[-1].end == "closed" for m in metas.values())
    counts = "select rank, step, count(*) n from steps group by all order by all"
    with moe_lens.open(tmp_path / "run") as trace:
        counted = [tuple(r.values()) for r in trace.sql(counts).rows()]
    assert counted == [(rank, step, 2) for rank in (0, 1) for step in (1, 2, 3)]
