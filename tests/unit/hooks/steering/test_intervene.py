"""Interventions on small models whose answer is known, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from support.models import TinyModel
from support.steering import bare, of_output
from torch import nn

import moe_lens
from moe_lens.demo.model import MoEConfig, MoELanguageModel
from moe_lens_hooks.steering.choice import Choice, ForcedChoice
from moe_lens_hooks.steering.edits import Drop, ForceIn, KnockOut, RunnerUp, TopK
from moe_lens_hooks.steering.looked import Looked

TOKENS = torch.arange(12).view(3, 4)


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


def test_what_padding_predicts_is_no_loss():
    """Padded on the left: the last padding would predict the first token."""
    torch.manual_seed(0)
    model = Speaking().eval()
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    batch = {"attention_mask": mask, "input_ids": TOKENS}
    with moe_lens.intervene(model) as iv:
        own = iv.measure(batch)
        labelled = iv.measure({**batch, "labels": TOKENS})
        plain = iv.measure(TOKENS)
    known = np.array([[0, 0, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]], bool)
    np.testing.assert_array_equal(own.tokens, known)
    np.testing.assert_array_equal(labelled.tokens, known)
    np.testing.assert_array_equal(own.loss_BS[known], plain.loss_BS[known])


def test_the_shape_is_that_of_the_tokens_whatever_stands_first():
    torch.manual_seed(0)

    class Masked(Speaking):
        def forward(self, attention_mask, input_ids):
            return {"logits": super().forward(input_ids)}

    batch = {"attention_mask": torch.ones(3, 1, 4, 4), "input_ids": TOKENS}
    with moe_lens.intervene(Masked().eval()) as iv:
        assert iv.measure(batch).tokens.sum() == 9


def test_dropped_weights_are_scaled_up_whatever_padding_has():
    """A model that takes the weights of padding away still makes those of tokens sum to one."""
    ids_TK = torch.tensor([[0, 1], [1, 2], [0, 2]])
    weights_TK = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.0, 0.0]])
    given, left_TK = Drop(0, (1,)).give(ids_TK, weights_TK)
    assert torch.equal(given, ids_TK)
    torch.testing.assert_close(left_TK, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    unequal = torch.tensor([[0.6, 0.4], [0.4, 0.3], [0.2, 0.1]])
    torch.testing.assert_close(
        Drop(0, (1,)).give(ids_TK, unequal)[1],
        torch.tensor([[0.6, 0.0], [0.0, 0.3], [0.2, 0.1]]),
    )


def test_a_token_whose_experts_are_all_gone_gets_nothing():
    ids_TK = torch.tensor([[0, 1], [1, 2]])
    _, left_TK = Drop(0, (0, 1)).give(ids_TK, torch.tensor([[0.6, 0.4], [0.7, 0.3]]))
    torch.testing.assert_close(left_TK, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))


def test_experts_of_other_groups_are_no_runners_up_whatever_their_score():
    """A group limit gives the experts of other groups a score of zero; the others' are below."""
    scores_TE = torch.tensor([[-1.0, -2.0, -3.0, -4.0, 0.0, 0.0]])
    allowed_TE = torch.tensor([[True, True, True, True, False, False]])
    own_TK = torch.tensor([[0, 1]])
    for edit, wanted in (
        (KnockOut(0, (0,)), {1, 2}),
        (RunnerUp(0), {0, 2}),
        (TopK(0, 3), {0, 1, 2}),
    ):
        assert set(edit.choose(scores_TE, allowed_TE, own_TK)[0].tolist()) == wanted
    looked = Looked(layer=None)
    looked.choice(scores_TE, allowed_TE, own_TK)
    assert looked.margin_T.tolist() == [1.0]  # -2 before -3


def test_the_order_of_a_tokens_experts_is_no_change(iv):
    """Other tokens keep theirs, and so their bits; the same experts in another order are those."""
    scores_TE, allowed_TE = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool)
    own_TK = torch.tensor([[1, 0]])
    assert torch.equal(KnockOut(0, (3,)).choose(scores_TE, allowed_TE, own_TK), own_TK)
    base = iv.measure(TOKENS)
    turned = torch.from_numpy(base.layers[0].expert_ids_BSK).flip(-1)
    assert not iv.force(0, turned)(base).affected_N.any()


def test_a_cost_is_above_zero_where_the_loss_rises(iv):
    base = iv.measure(TOKENS)
    cost = iv.top_k(0, 1)(base)
    np.testing.assert_allclose(base.loss_BS.ravel() + cost.delta_N, cost.loss_N, rtol=1e-6)
    assert cost.mean == pytest.approx(cost.loss_N.mean() - base.loss_BS.mean(), rel=1e-4)


def test_what_comes_back_is_printed_in_a_line(iv):
    base = iv.measure(TOKENS)
    cost = iv.knock_out(0, 3)(base)
    mean, hit = cost.delta_N.mean(), cost.affected_N.sum()
    assert repr(cost) == f"Change(mean {mean:+.4f} over 12 tokens, {hit} of them affected)"
    assert repr(base) == (
        f"Base(3 x 4 tokens, 12 with a loss, mean loss {base.loss_BS.mean():.4f}; 2 MoE layers, "
        "reproduced bit for bit)"
    )
    assert repr(base.layers[1]) == "Layer(1: blocks.1, 6 experts)"
    assert repr(iv) == "Interventions(TinyModel, 2 MoE layers)"
    both = iv.force(0, torch.tensor([0, 1]).expand(3, 4, 2)) + iv.top_k(1, 1)
    assert repr(both) == "Intervention(edits=(Force(layer=0), TopK(layer=1, k=1)))"


@pytest.mark.parametrize("shares", ["experts", "block", "weight"])
def test_experts_that_layers_share_are_changed_in_the_layer_that_is_named(model, shares):
    first, second = model.blocks
    if shares == "block":
        model.blocks[1] = first
    elif shares == "experts":
        second.experts = first.experts
    else:
        second.experts.weight = first.experts.weight

    def plain(layer, *, out=None, over=None):
        x_BSD = model.embed(TOKENS)
        for n, block in enumerate(model.blocks):
            x_TD = x_BSD.reshape(12, -1)
            logits_TE = x_TD @ block.gate.weight.T
            if n == layer and out is not None:
                logits_TE[:, out] = -torch.inf
            prob_TK, ids_TK = logits_TE.softmax(-1).topk(2)
            if n == layer and over is not None:
                ids_TK = ids_TK.masked_fill(ids_TK == over, 1)
            y = [
                [block.experts.weight[e].T @ x for e in ids]
                for x, ids in zip(x_TD, ids_TK, strict=True)
            ]
            y_TKD = torch.stack([torch.stack(row) for row in y])
            y_TD = (y_TKD * (prob_TK / prob_TK.sum(-1, keepdim=True))[..., None]).sum(1)
            x_BSD = x_BSD + y_TD.view_as(x_BSD)
        return (x_BSD * torch.arange(1, x_BSD.shape[-1] + 1)).sum(-1).reshape(-1)

    with moe_lens.intervene(model, loss=of_output) as iv, torch.no_grad():
        base = iv.measure(TOKENS)
        np.testing.assert_allclose(base.loss_BS.ravel(), plain(None), rtol=1e-4, atol=1e-4)
        for n in (0, 1):
            copied, gone = iv.duplicate(n, 1, over=2)(base), iv.knock_out(n, 1)(base)
            assert copied.affected_N.any()
            assert gone.affected_N.any()
            np.testing.assert_allclose(copied.loss_N, plain(n, over=2), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(gone.loss_N, plain(n, out=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_in_bfloat16_the_difference_is_that_of_the_routes(model, how):
    """Knocked out, a token that never chose the expert keeps its bits; forced back, all do."""
    if how == "bfloat16":
        model = model.to(torch.bfloat16)

    def loss(m, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return of_output(m, batch)

    with moe_lens.intervene(model, loss=loss) as iv:
        base = iv.measure(TOKENS)
        cost = iv.knock_out(1, 2)(base)
        own = iv.force(1, torch.from_numpy(base.layers[1].expert_ids_BSK))(base)
    hit = (base.layers[1].expert_ids_BSK == 2).any(-1).ravel()
    assert 0 < hit.sum() < 12
    np.testing.assert_array_equal(cost.affected_N, hit)
    assert (cost.delta_N[~hit] == 0).all()
    assert (cost.delta_N[hit] != 0).any()
    assert (own.delta_N == 0).all()
