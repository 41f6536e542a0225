"""No look at a number on the device and no copy that waits, in the whole path of a forward."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from support.fake_cuda import DEVICE, FakeLane, NoWaiting
from support.models import TinyModel, build
from support.tables import frame
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_lens
from moe_lens_hooks import intake, staging
from moe_lens_hooks.semantics import Semantics

# The zeros that arrive break invariants, which is not what is looked at here.
pytestmark = pytest.mark.filterwarnings("ignore:step:UserWarning")


@pytest.fixture(autouse=True)
def known_routers(monkeypatch):
    """What a layer's first forward learns it looks at: here it is known already."""

    def known(seen, router, experts, declared):
        if seen.logits_TE is None:
            return None
        return Semantics("softmax", "logits", lambda z, bias: z, True, True)

    monkeypatch.setattr(intake, "learn", known)


@pytest.fixture
def lane(monkeypatch):
    for device in (DEVICE, torch.device("cpu")):  # what is on the host has no values either
        monkeypatch.setitem(staging.lanes, device, FakeLane(device))
    monkeypatch.setattr(staging, "DEVICES", ("cpu", DEVICE.type))
    monkeypatch.setattr(torch, "autocast", lambda device_type, enabled: nullcontext())


class Positioned(TinyModel):
    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return super().forward(input_ids, attention_mask)


def on_device(*sizes):
    return torch.zeros(sizes, dtype=torch.int64, device=DEVICE)


def steps(model, run, forwards, **options):
    """Record forwards on the device that is not there; the numbers that arrive are all zero."""
    with moe_lens.record(model, run, on_breach="warn", **options) as rec:
        for said, given, loss in forwards:
            with NoWaiting() as mode:
                with rec.step(**said):
                    model(**given)
                    if loss is not None:
                        rec.loss(loss)
            assert mode.seen > 0
    return frame(run, "steps")


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "said",
    [
        {},
        {"tags": ["a", "b", "a"]},
        {"tags": [["a"] * 4, ["b"] * 4, ["a", "b", "b", "a"]]},
        {"sequences": ["x", "y", "z"]},
        {"sequences": [0, 3, 5, 12], "tags": ["a", "b", "a"]},
        {"padding": [4, 2, 3]},
    ],
)
def test_a_forward_makes_no_device_wait(tmp_path, lane, share, said):
    with FakeTensorMode(), DEVICE, torch.no_grad():
        model = Positioned().eval()
        given = {
            "input_ids": on_device(3, 4),
            "attention_mask": None if "padding" in said else on_device(3, 4),
            "position_ids": on_device(3, 4),
        }
        loss = torch.zeros(3, 4, device=DEVICE)
        found = steps(
            model,
            tmp_path / "run",
            [(said, given, loss), (said, {"input_ids": on_device(3, 4)}, None)],
            tokens=share,
            logits=True,
            token_ids=True,
        )
    assert found.fires_seen.tolist() == [2, 2]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_models_of_transformers_make_no_device_wait(tmp_path, lane, family):
    with FakeTensorMode(), DEVICE, torch.no_grad():
        model = build(family)
        model.set_attn_implementation("eager")
        model.set_experts_implementation("batched_mm")
        given = {"input_ids": on_device(2, 5), "use_cache": False}
        found = steps(model, tmp_path / "run", [({}, given, None)], tokens=1.0)
    assert found.fires_seen.tolist() == found.fires_expected.tolist()


@pytest.mark.parametrize(
    "look",
    [
        lambda ids: bool((ids >= 0).all()),
        lambda ids: ids.max().item(),
        lambda ids: ids.tolist(),
        lambda ids: ids[ids > 0],
        lambda ids: ids.cpu(),
        lambda ids: torch.zeros(3, device="cpu").to(ids.device),
    ],
)
def test_looking_would_be_seen(tmp_path, lane, look, monkeypatch):
    reduce = intake.reduce

    def looking(seen, *args, **kwargs):
        look(seen[0].expert_ids_TK)
        return reduce(seen, *args, **kwargs)

    monkeypatch.setattr(intake, "reduce", looking)
    with FakeTensorMode(), DEVICE, torch.no_grad():
        model = TinyModel()
        forwards = [({}, {"input_ids": on_device(3, 4)}, None)]
        with pytest.warns(UserWarning, match="could not be read"):
            found = steps(model, tmp_path / "run", forwards)
    assert found.fires_seen.tolist() == [0]
