"""torchtitan's MoE: what is recorded is what its dispatcher executes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.probe import assert_equal, captured, sorted_rows
from support.ranks import run_ranks
from support.tables import read
from support.torchtitan_moe import ROUTERS, D, E, K, make
from torch import nn
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher

import moe_lens
from moe_lens.errors import CaptureBreach, UnsupportedRouter

B, L = 2, 24


class OneHots(nn.Module):
    def forward(self, rows, counts):
        return sorted_rows(rows, counts)


@pytest.fixture(params=ROUTERS)
def model(request):
    return make(request.param).eval()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(B, L, D)


def recorded(model, x, run, **kw):
    with moe_lens.record(model, run, tokens=1.0, weights="exact", **kw) as rec:
        with rec.step(["a", "b"]):
            return model(x)


def layer(run):
    return json.loads((run / "meta" / "rank=0.json").read_text())["layers"][0]


def test_ids_and_weights_are_those_that_were_executed(model, x, tmp_path):
    model.routed_experts.inner_experts = OneHots()
    run = tmp_path / "run"
    out = recorded(model, x, run)
    ran = assert_equal(captured(run), out, E)
    assert (ran.sum(1) == K).all()
    load = read(run, "load").to_pandas()
    for row in load.itertuples():
        mine = ran[:L] if row.tag == "a" else ran[L:]
        assert row.routed == row.processed == mine[:, row.expert].sum()


def test_ablating_an_expert_changes_exactly_its_tokens(model, x, tmp_path):
    run = tmp_path / "run"
    whole = recorded(model, x, run).detach().reshape(-1, D)
    ran = ~np.isnan(captured(run).executed(E))
    w2 = model.routed_experts.inner_experts.w2_EDF
    for e in range(E):
        with torch.no_grad():
            kept = w2[e].clone()
            w2[e] = 0
            changed = (model(x).reshape(-1, D) != whole).any(-1).numpy()
            w2[e] = kept
        assert (changed == ran[:, e]).all()


def test_what_the_dispatcher_is_given_is_recorded_bit_for_bit(model, x, tmp_path):
    seen = []
    dispatcher = model.routed_experts.token_dispatcher
    dispatch = dispatcher.dispatch
    dispatcher.dispatch = lambda x, w, ids, n: seen.append((w, ids)) or dispatch(x, w, ids, n)
    recorded(model, x, tmp_path / "run")
    got = captured(tmp_path / "run")
    weights, ids = (t.detach().numpy() for t in seen[0])
    assert np.array(got.ids).tolist() == ids.tolist()
    assert np.array(got.weights, np.float32).tobytes() == weights.tobytes()


@pytest.mark.parametrize(
    ("router", "bias", "score", "selection", "normalised"),
    [
        ("softmax", 0.0, "softmax", "softmax+bias", False),
        ("softmax normalised", 0.1, "softmax", "softmax+bias", True),
        ("sigmoid", 0.1, "sigmoid", "sigmoid+bias", False),
        ("groups", 0.1, "sigmoid", "sigmoid+bias, groups by top-2", False),
    ],
)
def test_the_router_is_described(router, bias, score, selection, normalised, x, tmp_path):
    recorded(make(router, bias, shared=True), x, tmp_path / "run")
    said = layer(tmp_path / "run")
    assert (said["score"], said["selection"], said["normalised"]) == (score, selection, normalised)
    assert (said["experts"], said["top_k"], said["shared_experts"]) == (E, K, 1)
    assert said["capacity_policy"] is None
    groups = (4, 2) if router == "groups" else (None, None)
    assert (said["groups"], said["top_groups"]) == groups


@pytest.mark.parametrize("router", ["softmax normalised", "sigmoid", "groups"])
def test_margin_and_entropy_are_of_logits_and_bias(router, x, tmp_path):
    model = make(router)
    run = tmp_path / "run"
    recorded(model, x, run, logits=True)
    z = x.reshape(-1, D).double().numpy() @ model.router.gate.weight.detach().double().numpy().T
    stored = np.stack(read(run, "logits").to_pandas().sort_values("token").logits)
    np.testing.assert_allclose(stored, z, rtol=2**-8, atol=1e-5)  # stored rounded
    rows = read(run, "routing").to_pandas().sort_values("token")
    for row, logits in zip(rows.itertuples(), z, strict=True):
        p = 1 / (1 + np.exp(-logits))
        if router.startswith("softmax"):
            p = np.exp(logits - logits.max())
            p /= p.sum()
        share = p / p.sum()
        score = p + model.expert_bias_E.double().numpy()
        if router == "groups":
            value = np.sort(score.reshape(4, 2), 1).sum(1)
            score[~np.isin(np.arange(E) // 2, np.argsort(-value)[:2])] = -np.inf
        order = np.argsort(-score)
        assert set(row.expert_ids) == set(order[:K])
        assert row.entropy == pytest.approx(-(share * np.log(share)).sum(), rel=2**-7)
        margin = score[order[K - 1]] - score[order[K]]
        assert row.margin == pytest.approx(margin, rel=2**-6, abs=1e-4)


def test_its_own_counter_agrees(x, tmp_path):
    model = make().train()
    recorded(model, x, tmp_path / "run")
    load = read(tmp_path / "run", "load").to_pandas()
    own = model.tokens_per_expert_E.tolist()
    assert load.groupby("expert").routed.sum().reindex(range(E), fill_value=0).tolist() == own


def test_gradients_are_the_same_with_recording_on(model, x, tmp_path):
    def gradients(run=None):
        model.zero_grad()
        y = model(x) if run is None else recorded(model, x, run)
        y.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for a, b in zip(gradients(), gradients(tmp_path / "run"), strict=True):
        assert torch.equal(a, b)


def test_the_dispatcher_of_expert_parallelism_without_a_mesh(x, tmp_path):
    model = make(dispatcher=AllToAllTokenDispatcher).eval()
    model.routed_experts.inner_experts = OneHots()
    out = recorded(model, x, tmp_path / "run")
    assert_equal(captured(tmp_path / "run"), out, E)


def test_two_ranks_of_experts(tmp_path):
    """Each rank records its own tokens; an expert's rank receives those of both."""
    run_ranks("torchtitan_rank.py", 2, tmp_path)
    with moe_lens.open(tmp_path / "run") as trace:
        load, routing = (trace.table(name).df() for name in ("load", "routing"))
    routed = np.zeros(E, int)
    for r in range(2):
        mine = routing[routing["rank"] == r].sort_values("token")
        ran = np.zeros((B * L, E), np.float32)
        for t, row in enumerate(mine.itertuples()):
            ran[t, row.expert_ids] = row.weights
        told = np.load(tmp_path / f"rank{r}.npz")["weights"]
        assert ((told != 0) == (ran != 0)).all()
        np.testing.assert_allclose(ran, told, rtol=1e-6)
        routed += (ran != 0).sum(0)
    received = load.groupby(["rank", "expert"]).received.sum().unstack(fill_value=0)
    assert received.sum().reindex(range(E), fill_value=0).tolist() == routed.tolist()
    assert (received.loc[0, 4:] == 0).all()
    assert (received.loc[1, :3] == 0).all()


def test_rows_received_are_null_where_the_dispatcher_does_not_tell(x, tmp_path):
    model = nn.Sequential(make(), make())
    model[1].routed_experts.token_dispatcher.__class__ = type("Other", (LocalTokenDispatcher,), {})
    with moe_lens.record(model, tmp_path / "run") as rec, rec.step():
        model(x)
    load = read(tmp_path / "run", "load").to_pandas()
    first, second = (load[load.layer == i] for i in (0, 1))
    assert first.received.tolist() == first.processed.tolist()
    assert second.received.isna().all()


def test_a_dispatcher_that_drops_in_silence_is_refused(tmp_path):
    model = make()
    model.routed_experts.token_dispatcher.non_blocking_capacity_factor = 0.5
    with pytest.raises(UnsupportedRouter, match="drops tokens without saying which"):
        moe_lens.record(model, tmp_path / "run")


def test_ids_changed_behind_the_router_are_a_breach(x, tmp_path):
    model = make()
    forward = model.router.forward

    def shifted(*args):
        weights, ids, scores = forward(*args)
        return weights, (ids + 1) % E, scores

    model.router.forward = shifted
    recorded(model, x, tmp_path / "consistent")  # a router may choose what it likes
    routed = model.routed_experts
    routed.register_forward_pre_hook(lambda m, a: (a[0], a[1], (a[2] + 1) % E, a[3]), prepend=True)
    with pytest.raises(CaptureBreach, match="rows counted for another expert than was chosen"):
        recorded(model, x, tmp_path / "inconsistent")


def test_a_sharded_tensor_is_a_breach(x, tmp_path):
    class Sharded(torch.Tensor):
        def to_local(self):
            return self.as_subclass(torch.Tensor)

    model = make()
    model.router.gate.register_forward_hook(lambda m, a, out: out.as_subclass(Sharded))
    with pytest.raises(CaptureBreach, match="tensor parallelism is not recorded in torchtitan"):
        recorded(model, x, tmp_path / "run")
