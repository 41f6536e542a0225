"""Interventions on small models whose answer is known, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from support.models import TinyModel
from support.steering import bare
from torch import nn

import moe_lens
from moe_lens.demo.model import MoEConfig, MoELanguageModel
from moe_lens_hooks.steering.choice import Choice, ForcedChoice
from moe_lens_hooks.steering.edits import ForceIn, KnockOut, RunnerUp

TOKENS = torch.arange(12).view(3, 4)


def of_output(model, batch):
    """A number for each token that shows every change of its own output."""
    x_BSD = model(batch if isinstance(batch, torch.Tensor) else batch["input_ids"])
    return (x_BSD * torch.arange(1, x_BSD.shape[-1] + 1)).sum(-1)


@pytest.fixture
def iv(model):
    with moe_lens.intervene(model, loss=of_output) as session:
        yield session


def expected(model, change):
    """What a copy of the model computes whose first block is changed by `change(block)`."""
    other = copy.deepcopy(model)
    change(other.blocks[0])
    with torch.no_grad():
        return of_output(other, TOKENS).reshape(-1).numpy()


def test_a_knocked_out_expert_is_one_whose_logit_is_minus_infinity(iv, model):
    base = iv.measure(TOKENS)

    def without_it(block):
        gate = block.gate

        def masked(x_TD):
            logits = x_TD @ gate.weight.T
            logits[:, 2] = -torch.inf
            prob_TK, ids_TK = logits.softmax(-1).topk(gate.top_k)
            return logits, prob_TK / prob_TK.sum(-1, keepdim=True), ids_TK

        gate.forward = masked

    cost = iv.knock_out(0, 2)(base)
    assert cost.affected_N.any()
    assert not cost.affected_N.all()
    np.testing.assert_allclose(cost.loss_N, expected(model, without_it), rtol=1e-5, atol=1e-5)


def test_tokens_that_nothing_concerns_keep_their_loss_bit_for_bit(iv):
    base = iv.measure(TOKENS)
    for change in (iv.knock_out(0, 2), iv.knock_out(0, 2, refill=False), iv.force_in(0, 2)):
        cost = change(base)  # no attention: a token's loss is of its own experts alone
        assert (cost.delta_N[~cost.affected_N] == 0).all()
        assert (cost.delta_N[cost.affected_N] != 0).all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_duplicated_expert_costs_nothing_where_its_twin_takes_over(top_k):
    """Twins in router and experts. Top-1: the twin follows. Top-2: both are chosen, or the second.

    Where both were chosen, what is left of the pair is the whole of it only without a refill.
    """
    torch.manual_seed(1)
    model = TinyModel(experts=6, top_k=top_k, blocks=1).eval()
    block = model.blocks[0]
    with torch.no_grad():
        block.gate.weight[4] = block.gate.weight[1]
        block.experts.weight[4] = block.experts.weight[1]
    with moe_lens.intervene(model, loss=of_output) as iv:
        base = iv.measure(TOKENS)
        ids_NK = base.layers[0].expert_ids_BSK.reshape(12, top_k)
        one = max((1, 4), key=lambda e: (ids_NK == e).sum())
        refilled, dropped = iv.knock_out(0, one)(base), iv.knock_out(0, one, refill=False)(base)
        both = iv.knock_out(0, 1, 4)(base)
        copied = iv.duplicate(0, 1, over=4)(base)
    pair_N = np.isin(ids_NK, (1, 4)).sum(1)
    assert pair_N.any()
    hit = refilled.affected_N
    assert hit.any()
    twin_follows = hit & (pair_N == 1)
    np.testing.assert_allclose(refilled.delta_N[twin_follows], 0, atol=1e-5)
    np.testing.assert_allclose(dropped.delta_N[hit & (pair_N == 2)], 0, atol=1e-5)
    assert abs(copied.delta_N).max() < 1e-5
    assert abs(both.delta_N[pair_N > 0]).min() > 1e-3


def test_pieces_and_tags(model):
    batch = {"input_ids": TOKENS, "tags": ["code", "prose", "code"]}
    found = []
    for size in (1, 4, 8, 4096):
        with moe_lens.intervene(model, loss=of_output, tokens_at_once=size) as iv:
            base = iv.measure(batch)
            found.append((base, iv.knock_out(0, 2)(base), iv.random(1, seed=3)(base)))
    whole, change, _ = found[-1]
    assert [base.self_test for base, _, _ in found] == [3, 3, 2, 1]
    for base, cost, random in found:
        np.testing.assert_allclose(base.loss_BS, whole.loss_BS, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(cost.loss_N, change.loss_N, rtol=1e-6, atol=1e-6)
        assert (cost.affected_N == change.affected_N).all()
        assert random.affected_N.all()
    frame = pd.DataFrame(change.columns())
    assert frame.tag.tolist() == ["code"] * 4 + ["prose"] * 4 + ["code"] * 4
    assert frame.position.tolist() == [0, 1, 2, 3] * 3
    assert frame.delta.mean() == pytest.approx(change.mean)


def test_force_takes_ids_token_by_token(iv, model):
    base = iv.measure(TOKENS)
    ids = torch.full((3, 4, 2), -1)
    ids[1, 2] = torch.tensor([5, 0])
    cost = iv.force(0, ids)(base)
    row = torch.full((12, 2), -1)
    row[6] = torch.tensor([5, 0])
    with moe_lens.force_routing(model, {0: row}), torch.no_grad():
        wanted = of_output(model, TOKENS).reshape(-1).numpy()
    assert (cost.loss_N == wanted).all()
    own = set(base.layers[0].expert_ids_BSK[1, 2].tolist())
    assert cost.affected_N.nonzero()[0].tolist() == ([6] if own != {0, 5} else [])


def test_confidence_is_that_of_the_router(iv, model):
    base = iv.measure(TOKENS)
    with torch.no_grad():
        x_TD = model.embed(TOKENS).view(12, -1)
        prob = (x_TD @ model.blocks[0].gate.weight.T).softmax(-1)
    best = prob.sort(-1, descending=True).values
    layer = base.layers[0]
    np.testing.assert_allclose(layer.margin_BS.ravel(), best[:, 1] - best[:, 2], atol=1e-6)
    np.testing.assert_allclose(layer.entropy_BS.ravel(), -(prob * prob.log()).sum(-1), atol=1e-5)


def test_nothing_is_left_behind(iv, model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    base = iv.measure(TOKENS)
    (iv.knock_out(0, 1) + iv.duplicate(1, 2, over=3))(base)
    with pytest.raises(moe_lens.SteeringError):
        iv.top_k(0, 7)(base)
    assert bare(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_demo_is_asked():
    torch.manual_seed(0)
    model = MoELanguageModel(MoEConfig(hidden_size=32, moe_intermediate_size=16, ngram_buckets=64))
    model.eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("output.weight", "down_EDF")):  # they start at zero, and add nothing
            nn.init.normal_(parameter, std=0.2)
    text = torch.randint(0, 256, (2, 17))
    batch = {"input_ids": text[:, :-1].contiguous(), "targets_BS": text[:, 1:].contiguous()}
    with moe_lens.intervene(model, loss=lambda m, b: m(**b).loss_BS) as iv:
        base = iv.measure(batch)
        for n in range(4):
            cost = iv.knock_out(n, 3)(base)
            chose = (base.layers[n].expert_ids_BSK == 3).any(-1).ravel()
            assert (cost.affected_N == chose).all()
            assert (iv.top_k(n, 2)(base).loss_N == cost.base_N).all()
            assert iv.top_k(n, 3)(base).affected_N.all()


def test_the_last_choice_is_the_worst_wherever_it_stands():
    """Routers that do not sort (DeepSeek) may return it first; of equal ones it is the last."""
    scores_TE = torch.tensor([[0.1, 0.9, 0.4, 0.3], [0.5, 0.5, 0.2, 0.4]])
    own_TK = torch.tensor([[2, 1], [0, 1]])
    every = torch.ones_like(scores_TE, dtype=torch.bool)
    assert RunnerUp(0).choose(scores_TE, every, own_TK).tolist() == [[3, 1], [0, 3]]
    assert ForceIn(0, 0).choose(scores_TE, every, own_TK).tolist() == [[0, 1], [0, 1]]
    assert KnockOut(0, (1,)).choose(scores_TE, every, own_TK).tolist() == [[2, 3], [0, 3]]


@pytest.mark.parametrize("changes", [True, False])
def test_a_choice_is_made_once(changes):
    """What repeats the router's arithmetic on its output is no second choice."""
    given = []

    def edit(scores_TE, allowed_TE, own_TK):
        given.append(scores_TE)
        return torch.tensor([[3, 0]]) if changes else None

    mode = ForcedChoice()
    mode.open.append(Choice("block", None, 2, 4, None, "test", True, edit, armed=True))
    first, again = torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([[0.0, 0.9, 0.8, 0.0]])
    with mode:
        values, ids = torch.topk(first, 2)
        _, ids_again = again.topk(2)
    assert len(given) == 1
    assert ids.tolist() == ([[3, 0]] if changes else [[3, 2]])
    assert torch.equal(values, first.gather(1, ids))
    assert ids_again.tolist() == ([[3, 0]] if changes else [[1, 2]])


# -- the loss --------------------------------------------------------------------------------------


class Speaking(nn.Module):
    """Logits of a vocabulary of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyModel(experts=4)
        self.head = nn.Linear(8, 32)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.inner(input_ids))


def test_the_loss_is_of_the_next_token_and_none_of_padding():
    torch.manual_seed(0)
    model = Speaking().eval()
    mask = torch.ones_like(TOKENS)
    mask[0, 3] = 0
    labels = TOKENS.clone()
    labels[2, :2] = -100
    with moe_lens.intervene(model) as iv:
        plain = iv.measure(TOKENS)
        masked = iv.measure({"input_ids": TOKENS, "attention_mask": mask})
        some = iv.measure({"input_ids": TOKENS, "labels": labels})
        cost = iv.knock_out(0, 1)(masked)
    with torch.no_grad():
        logp = model(TOKENS).log_softmax(-1)
    wanted = np.full((3, 4), np.nan)
    for b in range(3):
        for s in range(3):
            wanted[b, s] = -float(logp[b, s, TOKENS[b, s + 1]])
    np.testing.assert_allclose(plain.loss_BS, wanted, rtol=1e-5)
    wanted[0, 2] = np.nan
    np.testing.assert_allclose(masked.loss_BS, wanted, rtol=1e-5)
    assert np.isnan(some.loss_BS[2, 0])
    assert not np.isnan(some.loss_BS[2, 1])
    assert len(cost.loss_N) == 8


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: of_output(m, b).mean(), r"has shape \[\]: not one a token. Give loss=f"),
        (lambda m, b: of_output(m, b).mean(1), r"3 x 4 tokens has shape \[3\]: not one a token"),
        (lambda m, b: float(of_output(m, b).sum()), "has float: not one a token"),
        (lambda m, b: of_output(m, b) + of_output(m, b), "ran the model 2 times"),
    ],
)
def test_a_loss_that_is_not_per_token_is_refused(model, loss, message):
    with moe_lens.intervene(model, loss=loss) as iv:
        with pytest.raises(moe_lens.SteeringError, match=message):
            iv.measure(TOKENS)


def test_a_model_without_logits_needs_a_loss(model):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return {"hidden": self.inner(x)}

    with moe_lens.intervene(Hidden()) as iv:
        with pytest.raises(moe_lens.SteeringError, match="no loss per token: no logits"):
            iv.measure(TOKENS)


def test_dropout_is_refused(model):
    model.blocks[0].drop = nn.Dropout(0.1).eval()
    with moe_lens.intervene(model, loss=of_output) as iv:
        iv.measure(TOKENS)  # in eval mode it draws nothing
        model.train()
        with pytest.raises(moe_lens.SteeringError, match=r"blocks.0.drop is training with p=0.1"):
            iv.measure(TOKENS)
    with pytest.raises(moe_lens.SteeringError, match=r"call model.eval\(\)"):
        moe_lens.intervene(model, loss=of_output)


def test_a_model_that_draws_fails_the_self_test(model):
    model.embed.register_forward_hook(lambda m, a, out: out + torch.rand_like(out) * 1e-6)
    with moe_lens.intervene(model, loss=of_output) as iv:
        with pytest.raises(moe_lens.UnsupportedRouter, match=r"bit for bit.*Does it draw"):
            iv.measure(TOKENS)


def test_a_router_that_cannot_be_changed_is_refused_by_name(model):
    def sorted_choice(x_TD, gate=model.blocks[0].gate):
        logits = x_TD @ gate.weight.T
        prob, ids = logits.softmax(-1).sort(-1, descending=True)
        return logits, prob[:, :2] / prob[:, :2].sum(-1, keepdim=True), ids[:, :2]

    model.blocks[0].gate.forward = sorted_choice
    with moe_lens.intervene(model, loss=of_output) as iv:
        base = iv.measure(TOKENS)
        with pytest.raises(moe_lens.UnsupportedRouter, match=r"layer 0 \(blocks.0, .*cannot be"):
            iv.runner_up(0)(base)
        assert iv.runner_up(1)(base).affected_N.all()
        assert iv.duplicate(0, 1, over=2)(base).affected_N.any()  # of what experts are given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda iv: iv.knock_out(2, 0), "no layer 2: the model has 2 MoE layers"),
        (lambda iv: iv.knock_out(0, 6), "layer 0 has experts 0 to 5, not 6"),
        (lambda iv: iv.duplicate(0, 1, over=-1), "experts 0 to 5, not -1"),
        (lambda iv: iv.top_k(0, 7), "6 experts: its top-k cannot be 7"),
        (lambda iv: iv.knock_out(0, 0, 1, 2, 3, 4), "left with 1 experts .* needs 2"),
        (lambda iv: iv.runner_up(0) + iv.top_k(0, 1), "layer 0 has two changes at once"),
        (lambda iv: iv.force(0, torch.zeros(3, 4, 1).long()), r"chooses \[3, 4, 2\] of 6"),
        (lambda iv: iv.force(0, torch.tensor([1, 9]).expand(3, 4, 2)), "up to 9"),
    ],
)
def test_what_does_not_fit_is_refused(iv, change, message):
    base = iv.measure(TOKENS)
    with pytest.raises(moe_lens.SteeringError, match=message):
        change(iv)(base)


def test_arguments_that_cannot_be_are_refused(iv, model):
    with pytest.raises(ValueError, match="needs an expert"):
        iv.knock_out(0)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        iv.top_k(0, 0)
    with pytest.raises(ValueError, match="K different experts, or -1"):
        iv.force(0, torch.zeros(3, 4, 2).long())
    with pytest.raises(ValueError, match=r"integers \[B, S, K\]"):
        iv.force(0, torch.zeros(12, 2).long())
    with pytest.raises(ValueError, match="tokens_at_once=0"):
        moe_lens.intervene(model, tokens_at_once=0)
    with pytest.raises(moe_lens.SteeringError, match="3 sequences, but 2 tags"):
        iv.measure({"input_ids": TOKENS, "tags": ["a", "b"]})
    with pytest.raises(moe_lens.SteeringError, match="got list"):
        iv.measure([1, 2])
    with pytest.raises(moe_lens.SteeringError, match="no tensor"):
        iv.measure({"tags": []})
    with pytest.raises(moe_lens.NoMoELayers):
        moe_lens.intervene(nn.Linear(2, 2))
