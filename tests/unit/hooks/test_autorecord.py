"""Models that are found while a program runs, and the steps that nobody stated."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pandas as pd
import pytest
import torch
from support.models import TinyBlock, TinyModel, build, switch
from support.tables import frame
from torch import nn

import moe_lens
from moe_lens.trace.reader import open_run

TIMES = ["t_start_ns", "host_ns", "device_ns"]


def same(a, b):
    """The traces `a` and `b` hold the same rows, apart from times."""
    for name in ("load", "layers", "routers", "slices", "steps", "tokens", "routing", "sequences"):
        keys = [c for c in frame(a, name) if c not in TIMES]
        pd.testing.assert_frame_equal(frame(a, name)[keys], frame(b, name)[keys], obj=name)
    assert [x.path for x in open_run(a).meta.layers] == [x.path for x in open_run(b).meta.layers]


def test_the_trace_is_that_of_an_explicit_recording(watch, batch, tmp_path):
    model = build("mixtral")

    def script():
        with torch.no_grad():
            for _ in range(2):
                model(**batch)
            model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)

    watcher = watch()
    script()
    watcher.finish()
    with moe_lens.record(model, tmp_path / "told", tokens=1.0, weights="exact"):
        script()
    run = tmp_path / "auto" / "MixtralForCausalLM"
    same(run, tmp_path / "told")
    assert frame(run, "slices").tokens.iloc[0] == 9  # the first forward's mask was seen
    assert watcher.said == [f"recording MixtralForCausalLM (3 MoE layers) into {run}"]
    assert open_run(run).meta.attempts[-1].end == "closed"


def test_nothing_is_left_on_the_model(watch, batch):
    model = TinyModel()
    call = nn.Module.__call__
    watcher = watch()
    assert nn.Module.__call__ is not call
    model(**batch)
    assert model.blocks[0]._forward_hooks
    watcher.finish()
    assert nn.Module.__call__ is call
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_wrapper_is_recorded_as_what_it_wraps(watch, batch, tmp_path):
    class DistributedLike(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    watcher = watch()
    model = TinyModel()
    wrapped = DistributedLike(model)
    wrapped(**batch)
    model(**batch)
    wrapped(**batch)
    watcher.finish()
    assert [r.path.name for r in watcher.recordings] == ["TinyModel"]
    steps = frame(tmp_path / "auto" / "TinyModel", "steps")
    assert steps.tokens.tolist() == [9, 9, 9]


def test_a_part_that_is_called_first_is_the_model_once(watch, batch, tmp_path):
    class WithHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = TinyModel(), nn.Linear(8, 4)

        def forward(self, input_ids, attention_mask=None):
            return self.head(self.body(input_ids, attention_mask=attention_mask))

    watcher = watch()
    model = WithHead()
    model.body(**batch)
    model(**batch)
    watcher.finish()
    assert [r.path.name for r in watcher.recordings] == ["TinyModel"]
    assert frame(tmp_path / "auto" / "TinyModel", "steps").tokens.tolist() == [9, 9]


def test_a_part_called_after_the_whole_opens_its_own_forward(watch, batch, tmp_path):
    class WithHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = TinyModel(), nn.Linear(8, 4)

        def forward(self, input_ids, attention_mask=None):
            if input_ids.shape[1] == 1:
                raise ValueError("too short")
            return self.head(self.body(input_ids, attention_mask=attention_mask))

    watcher = watch()
    model = WithHead()
    model(**batch)
    model.body(**batch)  # its mask must be seen, though the root is not called
    model.body.blocks[0](torch.randn(2, 6, 8))  # belongs to no forward of the others
    model.body(**batch)
    with pytest.raises(RuntimeError):
        model.body(batch["input_ids"].float())  # ends inside the part
    model(**batch)
    watcher.finish()
    run = tmp_path / "auto" / "WithHead"
    steps = frame(run, "steps")
    assert steps.tokens.tolist() == [9, 9, 12, 9, 9]
    assert steps.breaches.sum() == 0
    assert open_run(run).meta.warnings == {"forwards that an exception ended": 1}


def test_an_encoder_called_first_belongs_to_its_model(watch, tmp_path):
    model = switch()
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    ids = torch.randint(1, 90, (2, 6))
    watcher = watch()
    with torch.no_grad():
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    watcher.finish()
    (recording,) = watcher.recordings
    assert recording.path.name == "SwitchTransformersForConditionalGeneration"
    meta = open_run(recording.path).meta
    assert {x.stream for x in meta.layers} == {"encoder", "decoder"}
    layers = frame(recording.path, "layers")
    encoder = [x.layer for x in meta.layers if x.stream == "encoder"]
    seen = layers[layers.layer.isin(encoder)]
    assert seen.tokens.tolist() == [10] * len(encoder)  # once, and its padding is known
    assert seen.padding_tokens.tolist() == [2] * len(encoder)


def test_a_larger_model_around_a_recorded_one_takes_over(watch, batch, tmp_path):
    class Two(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.first, self.second = first, TinyModel()

        def forward(self, input_ids, attention_mask=None):
            return self.first(input_ids, attention_mask) + self.second(input_ids, attention_mask)

    watcher = watch()
    first = TinyModel()
    first(**batch)
    Two(first)(**batch)
    watcher.finish()
    assert [r.path.name for r in watcher.recordings] == ["TinyModel", "Two"]
    assert len(frame(tmp_path / "auto" / "TinyModel", "steps")) == 1
    assert len(open_run(tmp_path / "auto" / "Two").meta.layers) == 4


def test_models_of_one_class_are_told_apart(watch, batch, tmp_path):
    watcher = watch()
    for n in (1, 2, 3):
        model = TinyModel()
        for _ in range(n):
            model(**batch)
    watcher.finish()
    names = ["TinyModel", "TinyModel-2", "TinyModel-3"]
    assert [r.path.name for r in watcher.recordings] == names
    assert [len(frame(tmp_path / "auto" / n, "steps")) for n in names] == [1, 2, 3]


def test_a_model_that_is_gone_is_freed_and_its_trace_closed(watch, batch, tmp_path):
    watcher = watch()
    model = TinyModel()
    model(**batch)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    TinyModel()(**batch)
    attempt = open_run(tmp_path / "auto" / "TinyModel").meta.attempts[-1]
    assert attempt.end == "closed"  # as soon as another one is found
    watcher.finish()
    assert frame(tmp_path / "auto" / "TinyModel", "steps").tokens.tolist() == [9]


def test_copies_and_files_of_a_recorded_model_are_free_of_hooks(watch, batch, tmp_path):
    watcher = watch()
    model = TinyModel()
    theirs = []
    model.register_forward_hook(Noting(theirs))
    model(**batch)
    twin = copy.deepcopy(model)
    assert len(twin._forward_hooks) == 1
    assert not any(m._forward_hooks for m in twin.modules() if m is not twin)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(**batch), model(**batch))
    assert len(model.blocks[0]._forward_hooks) > 0  # the model itself goes on being recorded
    watcher.finish()
    assert [len(frame(r.path, "steps")) for r in watcher.recordings] == [2, 1]


class Noting:
    def __init__(self, seen):
        self.seen = seen

    def __call__(self, module, args, output):
        self.seen.append(output.shape)


def test_dense_models_are_passed_over_in_silence(watch):
    watcher = watch()
    nn.Sequential(nn.Linear(4, 4), nn.ReLU())(torch.ones(2, 4))
    watcher.finish()
    assert watcher.recordings == watcher.refused == watcher.said == []


def test_a_router_that_cannot_be_seen_is_told_once_and_the_script_goes_on(watch):
    class SoftMoE(nn.Module):
        def forward(self, x):
            return x * 2

    watcher = watch()
    model = nn.Sequential(SoftMoE())
    assert torch.equal(model(torch.ones(2)), torch.full((2,), 2.0))
    assert torch.equal(nn.Sequential(SoftMoE())(torch.ones(2)), torch.full((2,), 2.0))
    assert len(watcher.said) == 1
    assert "not recorded: 0 (SoftMoE) is a soft mixture" in watcher.said[0]


def test_moe_layers_put_into_a_model_that_ran_before_are_layers_of_it(watch, tmp_path):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    watcher = watch()
    model = Stack()
    x = torch.randn(2, 3, 8)
    model(x)
    for i in range(2):
        model.layers[i] = TinyBlock()
    model(x)
    model(x)
    watcher.finish()
    (recording,) = watcher.recordings
    assert recording.path.name == "Stack"
    assert [x.path for x in open_run(recording.path).meta.layers] == ["layers.0", "layers.1"]
    assert frame(recording.path, "steps").tokens.tolist() == [6, 6]


def test_a_folder_that_is_taken_is_told_and_the_script_goes_on(watch, batch, tmp_path):
    (tmp_path / "auto" / "TinyModel").mkdir(parents=True)
    (tmp_path / "auto" / "TinyModel" / "x").touch()
    watcher = watch()
    TinyModel()(**batch)
    assert "is not empty" in watcher.said[0]
    assert watcher.recordings == []


def test_a_recorder_of_the_script_itself_is_left_alone(watch, batch, tmp_path):
    watcher = watch()
    model = TinyModel()
    with moe_lens.record(model, tmp_path / "own"):
        model(**batch)
    assert watcher.recordings == []
    assert len(frame(tmp_path / "own", "steps")) == 1


def test_a_breach_is_told_even_where_warnings_are_errors(watch, batch):
    class Skipping(TinyBlock):
        def forward(self, x):
            if x.shape[0] == 1:
                return x  # enters the block, bypasses its experts
            return super().forward(x)

    watcher = watch()
    model = nn.Sequential(nn.Embedding(32, 8), Skipping())
    model(batch["input_ids"])
    model(batch["input_ids"][:1])
    watcher.finish()
    assert any("saw no ids" in text for text in watcher.said)


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_a_model_that_is_compiled_before_its_first_call_is_recorded(watch, batch, tmp_path, how):
    model = TinyModel().eval()
    with torch.no_grad():
        plain = model(**batch)
        watcher = watch()
        if how == "wrapper":
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        else:
            model.compile(backend="aot_eager", fullgraph=True)
            compiled = model
        for _ in range(3):
            assert torch.allclose(compiled(**batch), plain, atol=1e-5)
    watcher.finish()
    (recording,) = watcher.recordings
    assert recording.path.name == "TinyModel"
    steps = frame(recording.path, "steps")
    assert steps.tokens.tolist() == [9, 9, 9]
    assert steps.breaches.tolist() == [0, 0, 0]


def test_a_dense_model_compiles_to_one_graph_under_the_watch(watch):
    watch()
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2, 4)), model(torch.ones(2, 4)))
