"""What a second reading found: numbers that were wrong in silence, and what was left behind."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from support.models import TinyBlock, TinyModel
from support.tables import frame
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import moe_lens
from moe_lens.trace.meta import LayerInfo
from moe_lens.trace.reader import open_run
from moe_lens_hooks import MoELayer, Tap

IDS = torch.arange(12).reshape(3, 4)


class Bank(nn.Module):
    def forward(self, x, ids, weights):
        return x


class Part(nn.Module):
    """Routes some of its tokens, and uses its buffer again once its experts have run."""

    def __init__(self):
        super().__init__()
        self.bank, self.gate = Bank(), nn.Linear(4, 6)

    def forward(self, x_BSD):
        x_TD = x_BSD.reshape(-1, 4)[:4]
        weights_TK, ids_TK = self.gate(x_TD).softmax(-1).topk(2)
        out = self.bank(x_TD, ids_TK, weights_TK)
        ids_TK.zero_()
        return out


class PartAdapter:
    """Around: a context that the bank runs in."""

    name = "part"

    def __init__(self, around=None, wrong=False):
        self.around, self.wrong = around, wrong

    def layer(self, path, module):
        if not isinstance(module, Part | TinyBlock):
            return None

        def read(seen, args, kwargs, output):
            _, seen.expert_ids_TK, seen.weights_TK = args
            if isinstance(module, Part):
                seen.token_T = torch.arange(4)

        bank = module.bank if isinstance(module, Part) else module.experts
        taps = [Tap(bank, "input", read)]
        if self.around is not None:
            taps.append(Tap(bank, "around", around=self.around))
        if self.wrong:  # the module stands nowhere near the block
            taps.append(Tap(nn.Linear(2, 2), "output", read))
        experts = 6 if isinstance(module, Part) else 4
        info = LayerInfo(layer=-1, path=path, experts=experts, top_k=2, adapter=self.name)
        return MoELayer(module, info, taps, None)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def routed(run):
    load = frame(run, "load")
    return load.groupby("layer").routed.sum().to_dict()


def test_a_change_in_place_is_told_where_a_layer_sees_some_of_the_tokens(run):
    model = Around(Part())
    with torch.no_grad(), moe_lens.record(model, run, adapters=[PartAdapter()]) as rec:
        with pytest.raises(moe_lens.CaptureBreach, match="in place"), rec.step():
            model(torch.randn(2, 4, 4))


class Chunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = TinyBlock()

    def forward(self, hidden, attention_mask=None):
        return self.block(hidden)


def test_masks_of_a_pipeline_are_those_of_their_own_micro_batch(run):
    first, last = Chunk(), Chunk()
    mask, hidden = torch.zeros(2, 6, dtype=torch.long), []
    with torch.no_grad(), moe_lens.record([first, last], run) as rec, rec.step():
        for valid in (6, 2):
            mask.zero_()[:, :valid] = 1
            hidden.append(first(torch.randn(2, 6, 8), attention_mask=mask))
        for h in hidden:
            last(h)
    assert frame(run, "steps").tokens.tolist() == [12, 4]


def test_a_mask_that_the_model_changes_after_its_blocks_is_what_it_was(run):
    class Filling(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = TinyModel()

        def forward(self, input_ids, attention_mask):
            out = self.model(input_ids)
            attention_mask.fill_(1)
            return out

    model = Filling()
    mask = torch.ones(3, 4, dtype=torch.long)
    mask[:, 2:] = 0
    with torch.no_grad(), moe_lens.record(model, run):
        model(IDS, attention_mask=mask)
    steps = frame(run, "steps")
    assert (steps.tokens.tolist(), steps.padding_tokens.tolist()) == ([6], [6])


class Logging(nn.Module):
    """Hands routing over by hand inside its own forward."""

    def __init__(self, times):
        super().__init__()
        self.model, self.times, self.rec = TinyModel(), times, None

    def forward(self, input_ids):
        for _ in range(self.times):
            self.rec.log(
                "mine", torch.zeros(3, 4, 2, dtype=torch.long), torch.ones(3, 4, 2), experts=3
            )
        return self.model(input_ids)


def test_a_layer_logged_twice_in_one_forward_is_two_layers(run):
    model = Logging(times=2)
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec:
        model.rec = rec
        model(IDS)
    assert sorted(routed(run).values()) == [24, 24, 24, 24]
    paths = {x.path for x in open_run(run).meta.layers}
    assert {"mine", "mine #1"} <= paths
    assert len(frame(run, "routing")) == 4 * 12


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_logged_in_a_checkpoint_counts_once(run, reentrant):
    with moe_lens.record(None, run) as rec:
        x = torch.ones(2, 5, 4, requires_grad=True)

        def inner(x):
            y = x * 2
            rec.log("r", torch.zeros(2, 5, 2, dtype=torch.long), torch.ones(2, 5, 2), experts=3)
            return (y * y).sin()

        with rec.step():
            checkpoint(inner, x, use_reentrant=reentrant).sum().backward()
    assert routed(run) == {0: 20}
    assert len(frame(run, "steps")) == 1


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def stack():
    return [m for m in _get_current_function_mode_stack() if isinstance(m, Mode)]


def test_ctrl_c_leaves_no_mode_behind(run):
    model = TinyModel(blocks=1).eval()
    stop = [True]

    def interrupt(*_):
        if stop and stop.pop():
            raise KeyboardInterrupt

    model.blocks[0].experts.register_forward_hook(interrupt)
    adapters = [PartAdapter(around=lambda seen: Mode())]
    rec = moe_lens.record(model, run, adapters=adapters, on_breach="warn")
    with pytest.raises(KeyboardInterrupt):
        model(IDS)
    model(IDS)
    assert not stack()
    stop.append(True)
    with pytest.raises(KeyboardInterrupt):
        model(IDS)
    rec.close()
    assert not stack()
    assert len(frame(run, "steps")) == 1


def test_two_threads_leave_each_its_own_modes(run):
    model = TinyModel(blocks=1).eval()
    inside, go_on = threading.Event(), threading.Event()
    errors, left = [], []

    def wait(*_):
        if threading.current_thread() is first:
            inside.set()
            go_on.wait(30)

    def work():
        try:
            model(IDS)
        except BaseException as e:
            errors.append(e)
        left.append(len(stack()))

    model.blocks[0].experts.register_forward_hook(wait)
    adapters = [PartAdapter(around=lambda seen: Mode())]
    with pytest.warns(UserWarning, match="two threads"):
        with moe_lens.record(model, run, adapters=adapters, on_breach="warn"):
            first, second = (threading.Thread(target=work) for _ in range(2))
            first.start()
            assert inside.wait(30)
            second.start()
            second.join(30)
            go_on.set()
            first.join(30)
    assert errors == []
    assert left == [0, 0]


def hooks_on(model):
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def test_a_recorder_that_could_not_attach_leaves_no_hook(run):
    model = TinyModel().eval()
    with pytest.raises(AssertionError):
        moe_lens.record(model, run, adapters=[PartAdapter(wrong=True)])
    assert not hooks_on(model)
    model(IDS)
    with moe_lens.record(model, run):  # neither the folder nor the model is taken
        model(IDS)


def test_a_warning_made_an_error_in_the_constructor_leaves_nothing(run, recwarn):
    class Looks(TinyModel):
        """Has a block that looks like one, and no adapter reads."""

        def __init__(self):
            super().__init__()
            self.odd = nn.Module()
            self.odd.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
            self.odd.gate = nn.Module()

    model, threads = Looks(), threading.active_count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_lens_hooks.recorder.unseen", lambda *_: ["odd is not recorded"])
        patch.setattr("moe_lens_hooks.watch._warn", _raise)
        with pytest.raises(UserWarning):
            moe_lens.record(model, run)
    assert not hooks_on(model)
    assert threading.active_count() == threads
    moe_lens.record(model, run, resume=True).close(error=ValueError())  # the lock is free


def _raise(text):
    raise UserWarning(text)


def test_close_seals_even_where_the_model_cannot_be_looked_at_any_more(run, monkeypatch):
    model = TinyModel()
    rec = moe_lens.record(model, run)
    model(IDS)
    monkeypatch.setattr(rec, "_edited", lambda: int(None))
    with pytest.raises(moe_lens.CaptureBreach, match="cannot be looked at any more"):
        rec.close()
    files = open_run(run)
    assert not files.unfinished
    assert files.meta.attempts[-1].end == "closed"


def test_after_a_step_that_was_refused_the_next_one_begins(run):
    ids, weights = torch.zeros(2, 4, 1, dtype=torch.long), torch.ones(2, 4, 1)
    with moe_lens.record(None, run) as rec:
        with pytest.raises(ValueError, match="3 values"), rec.step(tags=["a", "b", "c"]):
            rec.log("r", ids, weights, experts=2)
        with rec.step(tags=["a", "b"]):
            rec.log("r", ids, weights, experts=2)
    assert routed(run) == {0: 8}


@pytest.mark.parametrize("where", ["learn", "reduce"])
def test_what_we_stumble_over_does_not_end_the_forward(run, monkeypatch, where):
    model = TinyModel().eval()
    monkeypatch.setattr(f"moe_lens_hooks.intake.{where}", lambda *_, **__: {}["no such"])
    with pytest.warns(UserWarning, match="could not be read .KeyError"):
        with moe_lens.record(model, run, on_breach="warn"):
            model(IDS)
    steps = frame(run, "steps")
    assert (steps.fires_expected.tolist(), steps.fires_seen.tolist()) == ([2], [0])


def test_tracing_records_nothing_and_breaks_nothing(run):
    model = TinyModel().eval()
    with torch.no_grad(), moe_lens.record(model, run):
        with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
            torch.jit.trace(model, (IDS,), check_trace=False)
        model(IDS)
    assert frame(run, "steps").tokens.tolist() == [12]


def test_a_forward_that_raised_is_over(run):
    """It holds no graph, and forwards through a part of the model are not taken for its rest."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.fail, self.held = TinyModel(), False, None

        def forward(self, input_ids):
            x = self.model(input_ids)
            if self.fail:
                self.held = weakref.ref(x)
                raise RuntimeError("out of memory")
            return x

    model = Head()
    rec = moe_lens.record(model, run)
    model.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        model(IDS)
    gc.collect()
    assert model.held() is None
    for _ in range(3):
        model.model(IDS)
    rec.close()
    assert frame(run, "steps").fires_seen.tolist() == [2, 2, 2]
    assert open_run(run).meta.warnings == {"forwards that an exception ended": 1}


def test_a_part_that_returns_nothing_has_not_raised(run):
    class Silent(TinyModel):
        def forward(self, input_ids):
            super().forward(input_ids)

    model = Around(Silent())
    with moe_lens.record(model, run):
        for _ in range(3):
            model.inner(IDS)
    assert len(frame(run, "steps")) == 3


def test_a_copy_that_took_hooks_along_is_not_recorded(run):
    class Stubborn(TinyModel):
        """As DistributedDataParallel, it says its state itself."""

        def __getstate__(self):
            return dict(self.__dict__)

    model = Stubborn().eval()
    with moe_lens.record(model, run):
        model(IDS)
        copy.deepcopy(model)(IDS)
    assert len(frame(run, "steps")) == 1
