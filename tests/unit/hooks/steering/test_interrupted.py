"""What a forward that did not end leaves behind: nothing, and no decision is used up."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import TinyModel
from support.steering import TOKENS, bare, random_ids, record
from torch.overrides import _get_current_function_mode_stack

import moe_lens
from moe_lens import SteeringError
from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks import MoELayer, Tap
from moe_lens_hooks.adapters.fused_experts import FusedExperts
from moe_lens_hooks.adapters.torch_calls import TorchCalls


class Once:
    """A hook that raises when it is called first."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *given):
        error, self.error = self.error, None
        if error is not None:
            raise error


@pytest.mark.parametrize("by", ["forward", "position"])
def test_a_forward_that_raised_can_be_tried_again(model, tmp_path, by):
    batches = [TOKENS, TOKENS + 7]
    outs = record(model, tmp_path / "run", batches)
    with torch.no_grad(), moe_lens.force_routing(model, tmp_path / "run", by=by) as forced:
        for batch, out in zip(batches, outs, strict=True):
            hook = model.blocks[1].experts.register_forward_hook(Once(RuntimeError("no memory")))
            with pytest.raises(RuntimeError, match="no memory"):
                model(batch)
            hook.remove()
            assert torch.equal(model(batch), out)
        assert forced.forwards == 2
        with pytest.raises(SteeringError):  # nothing is left
            model(TOKENS)
    assert bare(model)


def test_a_forward_of_named_rows_that_raised_can_be_tried_again(model, tmp_path):
    out = record(model, tmp_path / "run")[0]
    with torch.no_grad(), moe_lens.force_routing(model, tmp_path / "run", by="position") as forced:
        forced.rows([1])
        model.blocks[1].experts.register_forward_hook(Once(RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            model(TOKENS[1:])
        model(TOKENS[1:])
        forced.rows(None)  # the next ones in order: from the first on, since none was taken yet
        assert torch.equal(model(TOKENS), out)


def test_a_refused_batch_takes_no_decisions(model, tmp_path):
    out = record(model, tmp_path / "run", token_ids=True)[0]
    with torch.no_grad(), moe_lens.force_routing(model, tmp_path / "run") as forced:
        with pytest.raises(SteeringError, match="another text"):
            model(TOKENS + 1)
        assert torch.equal(model(TOKENS), out)
        assert forced.forwards == 1


class Looking(FusedExperts):
    """Looks at what torch's functions do inside the router, too."""

    def layer(self, path, module):
        found = super().layer(path, module)
        if found is not None:
            around = Tap(
                found.router, "around", around=lambda seen: TorchCalls(lambda *given: None)
            )
            found.taps.insert(0, around)
        return found


@pytest.mark.parametrize("then", ["the next forward", "close"])
def test_no_mode_is_left_by_an_interrupt(model, then):
    forced = moe_lens.force_routing(model, random_ids(2, 10), adapters=[Looking()])
    model.blocks[1].gate.register_forward_hook(Once(KeyboardInterrupt()), prepend=True)
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            model(TOKENS)
        assert len(_get_current_function_mode_stack()) == 2  # torch calls no hook then
        if then == "close":
            forced.close()
        else:
            model(TOKENS)
        assert not _get_current_function_mode_stack()
        scores = torch.randn(10, 6)
        assert torch.equal(torch.topk(scores, 2).indices, scores.argsort(-1).flip(-1)[:, :2])
    forced.close()


class Detached:
    """An adapter whose tap is no hook on anything that can be hooked."""

    name = "detached"

    def layer(self, path, module):
        if path != "blocks.1":
            return None
        info = LayerInfo(layer=-1, path=path, experts=6, top_k=2, adapter=self.name)
        return MoELayer(module, info, [Tap(None, "output", lambda *given: None)])


def test_what_cannot_be_attached_is_not_half_attached(model):
    with pytest.raises(AttributeError):
        moe_lens.force_routing(model, random_ids(2, 10), adapters=[Detached()])
    assert bare(model)
    model.forward = type("NoSignature", (), {"__call__": lambda self, x: x, "__signature__": 5})()
    with pytest.raises(TypeError):
        moe_lens.force_routing(model, random_ids(2, 10))
    assert bare(model)
    del model.forward
    with torch.no_grad(), moe_lens.force_routing(model, random_ids(2, 10)):  # no block is taken
        model(TOKENS)


class OwnState(TinyModel):
    """Says itself what belongs to its state, as DistributedDataParallel does."""

    def __getstate__(self):
        return dict(self.__dict__)


def test_a_copy_that_took_hooks_along_is_not_forced():
    torch.manual_seed(0)
    model = OwnState(experts=6, top_k=2).eval()
    with torch.no_grad():
        free = model(TOKENS)
        with moe_lens.force_routing(model, random_ids(2, 10)) as forced:
            twin = copy.deepcopy(model)
            assert twin._forward_pre_hooks
            for block, own in zip(twin.blocks, model.blocks, strict=True):
                block._forward_pre_hooks.update(own._forward_pre_hooks)
                block._forward_hooks.update(own._forward_hooks)
                block._forward_pre_hooks_with_kwargs.update(own._forward_pre_hooks_with_kwargs)
            assert torch.equal(twin(TOKENS), free)
            assert forced.forwards == 0
            assert not torch.equal(model(TOKENS), free)
            assert forced.forwards == 1


def test_replicas_of_data_parallel_are_refused(model):
    with moe_lens.force_routing(model, random_ids(2, 10)):
        replica = model.blocks[0]._replicate_for_data_parallel()
        with pytest.raises(SteeringError, match="use DistributedDataParallel"):
            replica(torch.randn(2, 5, 8))
