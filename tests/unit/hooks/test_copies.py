"""Copies of a recorded model, and files it is saved to, have none of our hooks."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from support.models import TinyModel
from support.tables import frame
from torch import nn

import moe_lens
from moe_lens_hooks.adapters import all_adapters
from moe_lens_hooks.finding import find_layers

IDS = torch.arange(12).reshape(3, 4)
GETSTATE = nn.Module.__getstate__


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def hooks_of(model):
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Noting:
    def __init__(self):
        self.shapes = []

    def __call__(self, module, args, output):
        self.shapes.append(tuple(output.shape))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_a_file])
def test_a_copy_is_not_recorded_as_its_original(tmp_path, duplicate):
    model = TinyModel().eval()
    theirs = model.register_forward_hook(Noting())
    with torch.no_grad(), moe_lens.record(model, tmp_path / "run") as rec:
        with rec.step():
            model(IDS)
        twin = duplicate(model)
        assert hooks_of(twin) == [theirs.id]  # what others attached goes along
        with rec.step():
            expected = model(IDS)
            assert torch.equal(twin(IDS), expected)
            twin._forward_hooks.clear()
            torch.compile(twin, backend="eager")(IDS)
        with moe_lens.record(twin, tmp_path / "twin"):  # it can have a recorder of its own
            twin(IDS)
    assert frame(tmp_path / "run", "steps").step.tolist() == [0, 1]
    assert frame(tmp_path / "twin", "steps").step.tolist() == [0]


def test_a_copy_of_a_forced_model_routes_by_itself():
    torch.manual_seed(0)
    model = TinyModel().eval()
    before = model(IDS)
    layers = find_layers([model], all_adapters())
    ids = {i: torch.tensor([[0, 1]]).expand(12, 2) for i in range(len(layers))}
    with moe_lens.force_routing(model, ids):
        forced = model(IDS)
        twin = copy.deepcopy(model)
        assert not hooks_of(twin)
        assert torch.equal(twin(IDS), before)
    assert not torch.equal(forced, before)


def test_torch_is_left_as_it_was(tmp_path):
    one, two = TinyModel(), TinyModel()
    with moe_lens.record(one, tmp_path / "one"):
        with moe_lens.record(two, tmp_path / "two"):
            assert nn.Module.__getstate__ is not GETSTATE
            two(IDS)
        assert not hooks_of(copy.deepcopy(one))  # the first is still open
        one(IDS)
    assert nn.Module.__getstate__ is GETSTATE


def test_a_copy_made_of_a_compiled_model_is_free_too(tmp_path):
    """torch leaves what it compiled out of a module's state, and so must we."""
    model = TinyModel().eval()
    with torch.no_grad(), moe_lens.record(model, tmp_path / "run"):
        model.compile(backend="eager")
        model(IDS)
        twin = through_a_file(model)
    assert twin._compiled_call_impl is None
    assert torch.equal(twin(IDS), model(IDS))
