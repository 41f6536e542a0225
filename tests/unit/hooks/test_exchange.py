"""Which all-to-alls of a block are timed, as what, and what is null. Two processes that exchange,
against a clock of their own: tests/frameworks/other/exchange_checks.py."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
import torch.distributed as dist
from support.models import TinyBlock
from support.tables import read
from torch import nn

import moe_lens
from moe_lens_hooks import exchange
from moe_lens_hooks.exchange import CudaSpan, Exchange

ORIGINALS = {name: getattr(dist, name) for name in ("all_to_all_single", "all_to_all")}
WAIT = dist.Work.wait
IDS = torch.arange(6).reshape(1, 6)


class Count:
    """A span that took what it was told, and says in what order it was stopped."""

    now = 0

    def __init__(self):
        self.took = None

    def stop(self):
        self.took = Count.now

    def ns(self):
        return self.took


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    assert {name: getattr(dist, name) for name in ORIGINALS} == ORIGINALS
    assert dist.Work.wait is WAIT


@pytest.fixture
def counted(monkeypatch):
    """Every span takes 1, 2, 4, … ns in the order of the calls' ends: sums tell which they were."""

    class Doubling(Count):
        stopped = 0

        def stop(self):
            self.took = 2**Doubling.stopped
            Doubling.stopped += 1

    monkeypatch.setattr(exchange, "HostSpan", Doubling)


class Exchanging(TinyBlock):
    """Calls functions before and after its experts run."""

    def __init__(self, before=(), after=()):
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x):
        for call in self.before:
            call()
        y = super().forward(x)
        for call in self.after:
            call()
        return y


class Model(nn.Module):
    def __init__(self, *block):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 8)
        self.block = Exchanging(*block)

    def forward(self, input_ids):
        return self.block(self.embed(input_ids))


def single(**more):
    return dist.all_to_all_single(torch.empty(4), torch.ones(4), **more)


def several(**more):
    return dist.all_to_all([torch.empty(4)], [torch.ones(4)], **more)


def waited():
    work = single(async_op=True)
    assert type(work) is dist.Work  # the model gets its own object
    work.wait()
    work.wait()  # a second time counts nothing


def times(model, run, forwards=1):
    with moe_lens.record(model, run) as rec:
        for _ in range(forwards):
            with rec.step():
                model(IDS)
    return [tuple(row.values()) for row in read(run, "layers").select(NAMES).to_pylist()]


NAMES = ["dispatch_ns", "combine_ns"]


@pytest.mark.parametrize(
    ("before", "after", "want"),
    [
        ([single], [single], (1, 2)),
        ([single, several], [several], (1 + 2, 4)),
        ([waited], [waited, single], (1, 2 + 4)),
        ([], [single], (None, 1)),
        ([single], [], (1, None)),
        ([], [], (None, None)),
        ([lambda: dist.all_reduce(torch.ones(4))], [], (None, None)),  # no all-to-all
        # started and not waited for: not all of dispatch is known, so none is
        ([single, lambda: UNWAITED.append(single(async_op=True))], [single], (None, 2)),
    ],
)
def test_what_is_before_the_experts_is_dispatch_and_after_them_combine(
    before, after, want, group, counted, run
):
    assert times(Model(before, after), run) == [want]


UNWAITED: list[dist.Work] = []


def test_an_exchange_that_is_waited_for_around_the_experts_is_of_where_it_began(
    group, counted, run
):
    works = []
    model = Model(
        [lambda: works.append(single(async_op=True))], [single, lambda: works.pop().wait()]
    )
    assert times(model, run) == [(2, 1)]


def test_without_a_process_group_nothing_is_touched(run):
    model = Model()
    with moe_lens.record(model, run) as rec, rec.step():
        assert dist.all_to_all_single is ORIGINALS["all_to_all_single"]
        assert dist.Work.wait is WAIT
        model(IDS)
    assert read(run, "layers").select(NAMES).to_pylist() == [dict.fromkeys(NAMES)]


def test_what_no_block_called_is_not_timed(group, counted, run):
    """Outside a block, in a backward pass (after it or inside it), and in another thread."""

    def elsewhere():
        thread = threading.Thread(target=single)
        thread.start()
        thread.join()

    class Back(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            single()
            return grad

    def inside():
        x = torch.ones(4, requires_grad=True)
        torch.autograd.grad(Back.apply(x).sum(), x)

    model = Model([elsewhere, inside, single])
    model.block.register_forward_hook(lambda m, args, out: Back.apply(out))
    with moe_lens.record(model, run) as rec, rec.step():
        single()
        model(IDS).sum().backward()
        single()
    assert read(run, "layers").select(NAMES).to_pylist() == [{"dispatch_ns": 1, "combine_ns": None}]


def test_outputs_and_errors_are_the_call_s_own(group, run):
    x, got = torch.arange(4.0), torch.empty(4)
    model = Model([lambda: dist.all_to_all_single(got, x)])
    want = model(IDS)
    got.zero_()
    with moe_lens.record(model, run) as rec, rec.step():
        assert torch.equal(model(IDS), want)
    assert torch.equal(got, x)
    wrong = Model([lambda: dist.all_to_all_single(torch.empty(3), x)])
    errors = []
    for recorded in (False, True):
        with pytest.raises((RuntimeError, ValueError)) as error:
            if recorded:
                with moe_lens.record(wrong, run.with_name("wrong")) as rec, rec.step():
                    wrong(IDS)
            else:
                wrong(IDS)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


def test_experts_between_several_exchanges_leave_both_unknown():
    """Chunks that are dispatched while others are combined: which is which is not known."""
    seen = Exchange()
    for _ in range(2):
        seen.begin(Count())()
        seen.experts()
        seen.begin(Count())()
    assert seen.times() is None
    seen = Exchange()
    seen.begin(Count())()
    assert seen.times() is None  # no experts were seen to run


def test_experts_that_stand_in_a_list_are_each_asked():
    block = nn.Module()
    assert list(exchange.experts_of(block)) == []
    block.experts = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    assert list(exchange.experts_of(block)) == list(block.experts)
    seen = Exchange()
    seen.begin(Count())()
    Count.now = 5
    seen.experts()
    seen.experts()  # the second of the list
    seen.begin(Count())()
    assert seen.times().read() == (0, 5)


def test_compiled_code_runs_as_ever_and_shows_none(group, counted, run):
    model = Model([single], [single]).eval()
    want = model(IDS)
    with moe_lens.record(model, run) as rec, rec.step():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(IDS), want)
    torch._dynamo.reset()
    assert read(run, "layers").select(NAMES).to_pylist() == [dict.fromkeys(NAMES)]


def test_two_recorders_each_time_their_own(group, counted, run):
    first, second = Model([single]), Model([single])
    with moe_lens.record(first, run.with_name("a")) as a:
        wrapped = dist.all_to_all_single
        assert wrapped is not ORIGINALS["all_to_all_single"]
        with moe_lens.record(second, run.with_name("b")) as b, b.step():
            second(IDS)
        assert dist.all_to_all_single is wrapped
        with a.step():
            first(IDS)
    assert dist.all_to_all_single is ORIGINALS["all_to_all_single"]
    for name, ns in (("a", 2), ("b", 1)):
        assert read(run.with_name(name), "layers")["dispatch_ns"].to_pylist() == [ns]


def test_what_others_wrapped_since_stays(group, counted, run):
    """And calls what was ours: a later recorder counts a call once."""
    assert times(Model([single]), run.with_name("before")) == [(1, None)]
    model = Model([single])
    with moe_lens.record(model, run) as rec, rec.step():
        ours = dist.all_to_all_single
        dist.all_to_all_single = theirs = lambda *given, **more: ours(*given, **more)
        model(IDS)
    assert dist.all_to_all_single is theirs
    try:
        assert times(model, run.with_name("after")) == [(4, None)]
        assert dist.all_to_all_single is theirs
    finally:
        dist.all_to_all_single = ORIGINALS["all_to_all_single"]


def test_a_listener_that_is_gone_is_not_asked(group):
    class Listener:
        def ask(self):
            return None

    listener = Listener()
    exchange.listen(listener.ask)
    assert dist.all_to_all_single is not ORIGINALS["all_to_all_single"]
    del listener
    gc.collect()
    assert dist.all_to_all_single is ORIGINALS["all_to_all_single"]


def test_on_a_device_nothing_is_waited_for_before_it_is_read(monkeypatch):
    """A time is between two events on the stream that is current at each moment."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.at = None

        def record(self, stream):
            self.at = len(log)
            log.append(f"record {stream}")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            assert log[-1] == "synchronize"
            return (end.at - self.at) * 0.25  # ms

    streams = iter(["before", "after"])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: next(streams))
    span = CudaSpan(torch.device("cuda:0"))
    log.append("exchanging")
    span.stop()
    assert log == ["record before", "exchanging", "record after"]
    assert span.ns() == 2 * 250_000
