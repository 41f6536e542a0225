"""megatron-core's MoELayer: choices before dropping, execution after it, one and two ranks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import support.megatron_on_cpu as megatron  # before anything else imports megatron
import torch
from megatron.core.transformer.moe import router as router_module
from support.probe import assert_equal, captured, sorted_rows
from support.ranks import run_ranks
from support.tables import read
from torch import nn

import moe_lens
from moe_lens.errors import CaptureBreach, UnsupportedRouter

D, E = megatron.D, megatron.E
S, B, K = 24, 2, 2
T = S * B

LAYERS = {
    "dropless": {},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "probs": {"moe_expert_capacity_factor": 0.8, "moe_token_drop_policy": "probs"},
    "position": {"moe_expert_capacity_factor": 0.8, "moe_token_drop_policy": "position"},
    "room for all": {"moe_expert_capacity_factor": 8.0},
    "padded": {"moe_expert_capacity_factor": 0.8, "moe_pad_expert_input_to_capacity": True},
    "k=1": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "probs on input": {
        "moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_apply_probs_on_input": True,
    },
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn"},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "groups": {
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 4, "moe_router_group_topk": 2,
    },
    "losses": {
        "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01,
        "moe_z_loss_coeff": 0.01, "moe_expert_capacity_factor": 0.8,
    },
}  # fmt: skip
DROPS = ["probs", "position", "room for all", "padded", "losses"]


@pytest.fixture(autouse=True, scope="module")
def group(tmp_path_factory):
    megatron.join(0, 1, str(tmp_path_factory.mktemp("group") / "store"))
    yield
    torch.distributed.destroy_process_group()


class OneHots(nn.Module):
    def forward(self, rows, counts, probs):
        return sorted_rows(rows, counts) * probs.unsqueeze(-1), None


@pytest.fixture(params=LAYERS)
def model(request):
    return megatron.layer(**LAYERS[request.param])


@pytest.fixture
def x():
    torch.manual_seed(2)
    return torch.randn(S, B, D)


def recorded(model, x, run, tags=("a", "b"), **kw):
    with moe_lens.record(model, run, tokens=1.0, weights="exact", layout="sb", **kw) as rec:
        with rec.step(tags):
            return model(x)[0]


def logits(model, x):
    return x.reshape(T, D).double().numpy() @ model.router.weight.detach().double().numpy().T


def test_ids_and_weights_are_those_that_were_executed(model, x, tmp_path):
    model.experts = OneHots()
    run = tmp_path / "run"
    out = recorded(model, x, run)
    ran = assert_equal(captured(run), out, E)
    load = read(run, "load").to_pandas()
    for row in load.itertuples():  # token t is of sequence t % B
        assert row.processed == ran["ab".index(row.tag) :: B, row.expert].sum()
    assert load.routed.sum() == T * model.config.moe_router_topk


def test_ablating_an_expert_changes_exactly_its_tokens(model, x, tmp_path):
    whole = recorded(model, x, tmp_path / "run").detach().reshape(T, D)
    ran = ~np.isnan(captured(tmp_path / "run").executed(E))
    for e in range(E):
        w = model.experts.local_experts[e].linear_fc2.weight
        with torch.no_grad():
            kept = w.clone()
            w.zero_()
            changed = (model(x)[0].reshape(T, D) != whole).any(-1).numpy()
            w.copy_(kept)
        assert (changed == ran[:, e]).all()


@pytest.mark.parametrize("name", DROPS)
def test_choices_are_those_before_and_execution_that_after_dropping(name, x, tmp_path):
    model = megatron.layer(**LAYERS[name])
    recorded(model, x, tmp_path / "run")
    got = captured(tmp_path / "run")
    z = logits(model, x)
    assert got.ids == np.argsort(-z, 1)[:, :K].tolist()
    capacity = math.ceil(T * K / E * LAYERS[name]["moe_expert_capacity_factor"])
    p = np.exp(np.sort(z, 1)[:, -K:])
    p = (np.exp(z) / p.sum(1, keepdims=True)).tolist()
    lost = []
    for e in range(E):
        mine = [(t, ids.index(e)) for t, ids in enumerate(got.ids) if e in ids]
        if LAYERS[name].get("moe_token_drop_policy", "probs") == "probs":
            mine.sort(key=lambda at: -p[at[0]][e])
            lost += mine[capacity:]
        else:  # by torch's topk among equals: it promises how many, not whom
            dropped = [(t, slot) for t, slot in mine if slot in got.dropped[t]]
            assert len(dropped) == max(len(mine) - capacity, 0)
            lost += dropped
    assert sorted(lost) == [(t, slot) for t, d in enumerate(got.dropped) for slot in sorted(d)]
    assert (len(lost) > 0) == (name != "room for all")
    load = read(tmp_path / "run", "load").to_pandas()
    assert load.dropped.sum() == load.overflowed.sum() == len(lost)
    layers = read(tmp_path / "run", "layers").to_pandas()
    assert layers.capacity.tolist() == [capacity]
    policy = "position" if name == "position" else "probability"
    assert said(tmp_path / "run")["capacity_policy"] == f"drop-by-{policy}"


def said(run):
    return json.loads((run / "meta" / "rank=0.json").read_text())["layers"][0]


@pytest.mark.parametrize(
    ("name", "score", "selection", "normalised"),
    [
        ("dropless", "softmax", "logits", True),
        ("k=1", "softmax", "logits", False),
        ("probs", "softmax", "logits", True),
        ("sinkhorn", "softmax", None, False),
        ("sigmoid", "sigmoid", "sigmoid+bias", True),
        ("groups", "sigmoid", "sigmoid+bias, groups by top-1", True),
    ],
)
def test_the_router_is_described(name, score, selection, normalised, x, tmp_path):
    model = megatron.layer(**LAYERS[name])
    recorded(model, x, tmp_path / "run", logits=True)
    info = said(tmp_path / "run")
    assert (info["score"], info["selection"], info["normalised"]) == (score, selection, normalised)
    assert (info["groups"], info["top_groups"]) == ((4, 2) if name == "groups" else (None, None))
    assert (info["experts"], info["top_k"]) == (E, model.config.moe_router_topk)
    rows = read(tmp_path / "run", "logits").to_pandas().sort_values("token")
    np.testing.assert_allclose(np.stack(rows.logits), logits(model, x), rtol=2**-8, atol=1e-5)
    routing = read(tmp_path / "run", "routing").to_pandas().sort_values("token")
    for row, z in zip(routing.itertuples(), logits(model, x), strict=True):
        p = 1 / (1 + np.exp(-z)) if score == "sigmoid" else np.exp(z - z.max())
        p = p / p.sum()
        assert row.entropy == pytest.approx(-(p * np.log(p)).sum(), rel=2**-7)


def test_weights_on_the_input_are_named(x, tmp_path):
    for name, where in (("k=1", "output"), ("probs on input", "input")):
        recorded(megatron.layer(**LAYERS[name]), x, tmp_path / name)
        assert said(tmp_path / name)["weights_on"] == where


def test_gradients_are_the_same_and_nothing_stays_wrapped(model, x, tmp_path):
    dropping = router_module.apply_router_token_dropping

    def gradients(run=None):
        model.zero_grad()
        y = model(x)[0] if run is None else recorded(model, x, run)
        y.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for a, b in zip(gradients(), gradients(tmp_path / "run"), strict=True):
        assert torch.equal(a, b)
    assert "routing" not in vars(model.router)
    assert router_module.apply_router_token_dropping is dropping


def test_a_router_that_raises_is_left_as_it_was(x, tmp_path):
    model = megatron.layer(**LAYERS["probs"])
    dropping = router_module.apply_router_token_dropping
    model.config.moe_token_drop_policy = "no such policy"
    with pytest.raises(ValueError, match="Invalid drop_policy"):
        recorded(model, x, tmp_path / "run")
    assert "routing" not in vars(model.router)
    assert router_module.apply_router_token_dropping is dropping


def test_another_thread_s_model_is_not_taken_for_this_one(x, tmp_path):
    import threading

    model, other = (megatron.layer(**LAYERS["probs"]) for _ in range(2))
    with torch.no_grad():
        other.router.weight.neg_()
    routing = type(model.router).routing

    def run_other():
        with torch.no_grad():
            other(x)

    def with_other(logits, **kw):
        out = routing(model.router, logits, **kw)
        thread = threading.Thread(target=run_other)  # before this router is left
        thread.start()
        thread.join()
        return out

    model.router.routing = with_other
    recorded(model, x, tmp_path / "run")
    assert captured(tmp_path / "run").ids == np.argsort(-logits(model, x), 1)[:, :K].tolist()
    assert "routing" in vars(model.router)  # what was there before is there again


def test_a_whole_model_numbers_tokens_by_sequence(tmp_path):
    model = megatron.gpt(moe_expert_capacity_factor=1.0).eval()
    ids = torch.randint(0, megatron.VOCAB, (3, 12))
    positions = torch.arange(12).expand(3, 12)
    mask = torch.triu(torch.ones(1, 1, 12, 12, dtype=torch.bool), 1)
    run = tmp_path / "run"
    with moe_lens.record(model, run, tokens=1.0, layout="sb", token_ids=True) as rec:
        with rec.step(["a", "b", "c"]):
            model(ids, positions, mask)
    tokens = read(run, "tokens").to_pandas()
    for row in tokens.itertuples():
        assert (row.token % 3, row.token // 3) == (row.sequence, row.position)
        assert row.tag == "abc"[row.sequence]
        assert row.token_id == ids[row.sequence, row.position]
    load = read(run, "load").to_pandas()
    assert (load.groupby(["layer", "tag"]).routed.sum() == 12 * K).all()
    assert set(load.layer) == {0, 1}


def test_another_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'pass record\(\.\.\., layout="sb"\)'):
        moe_lens.record(megatron.gpt(), tmp_path / "run")


def test_sequence_parallelism_is_refused(tmp_path):
    model = megatron.layer()
    model.config.sequence_parallel, model.config.tensor_model_parallel_size = True, 2
    with pytest.raises(UnsupportedRouter, match="sequence parallel over 2 ranks"):
        moe_lens.record(model, tmp_path / "run", layout="sb")


def test_rows_received_are_null_where_tags_divide_them(x, tmp_path):
    model = megatron.layer(**LAYERS["padded"])
    recorded(model, x, tmp_path / "two")
    assert read(tmp_path / "two", "load").to_pandas().received.isna().all()
    recorded(model, x, tmp_path / "one", "all")
    load = read(tmp_path / "one", "load").to_pandas()
    assert load.received.tolist() == [math.ceil(T * K / E * 0.8)] * E  # padding slots too


def test_a_router_of_another_kind_is_refused(tmp_path):
    model = megatron.layer()
    model.router = nn.Linear(D, E)
    with pytest.raises(UnsupportedRouter, match="has a Linear whose choices cannot be seen"):
        moe_lens.record(model, tmp_path / "run")


def test_a_router_that_drops_in_another_way_is_refused(tmp_path):
    namespace = {"Base": router_module.TopKRouter}
    text = "class Other(Base):\n    def routing(self, logits, padding_mask=None): ..."
    exec(text, namespace)  # its globals hold no apply_router_token_dropping
    for name in ("probs", "dropless"):
        model = megatron.layer(**LAYERS[name])
        model.router.__class__ = namespace["Other"]
        if name == "dropless":  # nothing can be dropped: nothing is missing
            moe_lens.record(model, tmp_path / name, layout="sb").close(KeyError())
            continue
        with pytest.raises(UnsupportedRouter, match="drops tokens in a way"):
            moe_lens.record(model, tmp_path / name)


OTHER_DROPPING = """
def dropping({names}, **options):
    return drop({values}, **options)

def get_capacity({asked}):
    raise KeyError("another way")
"""


def other_dropping(monkeypatch, names, asked="num_tokens, num_experts, capacity_factor"):
    """The router drops by a function that does the same, but is another."""
    values = ", ".join(name.partition("=")[0] for name in names.split(", "))
    namespace = {"drop": router_module.apply_router_token_dropping}
    exec(OTHER_DROPPING.format(names=names, values=values, asked=asked), namespace)
    monkeypatch.setattr(router_module, "apply_router_token_dropping", namespace["dropping"])


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        ("routing_probs, routing_map, router_topk, factor=0.8", "num_tokens, num_experts"),
        ("routing_probs, routing_map, router_topk, capacity_factor", "tokens, experts, factor"),
    ],
)
def test_dropping_with_other_arguments_is_refused(names, asked, monkeypatch, tmp_path):
    other_dropping(monkeypatch, names, asked)
    with pytest.raises(UnsupportedRouter, match="drops tokens in a way"):
        moe_lens.record(megatron.layer(**LAYERS["probs"]), tmp_path / "run", layout="sb")


def test_dropping_that_cannot_be_read_is_a_breach_and_does_not_end_the_forward(
    x, monkeypatch, tmp_path
):
    model = megatron.layer(**LAYERS["probs"])
    want = model(x)[0]
    other_dropping(monkeypatch, "routing_probs, routing_map, router_topk, capacity_factor")
    got = []
    model.register_forward_hook(lambda m, args, out: got.append(out[0]))
    with pytest.raises(CaptureBreach, match="dropping could not be read"):
        recorded(model, x, tmp_path / "run")
    assert torch.equal(got[0], want)


def test_experts_given_other_rows_are_a_breach(x, tmp_path):
    model = megatron.layer()
    model.experts.register_forward_pre_hook(
        lambda m, args: (args[0], args[1].roll(1), args[2]), prepend=True
    )
    with pytest.raises(CaptureBreach, match="rows given to experts, not those that were routed"):
        recorded(model, x, tmp_path / "run")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Folder of what two processes recorded, each a rank with half of the experts."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("megatron_rank.py", 2, folder)
    return folder


@pytest.mark.parametrize("policy", ["none", "probs", "position"])
def test_two_ranks_of_experts(policy, two_ranks):
    """Each rank records its own tokens; an expert's rank receives those of both."""
    run = two_ranks / policy
    with moe_lens.open(run) as trace:
        load, routing = (trace.table(name).df() for name in ("load", "routing"))
    executed = np.zeros(E, int)
    for r in range(2):
        told = np.load(two_ranks / f"{policy}{r}.npz")
        mine = routing[routing["rank"] == r].sort_values("token")
        ran = np.zeros((T, E), np.float32)
        for t, row in enumerate(mine.itertuples()):
            for slot, (e, w) in enumerate(zip(row.expert_ids, row.weights, strict=True)):
                if row.dropped is None or slot not in row.dropped:
                    ran[t, e] = w
        assert ((told["weights"] != 0) == (ran != 0)).all()
        np.testing.assert_allclose(ran, told["weights"], rtol=1e-6)
        assert (told["changed"] == (ran != 0)).all()  # ablation, expert by expert
        executed += (ran != 0).sum(0)
        own = load[load["rank"] == r].groupby("expert").processed.sum()
        assert own.reindex(range(E), fill_value=0).tolist() == (ran != 0).sum(0).tolist()
    received = load.groupby(["rank", "expert"]).received.sum().unstack(fill_value=0)
    assert received.sum().reindex(range(E), fill_value=0).tolist() == executed.tolist()
    assert (received.loc[0, 4:] == 0).all()
    assert (received.loc[1, :3] == 0).all()
    assert (load.dropped.sum() > 0) == (policy != "none")
