"""Forced routing beside a recorder, hooks and modes of others, and blocks of odd forms."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from support.models import TinyModel
from support.steering import TOKENS, bare, random_ids
from support.tables import read
from support.truth import spy
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import moe_lens
from moe_lens import SteeringError, UnsupportedRouter
from moe_lens.trace.reader import open_run
from moe_lens_hooks import Tap
from moe_lens_hooks.adapters.fused_experts import FusedExperts
from moe_lens_hooks.steering.choice import push, remove


@pytest.mark.parametrize("first", ["record", "force"])
@pytest.mark.parametrize("weights", ["router", "given"])
def test_a_forced_run_is_recorded_as_it_ran(model, tmp_path, first, weights):
    ids, given = random_ids(2, 10), torch.rand(2, 10, 2)
    options = {} if weights == "router" else {"weights": given}
    opened = {
        "record": lambda: moe_lens.record(model, tmp_path / "run", tokens=1.0, weights="exact"),
        "force": lambda: moe_lens.force_routing(model, ids, **options),
    }
    order = [first, *(set(opened) - {first})]
    with torch.no_grad(), spy(model) as calls, opened[order[0]](), opened[order[1]]():
        model(TOKENS)
    rows = read(tmp_path / "run", "routing").to_pandas().sort_values(["layer", "token"])
    assert rows.expert_ids.map(list).tolist() == ids.flatten(0, 1).tolist()
    recorded = torch.from_numpy(np.stack(rows.weights))
    assert torch.equal(recorded, torch.cat([w for _, _, w in calls]))
    assert (weights == "given") == torch.equal(recorded, given.flatten(0, 1))
    assert not open_run(tmp_path / "run").meta.warnings
    assert bare(model)


def test_two_wills_on_one_model_are_refused(model):
    with moe_lens.force_routing(model, random_ids(2, 10)):
        with pytest.raises(SteeringError, match=r"blocks.0 is forced by another"):
            moe_lens.force_routing(model, random_ids(2, 10))
    moe_lens.force_routing(model, random_ids(2, 10)).close()
    assert bare(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_a_block_leaves_nothing_behind(model, error):
    def fail(module, args):
        raise error("stop")

    handle = model.blocks[1].experts.register_forward_pre_hook(fail)
    with pytest.raises(error), moe_lens.force_routing(model, random_ids(2, 10)):
        model(TOKENS)
    handle.remove()
    assert bare(model)
    ids = random_ids(2, 10)
    with moe_lens.force_routing(model, ids), torch.no_grad(), spy(model) as calls:
        model(TOKENS)
    assert torch.equal(calls[1][1], ids[1])


def test_an_interrupted_forward_is_followed_by_a_good_one(model):
    ids, fail = random_ids(2, 10), [True]

    def maybe(module, args):
        if fail.pop() if fail else False:
            raise KeyboardInterrupt

    handle = model.blocks[0].experts.register_forward_pre_hook(maybe)
    with torch.no_grad(), moe_lens.force_routing(model, ids) as forced:
        with pytest.raises(KeyboardInterrupt):
            model(TOKENS)
        with spy(model) as calls:
            model(TOKENS)
    handle.remove()
    assert torch.equal(calls[0][1], ids[0])
    assert forced.forwards == 1
    assert bare(model)


def test_other_modes_of_torch_stay_in_place(model):
    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    ids = random_ids(2, 10)
    with torch.no_grad(), torch.device("cpu"), Counting() as mode, spy(model) as calls:
        with moe_lens.force_routing(model, ids):
            model(TOKENS)
        assert [m is mode for m in _get_current_function_mode_stack()][-1]
    assert mode.calls > 0
    assert torch.equal(calls[0][1], ids[0])


class Watching(TorchFunctionMode):
    """Keeps the ids of the last topk."""

    ids = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "topk":
            self.ids = result[1]
        return result


@pytest.mark.parametrize("first", ["record", "force"])
def test_who_watches_the_router_from_inside_its_block_sees_what_was_forced(model, tmp_path, first):
    class Watcher:
        """Reads ids off torch's functions, as adapters of blocks without modules do."""

        name = "watcher"

        def layer(self, path, module):
            found = FusedExperts().layer(path, module)
            if found is None:
                return None

            @contextmanager
            def around(seen):
                with Watching() as mode:
                    yield
                seen.router_ids_TK = mode.ids

            found.taps = [found.taps[0], Tap(module, "around", around=around)]
            return found

    ids, watcher = random_ids(2, 10), [Watcher()]
    opened = {
        "record": lambda: moe_lens.record(model, tmp_path / "run", tokens=1.0, adapters=watcher),
        "force": lambda: moe_lens.force_routing(model, ids, adapters=watcher),
    }
    order = [first, *(set(opened) - {first})]
    with torch.no_grad(), opened[order[0]](), opened[order[1]]():
        model(TOKENS)  # a recorder whose router says otherwise than its experts got would raise
        assert not _get_current_function_mode_stack()
    rows = read(tmp_path / "run", "routing").to_pandas().sort_values(["layer", "token"])
    assert rows.expert_ids.map(list).tolist() == ids.flatten(0, 1).tolist()


def test_a_mode_is_taken_from_between_others():
    below, mine, above = Watching(), Watching(), Watching()
    with below, mine, above:
        remove(mine)
        remove(mine)
        stack = _get_current_function_mode_stack()
        push(mine)  # for the `with` to end
    assert [m is x for m, x in zip(stack, (below, above), strict=True)] == [True, True]


def test_what_others_compute_when_a_block_is_through_is_theirs(model):
    scores = torch.rand(10, 6)
    theirs = []
    handle = model.blocks[0].register_forward_hook(lambda *_: theirs.append(scores.topk(2)[1]))
    with torch.no_grad(), moe_lens.force_routing(model, random_ids(2, 10)):
        model(TOKENS)
    handle.remove()
    assert torch.equal(theirs[0], scores.topk(2)[1])


def test_ids_that_another_hook_changes_after_all_are_noticed(model):
    with torch.no_grad(), moe_lens.force_routing(model, random_ids(2, 10)):
        handle = model.blocks[0].experts.register_forward_pre_hook(
            lambda m, args: (args[0], args[1].roll(1, 0), args[2])
        )
        with pytest.raises(UnsupportedRouter, match="of 10 tokens went to other experts"):
            model(TOKENS)
        handle.remove()


class InlineBlock(nn.Module):
    """Experts in a list, the choice made in the block: nobody described it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 6, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x_BSD):
        x_TD = x_BSD.reshape(-1, 8)
        weights, ids = self.gate(x_TD).softmax(-1).topk(2)
        out = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.experts):
            token, slot = (ids == e).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(x_TD[token]) * weights[token, slot, None])
        return out.view_as(x_BSD)


def test_blocks_that_nobody_described_are_forced_too(model, tmp_path):
    model.blocks = nn.ModuleList(InlineBlock() for _ in range(2))
    ids = random_ids(2, 10)
    with torch.no_grad():
        with moe_lens.record(model, tmp_path / "run", tokens=1.0, weights="exact") as rec:
            free = model(TOKENS)
            with moe_lens.force_routing(model, ids):
                told = model(TOKENS)
        with moe_lens.force_routing(model, tmp_path / "run"):
            assert torch.equal(model(TOKENS), free)
            assert torch.equal(model(TOKENS), told)
    assert rec.path.exists()
    assert not torch.equal(free, told)
    rows = read(tmp_path / "run", "routing").to_pandas().query("step == 1")
    got = rows.sort_values(["layer", "token"]).expert_ids.map(list).tolist()
    assert got == ids.flatten(0, 1).tolist()


def test_shared_blocks_are_layers_of_their_own(tmp_path):
    torch.manual_seed(0)
    model = TinyModel(experts=6, top_k=2).eval()
    model.blocks.append(model.blocks[0])  # runs twice in a forward
    ids = random_ids(3, 10)
    record_told = moe_lens.record(model, tmp_path / "run", tokens=1.0, weights="exact")
    with torch.no_grad(), record_told, moe_lens.force_routing(model, ids), spy(model) as calls:
        told = model(TOKENS)
    assert torch.equal(calls[2][1], ids[2])
    with torch.no_grad(), moe_lens.force_routing(model, tmp_path / "run"):
        assert torch.equal(model(TOKENS), told)
